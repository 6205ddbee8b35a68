"""The shapes of answers, for the OpenAPI document. A test holds real answers against them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Answer(BaseModel):
    # Only the OpenAPI document needs the schemas: built when it is asked for, not at every start.
    model_config = ConfigDict(extra="allow", defer_build=True)


class Problem(_Answer):
    """RFC 9457 problem; `code` is stable, docs/errors.md lists them."""

    type: str
    title: str
    status: int
    detail: str
    code: str


class ExitAnswer(_Answer):
    """How an agent ended."""

    code: int | None
    signal: int | None
    reason: Literal["exited", "killed", "oom", "wall", "ttl", "lost"]
    detail: str | None


class LimitsAnswer(_Answer):
    """Caps of an agent: cores, bytes, counts, seconds."""

    cpus: float
    memory: int
    pids: int
    disk: int
    nofile: int
    wall: float | None


class MountAnswer(_Answer):
    """A mount."""

    source: str
    target: str
    mode: Literal["ro", "rw"]


class GuaranteeAnswer(_Answer):
    """One line of a receipt."""

    held: bool
    how: str


class AgentAnswer(_Answer):
    """An agent. Times are RFC 3339."""

    id: str
    name: str
    team: str
    owner: str
    session: str | None
    parent: str | None
    backend: str
    image: str
    image_digest: str
    state: Literal["creating", "running", "exited", "stopping", "removed", "lost"]
    limits: LimitsAnswer
    mounts: list[MountAnswer]
    created_at: str
    started_at: str | None
    finished_at: str | None
    exit: ExitAnswer | None
    container_id: str | None
    pid: int | None
    warm: bool
    receipt: dict[str, GuaranteeAnswer]


class AgentList(_Answer):
    """Agents."""

    items: list[AgentAnswer]
    next: str | None


class RunAnswer(_Answer):
    """How a run ended; stdout and stderr are base64, duration is seconds. exit_code is 128 + signal if one ended it."""

    exit_code: int
    signal: int | None
    timed_out: bool
    oom_killed: bool
    truncated: bool
    stdout: str
    stderr: str
    duration: float


class FileAnswer(_Answer):
    """A file, folder or link. `path` can be put behind `/files` whatever bytes the name has; `name` is for people."""

    name: str
    path: str
    type: Literal["file", "folder", "link", "other"]
    size: int
    mode: str
    mtime: str | None
    etag: str
    target: str | None


class FileList(_Answer):
    """What a folder holds."""

    items: list[FileAnswer]
    next: str | None
    truncated: bool


class TeamAnswer(_Answer):
    """A team."""

    id: str
    owner: str
    network: str
    network_id: str | None
    subnet: str
    created_at: str
    agents: int


class TeamList(_Answer):
    """Teams."""

    items: list[TeamAnswer]
    next: str | None


class TeamDeleted(_Answer):
    """A deleted team and the ids of the agents that went with it."""

    id: str
    removed_agents: list[str]


class InfoAnswer(_Answer):
    """The daemon: version, backend and its guarantees, what is degraded and why."""

    version: str
    instance: str
    backend: str
    engine: dict[str, Any]
    guarantees: dict[str, GuaranteeAnswer]
    degraded: list[dict[str, str]]
    network: dict[str, Any]


class MessageAnswer(_Answer):
    """What became of a message so far; docs/messages.md says what each state means."""

    id: str
    state: Literal["delivered", "queued", "sent", "unacknowledged", "expired", "dropped"]


class UseAnswer(_Answer):
    """What is used of something, and the most of it; None: not known, no limit. Bytes, seconds, cores or counts."""

    used: float | None
    limit: float | None


class ProgressAnswer(_Answer):
    """How far an agent says it is; fraction is 0 to 1, elapsed seconds."""

    text: str | None
    fraction: float | None
    elapsed: float | None
    at: str | None


class StatsAnswer(_Answer):
    """What a running agent uses."""

    agent: str
    name: str
    team: str
    state: str
    started_at: str | None
    at: str
    cpu: UseAnswer
    memory: UseAnswer
    pids: UseAnswer
    disk: UseAnswer
    shm: UseAnswer
    nofile: UseAnswer
    network: UseAnswer
    wall: UseAnswer
    ttl: UseAnswer
    progress: ProgressAnswer | None


class StatsList(_Answer):
    """What running agents use. `truncated`: there are more, which were left out."""

    items: list[StatsAnswer]
    next: str | None
    truncated: bool


class ItemList(_Answer):
    """A list of objects."""

    items: list[dict[str, Any]]
    next: str | None


class Verified(_Answer):
    """Whether the audit log is whole."""

    ok: bool
    entries: int
    head: str
    problem: str | None


class Health(_Answer):
    """Alive or ready."""

    status: str | None = Field(None)
    ready: bool | None = Field(None)
