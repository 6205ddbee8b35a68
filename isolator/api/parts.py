"""What the routes work with: the daemon's parts, handed over once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from isolator.agents.events import EventHub
from isolator.agents.lifecycle import Lifecycle
from isolator.agents.pool import Pool
from isolator.agents.spawner import Spawner
from isolator.agents.stats import Stats
from isolator.agents.teams import Teams
from isolator.api.metrics import Metrics
from isolator.audit.log import AuditLog
from isolator.audit.reading import LogReader
from isolator.backends.base import Backend, Guarantees, ImageResolver
from isolator.execs.service import Execs
from isolator.files.service import Files
from isolator.messages.router import Router
from isolator.network.selftest import NetworkProof
from isolator.settings import Settings
from isolator.store.store import Store


@dataclass(frozen=True)
class Parts:
    """The daemon's parts. `engine_up` and `engine_facts` tell of the engine; `followers` bounds streams.

    `searches` and `verifications` read the audit log: apart, because only admins verify, and whoever searches must
    not keep them from it.
    """

    settings: Settings
    store: Store
    audit: AuditLog
    events: EventHub
    backend: Backend
    teams: Teams
    images: ImageResolver
    lifecycle: Lifecycle
    spawner: Spawner
    execs: Execs
    pool: Pool
    messages: Router
    files: Files
    stats: Stats
    proof: NetworkProof
    metrics: Metrics
    guarantees: Callable[[], Guarantees]
    engine_up: Callable[[], bool]
    engine_facts: Callable[[], Awaitable[dict[str, Any]]]
    degraded: Callable[[], list[dict[str, str]]]
    stopping: asyncio.Event
    followers: asyncio.Semaphore
    searches: LogReader = field(default_factory=LogReader)
    verifications: LogReader = field(default_factory=LogReader)
    started_at: float = field(default_factory=time.time)


PARTS: web.AppKey[Parts] = web.AppKey("parts", Parts)
