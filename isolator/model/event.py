"""What happened, told to whoever watches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from isolator.model.agent import timestamp

# What an agent says of itself, as often as it likes: the one type of events whose number a box decides.
PROGRESS = "agent.progress"


@dataclass(frozen=True, slots=True)
class Event:
    """One event. `id` grows by one for each event of this daemon's state folder and never repeats."""

    id: int
    at: float
    type: str
    owner: str | None
    team: str | None = None
    agent: str | None = None
    data: dict[str, Any] = field(default_factory=dict)

    def answer(self) -> dict[str, Any]:
        """The event in JSON."""
        return {
            "id": self.id,
            "time": timestamp(self.at),
            "type": self.type,
            "team": self.team,
            "agent": self.agent,
            "data": self.data,
        }
