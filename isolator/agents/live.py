"""What the daemon holds in memory of an agent that is not yet removed: its record, its channel, how it ended."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from isolator.agents.channel import Channel
from isolator.host.usage import Usage
from isolator.model.agent import Agent, Reason
from isolator.model.box import BoxSpec


@dataclass(frozen=True, slots=True)
class Report:
    """What the guest said about the end, and how often the kernel had killed for memory by then."""

    code: int
    signal: int
    oom_kills: int


def weight_of(spec: BoxSpec) -> int:
    """Bytes of memory that a spec's texts of free size take; a wide character makes all of its text wide."""
    texts = [*spec.command]
    for pair in spec.environment:
        texts.extend(pair)
    for mount in spec.mounts:
        texts += (str(mount.source), str(mount.target))
    return sum(sys.getsizeof(text) for text in texts)


@dataclass(slots=True)
class LiveAgent:
    """One agent. `cause` is why we ended it, if we did; `lock` orders spawn, stop, finish and cleanup.

    `progress` is what it said last about how far it is, or None; `usage` and `usage_before` are the last two readings
    of what it uses, if anybody has asked.
    """

    record: Agent
    channel: Channel | None = None
    report: Report | None = None
    cause: Reason | None = None
    detail: str | None = None
    touched_at: float = field(default_factory=time.time)
    cpu_seconds: float = 0.0
    acknowledging: bool = False
    looking: bool = False
    progress: dict[str, Any] | None = None
    usage: Usage | None = None
    usage_before: Usage | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    reported: asyncio.Event = field(default_factory=asyncio.Event)
    weight: int = field(init=False)

    def __post_init__(self) -> None:
        """Weighs the spec, which never changes."""
        self.weight = weight_of(self.record.spec)

    # what others are to know of it to send it messages

    @property
    def id(self) -> str:
        """Its id."""
        return self.record.id

    @property
    def name(self) -> str:
        """Its name in its team."""
        return self.record.spec.name

    @property
    def team(self) -> str:
        """Its team."""
        return self.record.spec.team

    @property
    def owner(self) -> str:
        """Whose it is."""
        return self.record.spec.owner

    @property
    def running(self) -> bool:
        """Whether it is there to receive."""
        return self.record.state == "running"

    def touch(self) -> None:
        """Somebody used it: its idle time starts anew."""
        self.touched_at = time.time()
