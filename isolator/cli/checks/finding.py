"""One thing `doctor` found, and what all its checks look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from isolator.client import Info
    from isolator.settings import Settings

Level = Literal["ok", "weak", "broken"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, how it is, what that means, and what to do (None: nothing)."""

    name: str
    level: Level
    meaning: str
    action: str | None = None

    def answer(self) -> dict[str, Any]:
        """In JSON."""
        return {"name": self.name, "level": self.level, "meaning": self.meaning, "action": self.action}


@dataclass(frozen=True, slots=True)
class Facts:
    """What was asked once for all checks: settings, the running daemon's info, the engine's version and info.

    Each is None where it could not be had; a finding of its own says why.
    """

    settings: Settings
    daemon: Info | None
    version: dict[str, Any] | None
    engine: dict[str, Any] | None
