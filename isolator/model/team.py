"""A team: agents that share one network and one owner."""

from __future__ import annotations

from dataclasses import dataclass


def network_name(team: str) -> str:
    """The team's bridge network, as `docker network ls` shows it."""
    return f"openclaw-team-{team}"


@dataclass(frozen=True, slots=True)
class Team:
    """One team. `subnet` is its piece of the pool in CIDR form; `created_at` is Unix time in seconds."""

    id: str
    owner: str
    subnet: str
    created_at: float
    network_id: str | None = None
