"""Agents' own reports of progress: the latest is kept, and told as an event at most twice a second an agent.

A report is told at once or when its agent's turn comes again; what is superseded meanwhile is not told, the last one
always is. One task for all agents, and none while nothing waits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import pydantic

from isolator.messages.envelope import explain
from isolator.model.errors import IsolatorError
from isolator.model.message import ProgressReport

_log = logging.getLogger(__name__)
_PAUSE = 0.5


class Peer(Protocol):
    """An agent, as far as messages go."""

    @property
    def id(self) -> str:
        """Its id."""

    @property
    def name(self) -> str:
        """Its name in its team."""

    @property
    def team(self) -> str:
        """Its team."""

    @property
    def owner(self) -> str:
        """Whose it is."""

    @property
    def running(self) -> bool:
        """Whether it is there to receive."""

    def touch(self) -> None:
        """It is made use of: it is not idle."""


Tell = Callable[[Peer, dict[str, Any]], Awaitable[object]]


class ProgressDesk:
    """Takes reports."""

    def __init__(self, keep: Callable[[str, dict[str, Any]], None], tell: Tell) -> None:
        """`keep(agent, report)` is called for each; `tell(agent, report)` publishes, at most twice a second each."""
        self._keep = keep
        self._tell = tell
        self._waiting: dict[str, tuple[Peer, dict[str, Any]]] = {}
        self._told: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    def report(self, peer: Peer, body: Any) -> None:
        """One report. Raises BadRequest: `invalid_request`, `unknown_field`."""
        try:
            report = ProgressReport.model_validate(body).model_dump(exclude_none=True)
        except pydantic.ValidationError as error:
            raise explain(error) from error
        self._keep(peer.id, report)
        self._waiting[peer.id] = (peer, report)
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Tell what waits, now."""
        self._told.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for agent in list(self._waiting):
            await self._publish(agent)

    async def _run(self) -> None:
        try:
            while self._waiting or self._told:
                now = time.monotonic()
                self._told = {agent: at for agent, at in self._told.items() if now - at < _PAUSE}
                for agent in [agent for agent in self._waiting if agent not in self._told]:
                    await self._publish(agent)
                if self._told:
                    await asyncio.sleep(max(0.01, min(self._told.values()) + _PAUSE - time.monotonic()))
        finally:
            self._task = None

    async def _publish(self, agent: str) -> None:
        peer, report = self._waiting.pop(agent)
        self._told[agent] = time.monotonic()
        try:
            await self._tell(peer, report)
        except IsolatorError as error:
            _log.warning("progress of agent %s could not be told: %s", agent, error)
