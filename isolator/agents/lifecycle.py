"""What happens to an agent after it was built: it ends, is stopped, expires, is cleaned up, is adopted.

All its transitions are here, each under the agent's own lock, each written to the store before anybody is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Callable, Coroutine
from typing import Any

from isolator.agents.builder import BoxBuilder
from isolator.agents.channel import Channel
from isolator.agents.deadlines import Deadlines
from isolator.agents.endings import decide_exit
from isolator.agents.events import EventHub
from isolator.agents.hearing import Hearing
from isolator.agents.live import LiveAgent
from isolator.audit.log import AuditLog
from isolator.backends.base import Backend, Box
from isolator.host.cgroups import cpu_seconds
from isolator.model.agent import Agent, Exit, Reason
from isolator.model.errors import IsolatorError, NotFound
from isolator.model.identity import Principal
from isolator.store.store import Store

_log = logging.getLogger(__name__)
# How long the engine may take to notice the end of a container whose PID 1 has gone.
_END_WAITS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.4)
_RETRY = 5.0
_IDLE_SHARE = 0.01
_LAST_WORDS = 2.0
# A guest without a daemon knocks at least once in a second.
_KNOCK = 2.0


class Lifecycle:
    """Every agent that is not yet removed, and what becomes of it."""

    def __init__(
        self,
        store: Store,
        audit: AuditLog,
        events: EventHub,
        backend: Backend,
        builder: BoxBuilder,
        deadlines: Deadlines,
        records_kept: int,
    ) -> None:
        """Holds nothing until `hold` or `adopt`."""
        self._store = store
        self._audit = audit
        self._events = events
        self._backend = backend
        self._builder = builder
        self._deadlines = deadlines
        self._records_kept = records_kept
        self.hearing = Hearing(builder, deadlines, finish=self.finish, expire=self.expire, later=self._later)
        # Whether somebody works in an agent now, who asked for it long ago perhaps.
        self.is_in_use: Callable[[str], bool] = lambda _: False
        self._live: dict[str, LiveAgent] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stops: set[asyncio.Task[Any] | None] = set()

    # who is there

    def live(self) -> list[LiveAgent]:
        """Every agent held."""
        return list(self._live.values())

    def find(self, agent_id: str) -> LiveAgent | None:
        """One agent, or None if it is not held."""
        return self._live.get(agent_id)

    def named(self, team: str, name: str) -> LiveAgent | None:
        """The running agent of that name in the team."""
        for live in self._live.values():
            record = live.record
            if record.spec.team == team and record.spec.name == name and record.state in ("creating", "running"):
                return live
        return None

    def visible(self, agent_id: str, caller: Principal) -> LiveAgent:
        """One held agent the caller may see. Raises NotFound: `agent_not_found`."""
        live = self._live.get(agent_id)
        if live is None or not (caller.is_admin or live.record.spec.owner == caller.owner):
            raise NotFound("agent_not_found", "There is no such agent.")
        return live

    # coming

    def channel_for(self, live: LiveAgent) -> Channel:
        """A channel whose reports go to this agent."""
        return self.hearing.open(live)

    def hold(self, live: LiveAgent) -> None:
        """Keep an agent from now on."""
        self._live[live.record.id] = live

    async def drop(self, agent_id: str) -> None:
        """Forget one that never came to be, its record too; as often as it takes where the disk refuses."""
        live = self._live.pop(agent_id, None)
        if live is not None:
            self.hearing.on_removed(agent_id)
            live.ended.set()
        try:
            await self._store.delete_agent(agent_id)
        except IsolatorError as error:
            _log.warning("the record of agent %s, which never came to be, stays for now: %s", agent_id, error)
            self._deadlines.at(time.time() + _RETRY, lambda: self.drop(agent_id))

    def schedule(self, live: LiveAgent, earliest: float = 0.0) -> None:
        """Set the deadlines of a running agent, none before `earliest`, Unix time."""
        record, agent_id = live.record, live.record.id
        if record.wall_deadline is not None:
            due = max(earliest, record.wall_deadline)
            self._deadlines.at(due, lambda: self.expire(agent_id, "wall", "limits.wall was reached."))
        if record.expires_at is not None:
            due = max(earliest, record.expires_at)
            self._deadlines.at(due, lambda: self.expire(agent_id, "ttl", "Its ttl ended."))
        if record.spec.idle_ttl is not None:
            self._deadlines.at(live.touched_at + record.spec.idle_ttl, lambda: self._look_idle(agent_id))

    def adopt(self, record: Agent) -> LiveAgent:
        """Hold an agent of an earlier daemon again; its guest is expected to knock."""
        live = LiveAgent(record)
        self.hold(live)
        if record.state == "running" and record.container_id is not None:
            try:
                self.channel_for(live).listen(record.container_id)
            except OSError as error:
                _log.warning("the socket of agent %s can't be served again: %s", record.id, error)
                live.channel = None
            # One that ended by itself while nobody was here must get to say so before its time is found to be over.
            self.schedule(live, earliest=time.time() + _KNOCK)
        elif record.state in ("exited", "lost"):
            self._schedule_cleanup(live)
        return live

    # ending

    async def finish(self, agent_id: str) -> None:
        """The guest's connection ended: if the box did too, tell how; if not, the guest will knock again."""
        live = self._live.get(agent_id)
        if live is None:
            return
        async with live.lock:
            if live.record.state != "running":
                return
            try:
                box = await self._ended_box(live)
                if box is not None and box.state != "exited":
                    return
                await self._record_end(live, decide_exit(live.report, box, live.cause, live.detail))
            except IsolatorError as error:
                _log.warning("the end of agent %s can't be noted yet: %s", agent_id, error)
                self._deadlines.at(time.time() + _RETRY, lambda: self.finish(agent_id))

    def look_again(self, agent_id: str) -> None:
        """Finish this agent soon if its box has ended."""
        self._later(self.finish(agent_id))

    async def _box_of(self, live: LiveAgent) -> Box | None:
        return await self._backend.inspect(live.record.container_id or live.record.id)

    async def _ended_box(self, live: LiveAgent) -> Box | None:
        box = None
        for wait in _END_WAITS:
            box = await self._box_of(live)
            if box is None or box.state == "exited":
                return box
            if live.channel is not None and live.channel.connected:
                return box
            await asyncio.sleep(wait)
        return box

    async def _record_end(self, live: LiveAgent, ending: Exit) -> None:
        state = "lost" if ending.reason == "lost" else "exited"
        await self._become(live, state=state, exit=ending, finished_at=time.time(), pid=None)
        try:
            await self._audit.note(
                "agent.end",
                None,
                team=live.record.spec.team,
                agent=live.record.id,
                reason=ending.reason,
                code=ending.code,
                signal=ending.signal,
            )
        finally:
            if live.channel is not None:
                live.channel.close()
                live.channel = None
            self.hearing.on_ended(live.record.id)
            live.ended.set()
            self._schedule_cleanup(live)
        await self._tell(live.record, "agent.exited", reason=ending.reason, code=ending.code, signal=ending.signal)

    async def expire(self, agent_id: str, cause: Reason, detail: str) -> None:
        """Kill an agent whose time is over; its box and logs stay for the grace."""
        live = self._live.get(agent_id)
        if live is None or live.record.state != "running":
            return
        try:
            await self._expire(live, cause, detail)
        except IsolatorError as error:
            _log.warning("agent %s is over its time and can't be ended yet: %s", agent_id, error)
            self._deadlines.at(time.time() + _RETRY, lambda: self.expire(agent_id, cause, detail))
            return
        await self.finish(agent_id)

    async def _expire(self, live: LiveAgent, cause: Reason, detail: str) -> None:
        record = live.record
        box = await self._box_of(live)
        if box is None or box.state == "exited":
            return  # it ended by itself, and is told so
        subject = {"team": record.spec.team, "agent": record.id}
        intent = await self._audit.intent("agent.expire", None, **subject, cause=cause)
        if live.report is None:
            live.cause, live.detail = live.cause or cause, live.detail or detail
        try:
            await self._backend.kill(record.container_id or record.id)
        except IsolatorError:
            await self._audit.outcome(intent, "agent.expire", "failed", **subject)
            raise
        await self._audit.outcome(intent, "agent.expire", "done", **subject)

    async def _look_idle(self, agent_id: str) -> None:
        live = self._live.get(agent_id)
        if live is None or live.record.state != "running" or live.record.spec.idle_ttl is None:
            return
        idle_ttl, now = live.record.spec.idle_ttl, time.time()
        used = cpu_seconds(live.record.pid) if live.record.pid else None
        busy = used is not None and used - live.cpu_seconds > _IDLE_SHARE * idle_ttl
        if busy or self.is_in_use(agent_id):
            live.touched_at = now
        live.cpu_seconds = used or 0.0
        if now - live.touched_at >= idle_ttl:
            await self.expire(agent_id, "ttl", "It was idle for its idle_ttl.")
        else:
            self._deadlines.at(live.touched_at + idle_ttl, lambda: self._look_idle(agent_id))

    # going

    def _schedule_cleanup(self, live: LiveAgent) -> None:
        agent_id, record = live.record.id, live.record
        due = (record.finished_at or time.time()) + record.spec.cleanup_grace
        self._deadlines.at(due, lambda: self._clean_up(agent_id))

    async def _clean_up(self, agent_id: str) -> None:
        live = self._live.get(agent_id)
        if live is None:
            return
        async with live.lock:
            if live.record.state not in ("exited", "lost", "stopping"):
                return
            try:
                await self._remove(live)
            except IsolatorError as error:
                _log.warning("the box of agent %s can't be removed yet: %s", agent_id, error)
                self._deadlines.at(time.time() + _RETRY, lambda: self._clean_up(agent_id))

    async def stop(self, live: LiveAgent, caller: Principal | None, grace: float) -> Agent:
        """Signal, grace, kill, remove; the record that remains.

        One that is being spawned is stopped when its spawn has ended.

        Raises:
            NotFound: its spawn failed meanwhile.
            Unavailable: `engine_unavailable`; what is left of it is removed as soon as the engine can.
        """
        record = live.record
        subject = {"team": record.spec.team, "agent": record.id}
        intent = await self._audit.intent("agent.stop", caller, **subject, grace=grace)
        under_way = asyncio.current_task()
        try:
            if under_way is not None:
                self._stops.add(under_way)
            await self._stop(live, grace)
        except BaseException as error:
            code = error.code if isinstance(error, IsolatorError) else type(error).__name__
            await self._audit.outcome(intent, "agent.stop", "failed", **subject, code=code)
            raise
        finally:
            self._stops.discard(under_way)
        await self._audit.outcome(intent, "agent.stop", "done", **subject)
        return live.record

    async def _stop(self, live: LiveAgent, grace: float) -> None:
        async with live.lock:
            if live.record.state == "creating":
                raise NotFound("agent_not_found", "Its spawn failed; there is nothing to stop.")
            if live.record.state == "running":
                await self._end_by_request(live, grace)
            if live.record.state != "removed":
                try:
                    await self._remove(live)
                except IsolatorError:
                    self._deadlines.at(time.time() + _RETRY, lambda: self._clean_up(live.record.id))
                    raise

    async def settle(self) -> None:
        """Break off the stops under way, for the daemon ends: the next one's reconcile finishes them."""
        stops = [task for task in self._stops if task is not None]
        for task in stops:
            task.cancel()
        await asyncio.gather(*stops, return_exceptions=True)

    async def _end_by_request(self, live: LiveAgent, grace: float) -> None:
        live.cause = live.cause or "killed"
        live.detail = live.detail or "It was stopped."
        await self._become(live, state="stopping")
        if grace > 0 and live.channel is not None and await live.channel.signal(signal.SIGTERM):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(live.reported.wait(), grace)
                await self._builder.until_ended(live.record.container_id or live.record.id, _LAST_WORDS)

    async def _remove(self, live: LiveAgent) -> None:
        record = live.record
        await self._backend.remove(record.container_id or record.id)
        if live.channel is not None:
            live.channel.close()
            live.channel = None
        await self._builder.discard(record.id)
        ending = record.exit or self._removed_exit(live)
        finished = record.finished_at or time.time()
        await self._become(live, state="removed", exit=ending, finished_at=finished, pid=None)
        # At once, before anything waits: nobody may find it and wait for an end that was told already.
        self._live.pop(record.id, None)
        self.hearing.on_removed(record.id)
        live.ended.set()
        try:
            await self._store.prune(self._records_kept)
        except IsolatorError as error:
            _log.warning("old records can't be dropped yet: %s", error)
        await self._tell(live.record, "agent.removed", reason=ending.reason)

    @staticmethod
    def _removed_exit(live: LiveAgent) -> Exit:
        if live.report is not None:
            return decide_exit(live.report, None, live.cause or "killed", live.detail)
        return Exit(128 + signal.SIGKILL, signal.SIGKILL, live.cause or "killed", live.detail)

    async def _become(self, live: LiveAgent, **changes: Any) -> None:
        """Change a record: on disk first, so that what is in memory was never merely hoped for."""
        changed = live.record.changed(**changes)
        await self._store.save_agent(changed)
        live.record = changed

    # telling

    async def _tell(self, record: Agent, kind: str, **data: str | int | None) -> None:
        spec = record.spec
        await self._events.publish(kind, owner=spec.owner, team=spec.team, agent=record.id, name=spec.name, **data)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("an agent's end could not be handled", exc_info=task.exception())

    def close(self) -> None:
        """Let go of every agent; the boxes run on."""
        for live in self._live.values():
            if live.channel is not None:
                live.channel.close()
                live.channel = None
