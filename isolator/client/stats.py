"""What running agents use, typed; the daemon's own words are in `raw`, as with the other answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

USES: Final = ("cpu", "memory", "pids", "disk", "shm", "nofile", "network", "wall", "ttl")


@dataclass(frozen=True, slots=True)
class Use:
    """Of one thing: what is used, and the most of it. None: the daemon does not know; there is no limit.

    left: of times, seconds until the end, or None.
    """

    used: float | None
    limit: float | None
    left: float | None
    raw: dict[str, Any] = field(compare=False, repr=False)

    @property
    def share(self) -> float | None:
        """Used of the limit, 1.0 for all of it; None where there is no such figure."""
        return None if self.used is None or not self.limit else self.used / self.limit

    @classmethod
    def from_answer(cls, answer: Any) -> Use:
        """The use a JSON object tells."""
        told = answer if isinstance(answer, dict) else {}
        used, limit, left = (_number(told.get(name)) for name in ("used", "limit", "left"))
        return cls(used, limit, left, told)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an agent said it was: a text, a fraction from 0 to 1, seconds it took so far, and when it said so."""

    text: str | None
    fraction: float | None
    elapsed: float | None
    at: str | None

    @classmethod
    def from_answer(cls, answer: Any) -> Progress | None:
        """The progress a JSON object tells, an event's data too; None if it is none."""
        if not isinstance(answer, dict):
            return None
        text, at = answer.get("text"), answer.get("at")
        return cls(
            text=text if isinstance(text, str) else None,
            fraction=_number(answer.get("fraction")),
            elapsed=_number(answer.get("elapsed")),
            at=at if isinstance(at, str) else None,
        )


@dataclass(frozen=True, slots=True)
class AgentStats:
    """What one agent uses. `uses` by name, see `USES`: cores, bytes, counts, seconds."""

    agent: str
    name: str
    team: str
    state: str
    started_at: str | None
    at: str
    uses: dict[str, Use]
    progress: Progress | None
    raw: dict[str, Any] = field(compare=False, repr=False)

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> AgentStats:
        """The figures a JSON object tells."""
        return cls(
            agent=str(answer.get("agent") or ""),
            name=str(answer.get("name") or ""),
            team=str(answer.get("team") or ""),
            state=str(answer.get("state") or ""),
            started_at=answer.get("started_at"),
            at=str(answer.get("at") or ""),
            uses={name: Use.from_answer(answer.get(name)) for name in USES},
            progress=Progress.from_answer(answer.get("progress")),
            raw=dict(answer),
        )


@dataclass(frozen=True, slots=True)
class AllStats:
    """What all running agents use that you may see; `truncated`: there are more."""

    items: tuple[AgentStats, ...]
    truncated: bool
    raw: dict[str, Any] = field(compare=False, repr=False)

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> AllStats:
        """The figures a JSON object tells."""
        items = answer.get("items")
        return cls(
            items=tuple(AgentStats.from_answer(item) for item in items or () if isinstance(item, dict)),
            truncated=answer.get("truncated") is True,
            raw=dict(answer),
        )


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
