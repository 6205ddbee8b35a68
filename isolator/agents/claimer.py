"""A waiting box becomes an agent: its folders appear in it, it is checked again, and its command runs.

The order is the cold spawn's: audit intent, checks by the kernel's word, release, record and outcome. There is no
record before the release, because there is nothing to undo that reconcile would not: until the agent is recorded the
box belongs to the pool, and a daemon that is killed leaves one that the next daemon removes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from isolator.agents.builder import BoxBuilder, BuiltBox, Secrets
from isolator.agents.channel import Release
from isolator.agents.events import EventHub
from isolator.agents.lifecycle import Lifecycle
from isolator.agents.live import LiveAgent
from isolator.agents.notes import started_event, summary_of, warnings_of
from isolator.agents.pool import ReadyBox
from isolator.agents.receipt import receipt
from isolator.audit.log import AuditLog
from isolator.backends.base import Backend, Guarantees
from isolator.cancellation import uninterrupted
from isolator.host.folders import HeldFolder, check_mounts_inside
from isolator.host.placing import Placer
from isolator.host.processes import check_confinement
from isolator.model.agent import Agent
from isolator.model.box import BoxSpec
from isolator.model.errors import BoxFailed, IsolatorError
from isolator.model.event import Event
from isolator.model.identity import Principal
from isolator.policy.blank import under
from isolator.store.store import Store

_log = logging.getLogger(__name__)
_RENAME_AFTER = 0.1


class BoxSpoiled(Exception):
    """The waiting box can't become the agent, for a reason of its own: nothing is left of it. Build one."""


class Claimer:
    """Turns waiting boxes into agents."""

    def __init__(
        self,
        store: Store,
        audit: AuditLog,
        events: EventHub,
        backend: Backend,
        builder: BoxBuilder,
        lifecycle: Lifecycle,
        placer: Placer,
        guarantees: Callable[[], Guarantees],
    ) -> None:
        """Only keeps its parts."""
        self._store = store
        self._audit = audit
        self._events = events
        self._backend = backend
        self._builder = builder
        self._lifecycle = lifecycle
        self._placer = placer
        self._guarantees = guarantees
        self._renaming: set[asyncio.Task[None]] = set()

    @property
    def can_place(self) -> bool:
        """Whether folders can be made to appear in a box that runs."""
        return self._placer.trouble is None

    async def claim(
        self,
        ready: ReadyBox,
        planned: BoxSpec,
        held: Sequence[HeldFolder],
        secrets: Secrets,
        caller: Principal,
        key: tuple[str, str, str] | None,
    ) -> LiveAgent:
        """The running agent, recorded and on disk. `planned`: its spec, under an id that is given up for the box's.

        Raises:
            BoxSpoiled: nothing is left; a box can be built instead.
            IsolatorError: a refusal or failure that a built box would meet too; nothing is left.
        """
        # The engine can't change labels: what is on the box is what it was made with.
        spec = replace(under(ready.spec.agent, planned), labels=ready.spec.labels)
        record = self._record_of(spec, dict(planned.labels)["isolator.spec"], ready, held)
        subject = {"team": spec.team, "agent": spec.agent}
        summary = summary_of(spec, record.spec_digest)
        # While the disk is waited for: nothing of the agent's runs in the box yet, and without an intent it is gone.
        placing = asyncio.ensure_future(self._place(spec, held, ready.box))
        try:
            intent = await self._audit.intent("agent.spawn", caller, **subject, **summary, warm=True)
        except BaseException:
            await uninterrupted(_given_up(placing))
            await uninterrupted(self._builder.demolish(ready.spec, ready.channel, ready.box.box_id))
            raise
        live, result = LiveAgent(record), "failed"
        async with live.lock:
            try:
                await self._become(live, ready, placing, secrets)
                # What is noted as done, and then can't be kept, was undone.
                result = "undone"
                event = await self._note(live.record, intent, key)
            except BaseException as error:
                await uninterrupted(_given_up(placing))
                await uninterrupted(self._take_back(live, ready))
                code = error.code if isinstance(error, IsolatorError) else type(error).__name__
                await uninterrupted(self._audit.outcome(intent, "agent.spawn", result, **subject, code=code))
                # What may have run once must not run again.
                if isinstance(error, OSError | BoxFailed) and not ready.channel.may_have_started:
                    raise BoxSpoiled(str(error)) from error
                raise
            self._lifecycle.schedule(live)
        if event is not None:
            self._events.tell(event)
        self._rename(live)
        return live

    async def _place(self, spec: BoxSpec, held: Sequence[HeldFolder], box: BuiltBox) -> None:
        """Let its folders appear in the box, and see that it is still what it was when it was made."""
        placing = asyncio.ensure_future(self._placer.place(spec, held, box.pid, box.box_id))
        try:
            await asyncio.sleep(0)  # its thread works while we look
            check_confinement(box.pid, spec)
        finally:
            await placing

    def _record_of(self, spec: BoxSpec, digest: str, ready: ReadyBox, held: Sequence[HeldFolder]) -> Agent:
        return Agent(
            id=spec.agent,
            spec=spec,
            state="creating",
            created_at=time.time(),
            backend=self._backend.name,
            spec_digest=digest,
            container_id=ready.box.box_id,
            pid=ready.box.pid,
            warnings=warnings_of(spec, held),
            warm=True,
            box_digest=dict(ready.spec.labels)["isolator.spec"],
        )

    async def _note(self, record: Agent, intent: str, key: tuple[str, str, str] | None) -> Event | None:
        """Record and outcome at once: each waits for the disk, and neither for the other. Both, whatever happens."""
        subject = {"team": record.spec.team, "agent": record.id, "container": record.container_id}
        event, outcome = await uninterrupted(
            asyncio.gather(
                self._store.add_agent(record, key, started_event(record.spec)),
                self._audit.outcome(intent, "agent.spawn", "done", **subject),
                return_exceptions=True,
            )
        )
        for result in (event, outcome):
            if isinstance(result, BaseException):
                raise result
        return event  # type: ignore[return-value]

    async def _become(self, live: LiveAgent, ready: ReadyBox, placing: asyncio.Future[None], secrets: Secrets) -> None:
        record, spec, box = live.record, live.record.spec, ready.box
        self._lifecycle.hearing.attach(live, ready.channel)
        self._lifecycle.hold(live)
        await placing
        check_mounts_inside(spec, box.pid)
        release = Release(secrets, spec.command, spec.environment, spec.working_dir)
        await self._builder.release(spec, box, release, ready.channel)
        now = time.time()
        live.record = record.changed(
            state="running",
            started_at=now,
            expires_at=None if spec.ttl is None else now + spec.ttl,
            wall_deadline=None if spec.limits.wall is None else now + spec.limits.wall,
            receipt=receipt(spec, self._guarantees(), swap_capped=box.swap_capped),
        )

    async def _take_back(self, live: LiveAgent, ready: ReadyBox) -> None:
        """Leave nothing: a box is used once, even by a spawn that failed."""
        live.record = live.record.changed(state="creating")
        await self._builder.demolish(ready.spec, ready.channel, ready.box.box_id)
        await self._lifecycle.drop(live.record.id)

    def _rename(self, live: LiveAgent) -> None:
        """`docker ps` shows whose it is now. Nobody waits for it: the labels said so from the start."""

        async def rename() -> None:
            # A call to the engine takes longer than the whole claim, and would hold up the answer to it.
            await asyncio.sleep(_RENAME_AFTER)
            await rename_box(self._backend, live)

        task = asyncio.create_task(rename())
        self._renaming.add(task)
        task.add_done_callback(self._renaming.discard)


async def _given_up(work: asyncio.Future[None]) -> None:
    """Nobody wants it any more; whatever of it can't be broken off has ended when this returns."""
    work.cancel()
    await asyncio.wait({work})
    if not work.cancelled():
        work.exception()  # seen


async def rename_box(backend: Backend, live: LiveAgent) -> None:
    """Give a claimed box its agent's name.

    Under the agent's lock, as every removal: an engine that renames a container while it removes it lists it for ever.
    """
    async with live.lock:
        record = live.record
        if record.state != "running" or record.container_id is None:
            return
        try:
            await uninterrupted(backend.rename(record.container_id, record.spec.box_name))
        except IsolatorError as error:
            _log.warning("the box of agent %s keeps its pool's name: %s", record.id, error)
