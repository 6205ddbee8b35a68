"""Noticing that the engine stopped, came back, or lost a container, without asking all the time.

The engine's event stream is the watch: while it stands the engine lives, and what happens to our containers from
outside arrives on it. When it breaks, the engine is knocked at with growing pauses until it answers again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import docker
import tenacity

from isolator.backends.docker.engine import Engine
from isolator.backends.docker.streams import iterate
from isolator.model.errors import IsolatorError, Unavailable

_log = logging.getLogger(__name__)
_ENDINGS = ("die", "destroy")
_PAUSE_MOST = 5.0
_ASK_EVERY = 10.0


class EngineWatch:
    """Watches one engine. `up` tells whether it answered last."""

    def __init__(
        self,
        engine: Engine,
        instance: str,
        *,
        on_up: Callable[[], Awaitable[None]],
        on_down: Callable[[], Awaitable[None]],
        on_ending: Callable[[str], None],
    ) -> None:
        """`on_ending(agent id)` when one of this instance's containers died or vanished; it must not wait."""
        self._engine = engine
        self._instance = instance
        self._on_up = on_up
        self._on_down = on_down
        self._on_ending = on_ending
        self.up = False

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._until_it_answers()
            self.up = True
            watching = asyncio.create_task(self._follow())
            try:
                await self._on_up()
                await self._until_it_fails(watching)
            finally:
                watching.cancel()
            self.up = False
            await self._on_down()

    async def _until_it_answers(self) -> None:
        retrying = tenacity.AsyncRetrying(
            wait=tenacity.wait_exponential(multiplier=0.1, max=_PAUSE_MOST),
            retry=tenacity.retry_if_exception_type(IsolatorError),
        )
        async for attempt in retrying:
            with attempt:
                if not await self._engine.ping():
                    raise Unavailable("engine_unavailable", "The engine does not answer.")

    async def _until_it_fails(self, watching: asyncio.Task[None]) -> None:
        """An engine that hangs keeps its streams open: so it is asked now and then."""
        while not watching.done():
            await asyncio.wait({watching}, timeout=_ASK_EVERY)
            if not watching.done() and not await self._engine.ping():
                return
        watching.result()

    async def _follow(self) -> None:
        try:
            async for event in iterate(lambda: _EventStream(self._engine, self._instance)):
                agent = (event.get("Actor", {}).get("Attributes") or {}).get("openclaw.agent", "")
                if agent:
                    self._on_ending(agent)
        except IsolatorError as error:
            _log.warning("the engine's event stream ended: %s", error)


class _EventStream:
    """Container endings of one instance, on a connection of their own."""

    def __init__(self, engine: Engine, instance: str) -> None:
        self._client: docker.APIClient = engine.connect()
        self._stream = self._client.events(
            decode=True,
            filters={"type": "container", "event": list(_ENDINGS), "label": f"isolator.instance={instance}"},
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self._stream

    def close(self) -> None:
        self._stream.close()
        self._client.close()
