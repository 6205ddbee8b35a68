"""Every setting, once: name, unit, default, and where a value comes from.

A setting is an environment variable `ISOLATOR_<NAME>`, else a key of `/etc/isolator/isolator.toml`
(`ISOLATOR_CONFIG` names another file), else the default below. An unknown key in the file is refused by name:
a misspelt limit must not silently mean "no limit".
"""

from __future__ import annotations

import grp
import ipaddress
import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from isolator.model.sizes import parse_size

DEFAULT_CONFIG = Path("/etc/isolator/isolator.toml")
_INSTANCE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?\Z")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")

Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _split_list(value: Any) -> Any:
    """`["/a","/b"]` or `/a:/b` from the environment; an empty text is the empty list."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith("["):
        return json.loads(text)
    return [part for part in text.split(":") if part]


def _split_commas(value: Any) -> Any:
    """`["a","b"]` or `a,b` from the environment (digests hold colons)."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text.startswith("["):
        return json.loads(text)
    return [part.strip() for part in text.split(",") if part.strip()]


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError(f"{path} must be an absolute path")
    return path


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
PathList = Annotated[list[AbsolutePath], NoDecode, BeforeValidator(_split_list)]


def _user_folder(variable: str, fallback: str) -> Path:
    return Path(os.environ.get(variable) or fallback) / "isolator"


def _default_state() -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/isolator")
    return _user_folder("XDG_STATE_HOME", str(Path.home() / ".local/state"))


def _default_runtime() -> Path:
    if os.geteuid() == 0:
        return Path("/run/isolator")
    return _user_folder("XDG_RUNTIME_DIR", f"/tmp/isolator-{os.geteuid()}")


class Settings(BaseSettings):
    """All settings of daemon and CLI. Sizes are bytes (or "512m"), times are seconds."""

    model_config = SettingsConfigDict(
        env_prefix="ISOLATOR_", extra="forbid", frozen=True, validate_default=True, env_ignore_empty=True
    )

    # where things are
    socket: AbsolutePath | None = Field(
        None, description="The API's Unix socket; default: <runtime_dir>/isolator.sock."
    )
    socket_group: str = Field(
        "isolator", description="Group that may connect (mode 0660); skipped if it does not exist."
    )
    state_dir: AbsolutePath = Field(
        default_factory=_default_state, description="Database and audit log; survives reboots."
    )
    runtime_dir: AbsolutePath = Field(
        default_factory=_default_runtime, description="Sockets and staged mounts; on a tmpfs."
    )
    secret_dir: AbsolutePath = Field(
        Path("/etc/isolator/secrets"),
        description="Root-owned folder of secrets: NAME for admins, uid-<uid>/NAME for that user.",
    )
    instance: str = Field("default", description="Name of this daemon on its engine; two on one engine need two names.")

    # the engine
    backend: Literal["auto", "docker", "bubblewrap", "landlock"] = Field("auto", description="What runs agents.")
    docker_socket: AbsolutePath = Field(Path("/var/run/docker.sock"), description="The Docker Engine's API socket.")
    engine_timeout: Seconds = Field(30.0, description="Longest wait for one answer of the engine, seconds.")
    engine_workers: int = Field(6, ge=1, le=64, description="Engine calls made at the same time.")

    # who
    admin_uids: Annotated[list[Annotated[int, Field(ge=0)]], NoDecode, BeforeValidator(_split_commas)] = Field(
        [0],
        description="Uids that see and may do everything; the daemon's own uid always belongs to them.",
    )

    # networks
    subnet_pool: str = Field("10.208.0.0/12", description="IPv4 range from which each team's subnet is cut.")
    subnet_prefix: int = Field(24, ge=16, le=28, description="Size of one team's subnet: /24 holds 253 agents.")

    # images
    default_image: str = Field("isolator/agent-python", description="Image of a spawn that names none.")
    image_lock: AbsolutePath | None = Field(
        None, description="File that pins our images' names to digests; default: <state_dir>/images.json."
    )
    allowed_images: Annotated[list[str], NoDecode, BeforeValidator(_split_commas)] = Field(
        [], description="Foreign images allowed, by digest (sha256:…). Empty: none."
    )

    # mounts
    workspace_roots: PathList = Field([], description="Folders below which mounts may lie. Empty: no mounts at all.")

    # what a box gets
    agent_uid: int = Field(10001, ge=1, lt=2**31, description="Uid of agents without a workspace of their own.")
    default_cpus: float = Field(1.0, gt=0, le=1024, description="CPU cores an agent gets.")
    default_memory: Size = Field(parse_size("512m"), description="Memory an agent gets, swap included.")
    default_pids: int = Field(256, ge=4, description="Processes and threads an agent gets.")
    default_disk: Size = Field(parse_size("64m"), description="Size of /tmp, and of /dev/shm as much again.")
    default_nofile: int = Field(4096, ge=64, description="Open files a process of the agent gets.")
    max_cpus: float = Field(64.0, gt=0, le=1024, description="Most cores a spawn may ask for (the host's own at most).")
    max_memory: Size = Field(parse_size("16g"), description="Most memory a spawn may ask for.")
    max_pids: int = Field(4096, ge=4, description="Most processes a spawn may ask for.")
    max_disk: Size = Field(parse_size("4g"), description="Largest /tmp a spawn may ask for.")
    max_nofile: int = Field(65536, ge=64, description="Most open files a spawn may ask for.")
    log_max_bytes: Size = Field(parse_size("10m"), description="Output kept of one agent; older output is dropped.")

    # boxes made before their agents are known
    pool_depth: int = Field(0, ge=0, le=64, description="Ready boxes kept of each team and profile in use; 0: none.")
    pool_budget: int = Field(32, ge=0, le=1024, description="Ready boxes of all teams together.")
    pool_idle: Seconds = Field(900.0, description="How long a profile's boxes are kept that no spawn has asked for.")

    # time
    default_ttl: Seconds | None = Field(None, description="Life of an agent that names no ttl; none: until stopped.")
    max_ttl: Seconds | None = Field(None, description="Longest ttl a spawn may ask for; also caps agents without one.")
    cleanup_grace: float = Field(60.0, ge=0, le=86400, description="How long an exited agent's box and logs stay.")
    stop_grace: float = Field(2.0, ge=0, le=600, description="Seconds between asking an agent to stop and killing it.")
    spawn_timeout: Seconds = Field(60.0, description="Longest a spawn may take before it is undone.")
    network_proof_timeout: Seconds = Field(60.0, description="Longest a spawn waits for the network self-test.")

    # bounds of the API (docs/limits.md)
    max_agents: int = Field(1000, ge=1, description="Agents held at a time, those that wait for their cleanup too.")
    max_concurrent_spawns: int = Field(64, ge=1, description="Spawns under way at the same time; more are told 429.")
    max_connections: int = Field(512, ge=8, description="Open connections to the socket; one more is closed at once.")
    max_body: Size = Field(parse_size("2m"), description="Largest request body.")
    request_timeout: Seconds = Field(10.0, description="Time a client has to send a whole request.")
    max_followers: int = Field(64, ge=1, description="Log and event streams open at the same time.")
    max_execs: int = Field(512, ge=1, description="Execs and runs under way at the same time, of all agents.")
    max_execs_per_agent: int = Field(64, ge=1, le=200, description="Execs and runs under way in one agent.")
    run_max_output: Size = Field(parse_size("4m"), description="Output of a run kept of each of its two streams.")
    max_message: Size = Field(parse_size("256k"), description="Largest message between agents, or with the gateway.")
    mailbox_messages: int = Field(256, ge=1, description="Messages kept for one receiver that is not there.")
    mailbox_bytes: Size = Field(parse_size("4m"), description="Bytes of messages kept for one receiver.")
    mail_bytes: Size = Field(parse_size("256m"), description="Bytes of messages kept for all receivers together.")
    message_rate: float = Field(200.0, gt=0, le=1e6, description="Messages a second of one agent; bursts of twice.")
    message_ttl: float = Field(300.0, gt=0, le=86400, description="How long a message that names no ttl is kept.")
    events_kept: int = Field(10_000, ge=100, description="Events that can be resumed from.")
    records_kept: int = Field(5_000, ge=100, description="Removed agents whose record can still be inspected.")

    @field_validator("instance")
    @classmethod
    def _instance_is_a_name(cls, value: str) -> str:
        if not _INSTANCE.match(value):
            raise ValueError("instance must be 1 to 32 of a-z, 0-9 and -, not starting or ending with -")
        return value

    @field_validator("allowed_images")
    @classmethod
    def _images_are_digests(cls, value: list[str]) -> list[str]:
        for item in value:
            if not _DIGEST.match(item):
                raise ValueError(f"{item!r} is no digest: allow images as sha256:<64 hex digits>")
        return value

    @model_validator(mode="after")
    def _subnets_fit(self) -> Settings:
        pool = ipaddress.IPv4Network(self.subnet_pool)
        if pool.prefixlen > self.subnet_prefix:
            raise ValueError("subnet_pool must hold at least one subnet of subnet_prefix")
        if not pool.is_private:
            raise ValueError("subnet_pool must be a private range")
        return self

    @model_validator(mode="after")
    def _defaults_fit(self) -> Settings:
        for name in ("memory", "pids", "disk", "nofile"):
            if getattr(self, f"default_{name}") > getattr(self, f"max_{name}"):
                raise ValueError(f"default_{name} must not be more than max_{name}: every plain spawn would be refused")
        if self.default_ttl is not None and self.max_ttl is not None and self.default_ttl > self.max_ttl:
            raise ValueError("default_ttl must not be more than max_ttl: every plain spawn would be refused")
        return self

    @model_validator(mode="after")
    def _messages_fit(self) -> Settings:
        if self.max_message > min(self.mailbox_bytes, self.mail_bytes):
            raise ValueError("max_message must not be more than mailbox_bytes or mail_bytes: it could not be kept")
        return self

    @property
    def socket_path(self) -> Path:
        """The API's socket."""
        return self.socket or self.runtime_dir / "isolator.sock"

    @property
    def image_lock_path(self) -> Path:
        """The file that pins our images."""
        return self.image_lock or self.state_dir / "images.json"

    def own_folders(self) -> list[PurePosixPath]:
        """Isolator's own folders by their real paths: no agent may see them."""
        folders = (self.state_dir, self.runtime_dir, self.secret_dir)
        return [PurePosixPath(os.path.realpath(folder)) for folder in folders]

    def socket_gid(self) -> int | None:
        """The socket group's id, or None where the group does not exist."""
        try:
            return grp.getgrnam(self.socket_group).gr_gid
        except KeyError:
            return None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then environment, then the TOML file. No dotenv file, no secrets folder."""
        del dotenv_settings, file_secret_settings
        named = os.environ.get("ISOLATOR_CONFIG")
        path = Path(named) if named else DEFAULT_CONFIG
        if named and not path.is_file():
            raise FileNotFoundError(f"ISOLATOR_CONFIG names {path}, which is not there")
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=path)


def load_settings(**overrides: Any) -> Settings:
    """Settings from arguments, environment and file.

    Raises:
        pydantic.ValidationError: a value is wrong or a key unknown; the message names it.
        FileNotFoundError: ISOLATOR_CONFIG names a missing file.
    """
    return Settings(**overrides)
