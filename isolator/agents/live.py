"""What the daemon holds in memory of an agent that is not yet removed: its record, its channel, how it ended."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from isolator.agents.channel import Channel
from isolator.model.agent import Agent, Reason


@dataclass(frozen=True, slots=True)
class Report:
    """What the guest said about the end, and how often the kernel had killed for memory by then."""

    code: int
    signal: int
    oom_kills: int


@dataclass(slots=True)
class LiveAgent:
    """One agent. `cause` is why we ended it, if we did; `lock` orders spawn, stop, finish and cleanup."""

    record: Agent
    channel: Channel | None = None
    report: Report | None = None
    cause: Reason | None = None
    detail: str | None = None
    touched_at: float = field(default_factory=time.time)
    cpu_seconds: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    reported: asyncio.Event = field(default_factory=asyncio.Event)

    def touch(self) -> None:
        """Somebody used it: its idle time starts anew."""
        self.touched_at = time.time()
