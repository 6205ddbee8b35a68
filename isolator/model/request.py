"""What a caller may ask for: the body of a spawn, checked for shape only.

Shape is all this file judges: unknown fields, wrong types, absurd sizes. Whether the caller may have it is
decided in `policy`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from isolator.model.sizes import parse_size

MAX_COMMAND = 512
MAX_ENVIRONMENT = 1024
MAX_TEXT = 131_072
MAX_MOUNTS = 32
MAX_SECRETS = 64
MAX_SECRET = 262_144

Name = Annotated[str, Field(min_length=1, max_length=64)]
Path = Annotated[str, Field(min_length=1, max_length=4096)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Size = Annotated[int, BeforeValidator(parse_size)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Mode = Literal["ro", "rw"]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LimitsRequest(_Wire):
    """Caps asked for; what is absent comes from settings."""

    cpus: Number | None = Field(None, description="Cores.", examples=[0.5])
    memory: Size | None = Field(None, description="Bytes, or a text such as 512m.", examples=["256m"])
    pids: int | None = Field(None, description="Processes and threads.")
    disk: Size | None = Field(None, description="Size of /tmp, bytes or a text.")
    nofile: int | None = Field(None, description="Open files a process.")
    wall: Number | None = Field(None, description="Seconds the command may run.")


class WorkspaceRequest(_Wire):
    """The folder that appears as /workspace."""

    source: Path
    mode: Mode = "rw"


class MountRequest(_Wire):
    """One more folder or file inside the box."""

    source: Path
    target: Path
    mode: Mode = "ro"


class SecretRequest(_Wire):
    """A secret: its value here, or, with no value, the host's secret of that name."""

    name: Name
    value: Annotated[str, Field(max_length=MAX_SECRET)] | None = Field(None, repr=False)
    delivery: Literal["file", "env"] = Field("file", alias="as")
    env: Name | None = Field(None, description='With "as": "env", the variable; default: the name in capitals.')

    @model_validator(mode="before")
    @classmethod
    def _bare_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class TeamRequest(_Wire):
    """A team to create."""

    id: Name = Field(validation_alias=AliasChoices("id", "team", "name"), description="Lower-case, [a-z0-9-].")


class EnsureRequest(_Wire):
    """A spawn whose team and name stand in the address."""

    image: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    command: Annotated[list[Text], Field(max_length=MAX_COMMAND)] = Field(
        default_factory=list, description="argv, no shell. Empty: the box stays up and waits."
    )
    env: Annotated[dict[str, Text], Field(max_length=MAX_ENVIRONMENT)] = Field(default_factory=dict)
    secrets: Annotated[list[SecretRequest], Field(max_length=MAX_SECRETS)] = Field(default_factory=list)
    limits: LimitsRequest = LimitsRequest()
    workspace: WorkspaceRequest | None = None
    mounts: Annotated[list[MountRequest], Field(max_length=MAX_MOUNTS)] = Field(default_factory=list)
    network: Literal["team", "none"] | None = None
    skills: Annotated[list[Any], Field(max_length=64)] = Field(default_factory=list)
    capabilities: Annotated[list[Any], Field(max_length=256)] = Field(default_factory=list)
    session: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    parent: Name | None = None
    ttl: Number | None = None
    idle_ttl: Number | None = None
    cleanup_grace: Number | None = None
    create_team: bool = Field(True, description="Create the team if it does not exist.")


class TerminalSize(_Wire):
    """A terminal's columns and rows."""

    width: Annotated[int, Field(ge=1, le=65535)] = Field(validation_alias=AliasChoices("width", "Width"))
    height: Annotated[int, Field(ge=1, le=65535)] = Field(validation_alias=AliasChoices("height", "Height"))


class CommandRequest(_Wire):
    """One more command in a running agent's box."""

    command: Annotated[list[Text], Field(min_length=1, max_length=MAX_COMMAND)] = Field(description="argv, no shell.")
    env: Annotated[dict[str, Text], Field(max_length=MAX_ENVIRONMENT)] = Field(
        default_factory=dict, description="Beside the agent's own environment."
    )
    cwd: Path | None = Field(None, description="Absolute; default: the agent's own.")
    timeout: Number | None = Field(None, description="Seconds until all of it is killed.")
    max_output: Size | None = Field(None, description="Bytes kept of each stream; what is more is dropped and told.")


class RunRequest(CommandRequest):
    """A command whose output is answered when it has ended."""

    stdin: Annotated[str, Field(max_length=4 * 1024**2)] | None = Field(None, description="Base64.")


class ExecRequest(CommandRequest):
    """A command whose streams are passed while it runs: the first message of the exec WebSocket."""

    tty: bool = False
    stdin: bool = Field(True, description="false: it reads an end of file at once.")
    size: TerminalSize | None = Field(None, description="The terminal's, with tty.")


class SpawnRequest(EnsureRequest):
    """A spawn."""

    team: Name
    name: Name | None = None
