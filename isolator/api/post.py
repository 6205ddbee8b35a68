"""The parts of messages, put together: the router, the agents' own sockets, and who is told of what becomes of it."""

from __future__ import annotations

import time
from typing import Any

from isolator.agents.events import EventHub
from isolator.agents.lifecycle import Lifecycle
from isolator.api.inside import InsideServer
from isolator.messages.envelope import Bounds
from isolator.messages.progress import Peer, ProgressDesk
from isolator.messages.router import Router
from isolator.messages.visitors import Visitors
from isolator.model.agent import timestamp
from isolator.model.event import PROGRESS
from isolator.settings import Settings
from isolator.store.store import Store


def bounds_of(settings: Settings) -> Bounds:
    """The bounds of messages that the operator set."""
    return Bounds(
        message=settings.max_message,
        mailbox_messages=settings.mailbox_messages,
        mailbox_bytes=settings.mailbox_bytes,
        kept_bytes=settings.mail_bytes,
        rate=settings.message_rate,
        ttl=settings.message_ttl,
        patience=settings.request_timeout,
    )


class Post:
    """All of it. `open` before the agents of an earlier daemon are held again."""

    def __init__(self, settings: Settings, store: Store, events: EventHub, lifecycle: Lifecycle) -> None:
        """Serves the visitors of `lifecycle`'s agents from now on, and hears of their ends."""
        self._store = store
        self._events = events
        self._lifecycle = lifecycle
        desk = ProgressDesk(self._keep_progress, self._tell_progress)
        self.router = Router(store.mail, bounds_of(settings), lifecycle, desk, self._tell_dropped)
        self._inside = InsideServer(self.router, lifecycle.find)
        self._visitors = Visitors(self.router, self._inside)
        lifecycle.hearing.on_visitor = self._visitors.take
        lifecycle.hearing.on_ended = self._agent_ended
        lifecycle.hearing.on_removed = self._agent_removed

    async def open(self) -> None:
        """Find what is kept."""
        await self._inside.start()
        await self.router.load()

    async def close(self) -> None:
        """Part from everybody; what is kept stays."""
        self._visitors.close()
        await self._inside.stop()
        await self.router.close()

    def _agent_ended(self, agent: str) -> None:
        self._visitors.close_agent(agent)
        self.router.agent_ended(agent)

    def _agent_removed(self, agent: str) -> None:
        self._visitors.close_agent(agent)
        self.router.agent_removed(agent)

    def _keep_progress(self, agent: str, report: dict[str, Any]) -> None:
        live = self._lifecycle.find(agent)
        if live is not None:
            live.progress = {**report, "at": timestamp(time.time())}

    async def _tell_progress(self, peer: Peer, report: dict[str, Any]) -> None:
        await self._events.publish(PROGRESS, owner=peer.owner, team=peer.team, agent=peer.id, name=peer.name, **report)

    async def _tell_dropped(self, agent: str, side: str, count: int) -> None:
        record = await self._store.agent(agent)
        if record is not None:
            spec = record.spec
            await self._events.publish(
                "messages.dropped", owner=spec.owner, team=spec.team, agent=agent, name=spec.name, to=side, count=count
            )
