"""An agent: one running box and its record."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from isolator.model.box import BoxSpec

State = Literal["creating", "running", "exited", "stopping", "removed", "lost"]
Reason = Literal["exited", "killed", "oom", "wall", "ttl", "lost"]


def timestamp(moment: float | None) -> str | None:
    """RFC 3339 in UTC with microseconds, or None."""
    if moment is None:
        return None
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Exit:
    """How an agent ended: exit code, signal number that ended its command (or None), and why."""

    code: int | None
    signal: int | None
    reason: Reason
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Agent:
    """One agent's record, as the store holds it. Times are Unix seconds."""

    id: str
    spec: BoxSpec
    state: State
    created_at: float
    backend: str
    spec_digest: str
    started_at: float | None = None
    finished_at: float | None = None
    expires_at: float | None = None
    wall_deadline: float | None = None
    container_id: str | None = None
    pid: int | None = None
    exit: Exit | None = None
    receipt: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: tuple[dict[str, str], ...] = ()
    warm: bool = False
    box_digest: str | None = None
    """Of a warm agent: the digest of the spec its box was made by, before it was this agent's."""

    def changed(self, **changes: Any) -> Agent:
        """A copy with these fields changed."""
        return replace(self, **changes)

    def answer(self) -> dict[str, Any]:
        """The agent in JSON, as the API shows it."""
        spec = self.spec
        return {
            "id": self.id,
            "name": spec.name,
            "team": spec.team,
            "owner": spec.owner,
            "session": spec.session,
            "parent": spec.parent,
            "backend": self.backend,
            "image": spec.image,
            "image_digest": spec.image_digest,
            "command": list(spec.command),
            "state": self.state,
            "network": spec.network,
            "uid": spec.uid,
            "gid": spec.gid,
            "limits": {
                "cpus": spec.limits.cpus,
                "memory": spec.limits.memory,
                "pids": spec.limits.pids,
                "disk": spec.limits.disk,
                "nofile": spec.limits.nofile,
                "wall": spec.limits.wall,
            },
            "mounts": [
                {"source": m.source, "target": m.target, "mode": "ro" if m.read_only else "rw"} for m in spec.mounts
            ],
            "secrets": [{"name": s.name, "as": s.delivery} for s in spec.secrets],
            "spec_digest": self.spec_digest,
            "created_at": timestamp(self.created_at),
            "started_at": timestamp(self.started_at),
            "finished_at": timestamp(self.finished_at),
            "expires_at": timestamp(self.expires_at),
            "exit": None
            if self.exit is None
            else {
                "code": self.exit.code,
                "signal": self.exit.signal,
                "reason": self.exit.reason,
                "detail": self.exit.detail,
            },
            "container_id": self.container_id,
            "pid": self.pid,
            "warm": self.warm,
            "warnings": list(self.warnings),
            "receipt": self.receipt,
        }
