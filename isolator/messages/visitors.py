"""Visitors of an agent's socket: any process of its box that connects, in any language.

Who it is was decided by the kernel before it came here; nothing it says changes that. It speaks lines of JSON if the
first byte is `{`, else HTTP. All of it is hostile input: visitors are counted, what they send is bounded, paced and
timed, and one that does not read what it is sent costs a bounded buffer and nobody else's time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import Protocol

from isolator.messages.lines import Lines
from isolator.messages.rate import Bucket
from isolator.messages.router import Router

_log = logging.getLogger(__name__)
MOST_VISITORS = 16
# Whoever does not read what is left for them when they are hung up on, loses it after this.
_LINGER = 1.0


class Http(Protocol):
    """Speaks HTTP."""

    def protocol(self, agent: str, bucket: Bucket) -> asyncio.Protocol:
        """What speaks it with one visitor."""

    def forget(self, protocol: asyncio.Protocol) -> None:
        """The visitor is gone; what was never its own is fine."""


class Visitors:
    """The visitors of all agents."""

    def __init__(self, router: Router, http: Http) -> None:
        """Nobody visits yet."""
        self._router = router
        self._http = http
        self._visitors: dict[str, set[Visitor]] = {}
        # Kept until the agent ends: who hangs up and calls again does not start afresh.
        self._buckets: dict[str, Bucket] = {}
        self._greetings: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def take(self, agent_id: str, connection: socket.socket) -> None:
        """Serve a connection of this agent; it must not block. One too many is closed at once."""
        if self._is_closed or len(self._visitors.get(agent_id, ())) >= MOST_VISITORS:
            connection.close()
            return
        bucket = self._buckets.get(agent_id)
        if bucket is None:
            bucket = self._buckets[agent_id] = Bucket(self._router.bounds.rate)
        visitor = Visitor(agent_id, bucket, self._router, self._http, self._left)
        self._visitors.setdefault(agent_id, set()).add(visitor)
        task = asyncio.create_task(self._greet(visitor, connection))
        self._greetings.add(task)
        task.add_done_callback(self._greetings.discard)

    async def _greet(self, visitor: Visitor, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: visitor, connection)
        except OSError as error:
            _log.debug("a visitor of agent %s was gone at once: %s", visitor.agent, error)
            connection.close()
            self._left(visitor)

    def _left(self, visitor: Visitor) -> None:
        visitors = self._visitors.get(visitor.agent)
        if visitors is not None:
            visitors.discard(visitor)
            if not visitors:
                del self._visitors[visitor.agent]

    def close_agent(self, agent_id: str) -> None:
        """Hang up on all of an agent's visitors: it has ended."""
        self._buckets.pop(agent_id, None)
        for visitor in list(self._visitors.get(agent_id, ())):
            visitor.abort()

    def close(self) -> None:
        """Hang up on everybody, for good."""
        self._is_closed = True
        for agent_id in list(self._visitors):
            self.close_agent(agent_id)


class Visitor(asyncio.Protocol):
    """One connection: waits for its first byte, then lets the tongue it chose speak."""

    def __init__(self, agent: str, bucket: Bucket, router: Router, http: Http, left: Callable[[Visitor], None]) -> None:
        """`left(visitor)` is called once, when the connection has ended."""
        self.agent = agent
        self._bucket = bucket
        self._router = router
        self._http = http
        self._left = left
        self._transport: asyncio.Transport | None = None
        self._inner: asyncio.Protocol | None = None
        self._silence: asyncio.TimerHandle | None = None
        self._is_aborted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first byte, not for ever."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if self._is_aborted:
            transport.abort()
            return
        self._silence = asyncio.get_running_loop().call_later(self._router.bounds.patience, self.hang_up)

    def data_received(self, data: bytes) -> None:
        """Choose the tongue once, then pass on."""
        if self._inner is None:
            assert self._transport is not None
            if self._silence is not None:
                self._silence.cancel()
            if data.startswith(b"{"):
                self._inner = Lines(self.agent, self._bucket, self._router, self.hang_up)
            else:
                self._inner = self._http.protocol(self.agent, self._bucket)
            self._inner.connection_made(self._transport)
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        """True keeps the connection open for answers."""
        return None if self._inner is None else self._inner.eof_received()

    def pause_writing(self) -> None:
        """The visitor does not read."""
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        """It reads again."""
        if self._inner is not None:
            self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        if self._silence is not None:
            self._silence.cancel()
        if self._inner is not None:
            self._inner.connection_lost(exc)
            self._http.forget(self._inner)
        self._left(self)

    def hang_up(self) -> None:
        """End it when what was written is read, or soon."""
        if self._transport is not None and not self._transport.is_closing():
            with contextlib.suppress(OSError):
                self._transport.close()
            asyncio.get_running_loop().call_later(_LINGER, self._transport.abort)

    def abort(self) -> None:
        """End it now."""
        self._is_aborted = True
        if self._transport is not None:
            self._transport.abort()
