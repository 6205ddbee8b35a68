"""What the daemon answers, typed. Members a newer daemon adds are kept in `raw` and otherwise ignored.

Every type is read with `from_answer`; a member that is missing gets its empty value, so that an older daemon
does not break a newer client either. Times stay the RFC 3339 texts they were sent as.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

LIVE_STATES: Final = frozenset({"creating", "running", "stopping"})


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _records(value: Any) -> tuple[dict[str, Any], ...]:
    return tuple(item for item in value if isinstance(item, dict)) if isinstance(value, list) else ()


@dataclass(frozen=True, slots=True)
class Exit:
    """How an agent ended.

    code: exit code of its command, or None; signal: number of the signal that ended it, or None;
    reason: exited, killed, oom, wall, ttl or lost; detail: a sentence, or None.
    """

    code: int | None
    signal: int | None
    reason: str
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Guarantee:
    """One promise about a box: whether it is held, and by what."""

    held: bool
    how: str


def _guarantees(value: Any) -> dict[str, Guarantee]:
    return {
        name: Guarantee(bool(item.get("held")), str(item.get("how", "")))
        for name, item in _mapping(value).items()
        if isinstance(item, dict)
    }


@dataclass(frozen=True, slots=True)
class Agent:
    """One agent.

    limits: cpus, memory, pids, disk, nofile, wall (bytes, seconds); pid: its first process on the host.
    """

    id: str
    name: str
    team: str
    owner: str
    state: str
    image: str
    image_digest: str
    command: tuple[str, ...]
    network: str
    created_at: str
    started_at: str | None
    finished_at: str | None
    expires_at: str | None
    session: str | None
    parent: str | None
    backend: str
    container_id: str | None
    pid: int | None
    exit: Exit | None
    limits: dict[str, Any] = field(compare=False)
    mounts: tuple[dict[str, Any], ...] = field(compare=False)
    warnings: tuple[dict[str, Any], ...] = field(compare=False)
    receipt: dict[str, Guarantee] = field(compare=False)
    raw: dict[str, Any] = field(compare=False, repr=False)

    @property
    def live(self) -> bool:
        """Whether it may still run."""
        return self.state in LIVE_STATES

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> Agent:
        """The agent a JSON object tells."""
        ended = answer.get("exit")
        return cls(
            id=str(answer.get("id", "")),
            name=str(answer.get("name") or ""),
            team=str(answer.get("team") or ""),
            owner=str(answer.get("owner") or ""),
            state=str(answer.get("state") or ""),
            image=str(answer.get("image") or ""),
            image_digest=str(answer.get("image_digest") or ""),
            command=tuple(str(part) for part in answer.get("command") or ()),
            network=str(answer.get("network") or ""),
            created_at=str(answer.get("created_at") or ""),
            started_at=answer.get("started_at"),
            finished_at=answer.get("finished_at"),
            expires_at=answer.get("expires_at"),
            session=answer.get("session"),
            parent=answer.get("parent"),
            backend=str(answer.get("backend") or ""),
            container_id=answer.get("container_id"),
            pid=answer.get("pid"),
            exit=None
            if not isinstance(ended, dict)
            else Exit(
                ended.get("code"),
                ended.get("signal"),
                str(ended.get("reason") or "exited"),
                ended.get("detail"),
            ),
            limits=_mapping(answer.get("limits")),
            mounts=_records(answer.get("mounts")),
            warnings=_records(answer.get("warnings")),
            receipt=_guarantees(answer.get("receipt")),
            raw=dict(answer),
        )


@dataclass(frozen=True, slots=True)
class Team:
    """One team. `agents` is what the daemon said of them: a number, or a list."""

    id: str
    owner: str
    network: str
    network_id: str | None
    subnet: str
    created_at: str
    agents: Any = field(compare=False)
    raw: dict[str, Any] = field(compare=False, repr=False)

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> Team:
        """The team a JSON object tells."""
        return cls(
            id=str(answer.get("id", "")),
            owner=str(answer.get("owner") or ""),
            network=str(answer.get("network") or ""),
            network_id=answer.get("network_id"),
            subnet=str(answer.get("subnet") or ""),
            created_at=str(answer.get("created_at") or ""),
            agents=answer.get("agents"),
            raw=dict(answer),
        )


@dataclass(frozen=True, slots=True)
class Image:
    """One pinned image, and whether the engine has it."""

    name: str
    digest: str
    present: bool
    raw: dict[str, Any] = field(compare=False, repr=False)

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> Image:
        """The image a JSON object tells."""
        return cls(
            name=str(answer.get("name", "")),
            digest=str(answer.get("digest") or ""),
            present=bool(answer.get("present")),
            raw=dict(answer),
        )


@dataclass(frozen=True, slots=True)
class PoolBox:
    """A box that waits for an agent, which will have its id. profile: what else it must be to get this one."""

    id: str
    team: str
    profile: str
    image: str
    created_at: str
    container_id: str
    raw: dict[str, Any] = field(compare=False, repr=False)

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> PoolBox:
        """The box a JSON object tells."""
        names = ("id", "team", "profile", "image", "created_at", "container_id")
        return cls(**{name: str(answer.get(name) or "") for name in names}, raw=dict(answer))


@dataclass(frozen=True, slots=True)
class Info:
    """What the daemon says of itself.

    engine: version, api_version, components (name, version), kernel;
    network: status, checked_at, checks, reason;
    caller: uid, owner, admin; limits: defaults, most; counts: agents, teams.
    """

    version: str
    instance: str
    backend: str
    engine: dict[str, Any]
    guarantees: dict[str, Guarantee]
    degraded: tuple[dict[str, Any], ...]
    network: dict[str, Any]
    images: tuple[Image, ...]
    caller: dict[str, Any]
    limits: dict[str, Any]
    counts: dict[str, Any]
    raw: dict[str, Any] = field(compare=False, repr=False)

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> Info:
        """The daemon a JSON object tells."""
        return cls(
            version=str(answer.get("version", "")),
            instance=str(answer.get("instance") or ""),
            backend=str(answer.get("backend") or ""),
            engine=_mapping(answer.get("engine")),
            guarantees=_guarantees(answer.get("guarantees")),
            degraded=_records(answer.get("degraded")),
            network=_mapping(answer.get("network")),
            images=tuple(Image.from_answer(item) for item in _records(answer.get("images"))),
            caller=_mapping(answer.get("caller")),
            limits=_mapping(answer.get("limits")),
            counts=_mapping(answer.get("counts")),
            raw=dict(answer),
        )


@dataclass(frozen=True, slots=True)
class Event:
    """One event. `id` grows with every event of a daemon; other owners' are not told, so ids have gaps."""

    id: int
    time: str
    type: str
    team: str | None
    agent: str | None
    data: dict[str, Any]
    raw: dict[str, Any] = field(compare=False, repr=False)

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any], identifier: int = 0, name: str = "") -> Event:
        """The event a JSON object tells; id and name as the stream had them where the object lacks them."""
        number = answer.get("id")
        return cls(
            id=number if isinstance(number, int) else identifier,
            time=str(answer.get("time") or ""),
            type=str(answer.get("type") or name),
            team=answer.get("team"),
            agent=answer.get("agent"),
            data=_mapping(answer.get("data")),
            raw=dict(answer),
        )


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One line of the audit log."""

    sequence: int
    time: str
    act: str
    actor: str | None
    raw: dict[str, Any] = field(compare=False, repr=False)

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> AuditEntry:
        """The entry a JSON object tells."""
        number = answer.get("seq")
        return cls(
            sequence=number if isinstance(number, int) else 0,
            time=str(answer.get("time") or ""),
            act=str(answer.get("act") or ""),
            actor=answer.get("actor"),
            raw=dict(answer),
        )


@dataclass(frozen=True, slots=True)
class AuditState:
    """Whether the audit log is whole: entries, hash of the last, and the first flaw, if any."""

    ok: bool
    entries: int
    head: str
    problem: str | None
    raw: dict[str, Any] = field(compare=False, repr=False)

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> AuditState:
        """The state a JSON object tells; what does not say `ok` is not ok."""
        return cls(
            ok=answer.get("ok") is True,
            entries=int(answer.get("entries") or 0),
            head=str(answer.get("head") or ""),
            problem=answer.get("problem"),
            raw=dict(answer),
        )


NetworkMode = Literal["team", "none"]
