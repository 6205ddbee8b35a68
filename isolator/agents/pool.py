"""Boxes made before their agents are known, so that a spawn finds one that runs.

A box on a shelf is built and checked as every box is; its guest waits for its release, and nothing of any agent is in
it. Shelves are of one profile (policy/blank.py): one team, one image, one set of limits. Which profiles there are is
learnt from spawns: the first of a kind is built cold, and its shelf is filled behind it. A box is taken once; what
becomes of it then, whatever goes wrong, it never comes back.

Shelves live as long as this daemon: what an earlier one left is removed by reconcile as what nobody was promised.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from isolator.agents.builder import BoxBuilder, BuiltBox
from isolator.agents.channel import Channel, create_folder
from isolator.cancellation import uninterrupted
from isolator.model.box import BoxSpec
from isolator.model.errors import BoxFailed
from isolator.model.names import new_agent_id
from isolator.policy.blank import Profile, profile_of
from isolator.settings import Settings

_log = logging.getLogger(__name__)
_PARALLEL = 2
# Whoever varies what they ask for makes a shelf each time.
MOST_SHELVES = 128
_PATIENCE = (2.0, 60.0)
_LOOK = 30.0
# A spawn that must be built is waited for: its caller waits too.
_BUSY = 0.05
_CLEARING = 20.0

Blank = Callable[[str], BoxSpec]
"""The blank's spec under this id. Raises ValueError: it would no longer be of its profile."""


@dataclass(frozen=True, slots=True)
class ReadyBox:
    """A box that waits for an agent, which will have its id. `made_at` is Unix time."""

    spec: BoxSpec
    box: BuiltBox
    channel: Channel
    made_at: float


@dataclass(slots=True)
class _Shelf:
    profile: Profile
    blank: Blank
    wanted_at: float
    ready: list[ReadyBox] = field(default_factory=list)
    filling: int = 0
    failures: int = 0
    not_before: float = 0.0

    @property
    def size(self) -> int:
        """Boxes of it that are there, or will be soon."""
        return len(self.ready) + self.filling


class Pool:
    """All shelves. `run` is the task that fills and clears them."""

    def __init__(
        self,
        settings: Settings,
        builder: BoxBuilder,
        is_open: Callable[[], bool],
        busy: Callable[[], bool],
    ) -> None:
        """`is_open`: boxes can be built now; `busy`: a spawn is being built, which goes first."""
        self._depth = settings.pool_depth
        self._budget = settings.pool_budget
        self._idle = settings.pool_idle
        self._builder = builder
        self._is_open = is_open
        self._busy = busy
        self._shelves: dict[Profile, _Shelf] = {}
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._taken: set[str] = set()
        # By the box's id: whose team's, and the task. A shelf may be dropped while its boxes are built.
        self._fillers: dict[str, tuple[str, asyncio.Task[None]]] = {}
        self._changed = asyncio.Event()
        self.claims = {"warm": 0, "cold": 0}

    @property
    def enabled(self) -> bool:
        """Whether anything is ever made ahead."""
        return self._depth > 0 and self._budget > 0

    def boxes(self) -> set[str]:
        """Ids of all boxes that are the pool's, or were taken and are not their agents' yet: nobody's orphans."""
        ids = {box.spec.agent for shelf in self._shelves.values() for box in shelf.ready}
        return ids | set(self._fillers) | set(self._leaving) | self._taken

    def overview(self) -> list[tuple[Profile, ReadyBox]]:
        """Every box that waits, the oldest of each shelf first."""
        return [(shelf.profile, box) for shelf in self._shelves.values() for box in shelf.ready]

    # taking

    def take(self, spec: BoxSpec) -> ReadyBox | None:
        """A box that can become this spec's agent; the caller says `taken_over` when it has, or when it is gone."""
        profile = profile_of(spec) if self.enabled else None
        shelf = None if profile is None else self._shelves.get(profile)
        while shelf is not None and shelf.ready:
            box = shelf.ready.pop(0)
            if box.channel.connected:
                self._taken.add(box.spec.agent)
                self._changed.set()
                return box
            self._discard(box)
        return None

    def taken_over(self, agent_id: str) -> None:
        """The box is its agent's now, and held by it; or nothing of it is left."""
        self._taken.discard(agent_id)

    def want(self, spec: BoxSpec, blank: Callable[[Profile], Blank]) -> None:
        """There was a spawn of this kind: keep boxes for the next. `blank` is asked only for a new kind.

        To be called while the team can't be deleted, or its shelf would outlive it.
        """
        profile = profile_of(spec) if self.enabled else None
        if profile is None:
            return
        shelf = self._shelves.get(profile)
        if shelf is None:
            self._drop_if(
                lambda other: (
                    (other.team, other.image) == (profile.team, profile.image)
                    and other.image_digest != profile.image_digest
                )
            )
            if len(self._shelves) >= MOST_SHELVES:
                self._drop_one()
            shelf = self._shelves[profile] = _Shelf(profile, blank(profile), 0.0)
        shelf.wanted_at = time.monotonic()
        self._changed.set()

    # filling

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._changed.clear()
            now = time.monotonic()
            self._drop_idle(now)
            if self._is_open():
                self._fill(now)
            wait = _BUSY if self._busy() else self._until_due(now)
            with contextlib.suppress(TimeoutError):
                # Not wait_for: before Python 3.12 it can lose a cancellation that comes with the event.
                async with asyncio.timeout(wait):
                    await self._changed.wait()
                if self._busy():
                    await asyncio.sleep(_BUSY)

    def _drop_idle(self, now: float) -> None:
        self._drop_if(lambda profile: now - self._shelves[profile].wanted_at > self._idle)

    def _drop_one(self) -> None:
        """Make room for a new kind: whoever has most kinds loses the one asked for longest ago."""
        kinds = Counter(profile.owner for profile in self._shelves)
        oldest = sorted(self._shelves.values(), key=lambda shelf: shelf.wanted_at)
        loser = max(oldest, key=lambda shelf: kinds[shelf.profile.owner])
        self._drop_if(lambda profile: profile == loser.profile)

    def _until_due(self, now: float) -> float:
        due = [shelf.wanted_at + self._idle for shelf in self._shelves.values()]
        due += [shelf.not_before for shelf in self._shelves.values() if shelf.not_before > now]
        return max(0.01, min((moment - now for moment in due), default=_LOOK))

    def _fill(self, now: float) -> None:
        # The kind asked for last goes first where the budget is short.
        shelves = sorted(self._shelves.values(), key=lambda shelf: -shelf.wanted_at)
        for shelf in shelves:
            while (
                not self._busy()
                and len(self._fillers) < _PARALLEL
                and now >= shelf.not_before
                and shelf.size < self._depth
                and self._has_room(shelf, shelves)
            ):
                self._begin(shelf)

    def _begin(self, shelf: _Shelf) -> None:
        agent = new_agent_id()
        shelf.filling += 1
        task = asyncio.create_task(self._make(shelf, agent))
        self._fillers[agent] = shelf.profile.team, task
        task.add_done_callback(lambda _: self._filled(shelf, agent))

    def _has_room(self, shelf: _Shelf, shelves: list[_Shelf]) -> bool:
        """Whether the budget has room for one more; it is made where somebody has more than their share."""
        if sum(len(each.ready) for each in shelves) + len(self._fillers) < self._budget:
            return True
        owner, held = shelf.profile.owner, Counter[str]()
        for each in shelves:
            held[each.profile.owner] += each.size

        def may_give(other: _Shelf) -> bool:
            if other.profile.owner == owner:
                return other.wanted_at < shelf.wanted_at and not shelf.size
            return held[other.profile.owner] > held[owner] + 1

        givers = [other for other in reversed(shelves) if other.ready and may_give(other)]
        if not givers:
            return False
        self._discard(max(givers, key=lambda other: held[other.profile.owner]).ready.pop(0))
        return True

    def _filled(self, shelf: _Shelf, agent: str) -> None:
        shelf.filling -= 1
        del self._fillers[agent]
        self._changed.set()

    async def _make(self, shelf: _Shelf, agent: str) -> None:
        try:
            ready = await self._build(shelf.blank(agent))
        except Exception as error:  # noqa: BLE001 - whatever it is, the next try must wait
            pause = min(_PATIENCE[1], _PATIENCE[0] * 2 ** min(shelf.failures, 10))
            shelf.failures += 1
            shelf.not_before = time.monotonic() + pause
            _log.warning(
                "a box for team %s can't be made ahead, next try in %.0f s: %s", shelf.profile.team, pause, error
            )
            return
        shelf.failures = 0
        if self._shelves.get(shelf.profile) is shelf:
            shelf.ready.append(ready)
        else:
            self._discard(ready)

    async def _build(self, spec: BoxSpec) -> ReadyBox:
        folder = self._builder.folder(spec.agent)
        channel = Channel(folder, on_exit=lambda *_: None, on_lost=lambda: None)
        try:
            await uninterrupted(asyncio.to_thread(create_folder, folder))
            box = await self._builder.prepare(spec, channel)
        except BaseException:
            await uninterrupted(self._builder.discard(spec.agent))
            raise
        ready = ReadyBox(spec, box, channel, time.time())
        stays = False
        try:
            stays = await channel.stay()
        finally:
            if not stays:
                await uninterrupted(self._builder.demolish(spec, channel, box.box_id))
        if not stays:
            raise BoxFailed("guest_failed", "The box's PID 1 ended or fell silent while it was prepared.")
        channel.tell(on_exit=lambda *_: self._lost(ready), on_lost=lambda: self._lost(ready))
        return ready

    # clearing

    def _lost(self, ready: ReadyBox) -> None:
        """Its guest is gone: so is the box, soon."""
        for shelf in self._shelves.values():
            if ready in shelf.ready:
                shelf.ready.remove(ready)
                self._discard(ready)

    def _discard(self, ready: ReadyBox) -> None:
        agent = ready.spec.agent
        if agent not in self._leaving:
            task = asyncio.create_task(self._builder.demolish(ready.spec, ready.channel, ready.box.box_id))
            self._leaving[agent] = task
            task.add_done_callback(lambda _: self._left(agent))

    def _left(self, agent: str) -> None:
        self._leaving.pop(agent, None)
        self._changed.set()

    def _drop_if(self, condition: Callable[[Profile], bool]) -> None:
        for profile in [profile for profile in self._shelves if condition(profile)]:
            for box in self._shelves.pop(profile).ready:
                self._discard(box)

    async def drop_team(self, team: str) -> None:
        """Clear the team's shelves; returns when the engine has none of their boxes.

        No spawn may be under way in the team: it would have the shelves made anew.
        """
        self._drop_if(lambda profile: profile.team == team)
        await self._stop_filling(lambda other: other == team)
        await self._cleared()

    def look_again(self) -> None:
        """What held up the building of boxes may be over."""
        self._changed.set()

    def forget(self) -> None:
        """The engine went away, and what becomes of its boxes is unknown: begin anew when it is back."""
        for shelf in self._shelves.values():
            for box in shelf.ready:
                box.channel.close()
            shelf.ready.clear()
            shelf.not_before = 0.0

    async def close(self) -> None:
        """Clear every shelf; what the engine does not let go of in time is left to the next daemon."""
        self._drop_if(lambda _: True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLEARING):
                await self._stop_filling(lambda _: True)
                await self._cleared()

    async def _stop_filling(self, of_team: Callable[[str], bool]) -> None:
        fillers = {task for team, task in self._fillers.values() if of_team(team)}
        for task in fillers:
            task.cancel()
        if fillers:
            await asyncio.wait(fillers)

    async def _cleared(self) -> None:
        leaving: set[asyncio.Task[Any]] = set(self._leaving.values())
        if leaving:
            await asyncio.wait(leaving)
