"""Events: stored first, then told. A reader follows the store, so a slow one misses nothing and holds up nobody."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from isolator.model.event import PROGRESS, Event
from isolator.store.store import Store

_log = logging.getLogger(__name__)
_PAGE = 200


class EventHub:
    """Publishes and follows."""

    def __init__(self, store: Store) -> None:
        """Events live in `store`."""
        self._store = store
        self._news = asyncio.Event()

    async def publish(
        self,
        kind: str,
        *,
        owner: str | None = None,
        team: str | None = None,
        agent: str | None = None,
        **data: Any,
    ) -> Event:
        """Store and tell one event; `data` must be JSON and hold no secret."""
        event = await self._store.add_event(kind, owner, team, agent, data)
        self.tell(event)
        return event

    def tell(self, event: Event) -> None:
        """Tell of an event that is stored."""
        level = logging.DEBUG if event.type == PROGRESS else logging.INFO  # a box must not fill the log
        _log.log(level, "%s team=%s agent=%s %s", event.type, event.team, event.agent, event.data)
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def last(self) -> int:
        """The id of the newest event."""
        return await self._store.last_event()

    async def after(self, number: int, *, follow: bool) -> AsyncIterator[Event | None]:
        """Events with a greater id; with `follow`, None each 15 s without news, for keep-alives."""
        while True:
            news = self._news
            page = await self._store.events_after(number, _PAGE)
            for event in page:
                number = event.id
                yield event
            if page:
                continue
            if not follow:
                return
            try:
                await asyncio.wait_for(news.wait(), 15)
            except TimeoutError:
                yield None
