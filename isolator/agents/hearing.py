"""What comes in at an agent's socket, and whom it concerns: the guest's reports its life, a visitor the messages."""

from __future__ import annotations

import socket
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from isolator.agents.builder import BoxBuilder
from isolator.agents.channel import Channel, Hello
from isolator.agents.deadlines import Deadlines
from isolator.agents.live import LiveAgent, Report
from isolator.host.cgroups import oom_kills
from isolator.model.agent import Reason

# How long a box may go on after its PID 1 has told the end; a guest of ours leaves when it hears that it was heard.
_LEAVE = 15.0


class Expire(Protocol):
    """How an agent is ended whose time is over."""

    def __call__(self, agent_id: str, cause: Reason, detail: str) -> Awaitable[None]:
        """End it."""


class Hearing:
    """Opens agents' channels and makes of what is heard there what it means."""

    def __init__(
        self,
        builder: BoxBuilder,
        deadlines: Deadlines,
        *,
        finish: Callable[[str], Coroutine[Any, Any, None]],
        expire: Expire,
        later: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:
        """`finish` looks whether an agent's box has ended; `later` runs a coroutine as a task."""
        self._builder = builder
        self._deadlines = deadlines
        self._finish = finish
        self._expire = expire
        self._later = later
        # Who serves the processes of a box that knock at its agent's socket; they own the connection.
        self.on_visitor: Callable[[str, socket.socket], None] | None = None
        # Told when an agent has ended, and when it is forgotten.
        self.on_ended: Callable[[str], None] = _unneeded
        self.on_removed: Callable[[str], None] = _unneeded

    def open(self, live: LiveAgent) -> Channel:
        """A new channel whose reports go to this agent."""
        folder = self._builder.folder(live.record.id)
        return self.attach(live, Channel(folder, on_exit=_unheard, on_lost=lambda: None))

    def attach(self, live: LiveAgent, channel: Channel) -> Channel:
        """A channel, which a box may have had before it was this agent's, reports to this agent from now on."""
        agent_id = live.record.id

        def on_hello(hello: Hello) -> None:
            live.record = live.record.changed(pid=hello.pid)

        def on_lost() -> None:
            # PID 1 of a foreign image may come and go as it likes: one look at a time.
            if not live.looking:
                live.looking = True
                self._later(self._look(live))

        def on_visitor(connection: socket.socket) -> None:
            if self.on_visitor is None:
                connection.close()
            else:
                self.on_visitor(agent_id, connection)

        live.channel = channel
        channel.tell(
            on_exit=lambda code, number: self._exited(live, code, number),
            on_lost=on_lost,
            on_hello=on_hello,
            on_visitor=on_visitor,
        )
        return channel

    async def _look(self, live: LiveAgent) -> None:
        try:
            await self._finish(live.record.id)
        finally:
            live.looking = False

    def _exited(self, live: LiveAgent, code: int, number: int) -> None:
        # PID 1 of a foreign image may say anything, as often as it likes: its first word counts.
        if live.report is None:
            agent_id, pid = live.record.id, live.record.pid
            live.report = Report(code, number, oom_kills(pid) if pid else 0)
            live.reported.set()
            overdue = time.time() + _LEAVE
            detail = "PID 1 told the end and stayed."
            self._deadlines.at(overdue, lambda: self._expire(agent_id, "killed", detail))
        if not live.acknowledging:
            live.acknowledging = True
            self._later(_acknowledge(live))


def _unheard(code: int, number: int) -> None:
    del code, number


def _unneeded(agent_id: str) -> None:
    del agent_id


async def _acknowledge(live: LiveAgent) -> None:
    try:
        if live.channel is not None:
            await live.channel.bye()
    finally:
        live.acknowledging = False
