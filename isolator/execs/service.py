"""Execs of all agents: who may start how many, noted before they run, and killed with their caller's hang-up."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

from isolator.agents.channel import Channel
from isolator.agents.live import LiveAgent
from isolator.audit.log import AuditLog
from isolator.cancellation import uninterrupted
from isolator.execs.descriptors import write_all
from isolator.execs.execution import Execution, Outcome
from isolator.execs.stdio import Pipes, Stdio, Terminal
from isolator.model.errors import Conflict, IsolatorError, TooMany, Unavailable
from isolator.model.identity import Principal
from isolator.model.request import CommandRequest, ExecRequest
from isolator.policy.execs import ExecPlan, plan_exec
from isolator.settings import Settings

# A guest that lost its daemon knocks at least once in a second.
_KNOCK = 2.0
_LOOK = 0.02


class Execs:
    """Starts execs and knows how many there are."""

    def __init__(self, settings: Settings, audit: AuditLog) -> None:
        """None runs."""
        self._settings = settings
        self._audit = audit
        self._running: Counter[str] = Counter()
        self._callers: set[asyncio.Task[Any] | None] = set()

    def stop(self) -> None:
        """End all that are under way, as if their callers had hung up: the daemon ends."""
        for caller in list(self._callers):
            if caller is not None:
                caller.cancel()

    def count(self, agent_id: str) -> int:
        """Execs under way in an agent."""
        return self._running.get(agent_id, 0)

    @contextlib.asynccontextmanager
    async def open(self, live: LiveAgent, request: CommandRequest, caller: Principal) -> AsyncIterator[Execution]:
        """A started exec. Whoever leaves before it has ended, kills it with all that came of it.

        Raises:
            Conflict: `agent_not_running`. TooMany: `execs_exhausted`, `box_full`.
            BadRequest, Forbidden, TooLarge: as `plan_exec`; `command_not_found` and the like.
            Unavailable: `guest_unreachable`, `audit_unavailable`, `terminal_unavailable`, `descriptors_exhausted`.
        """
        plan = plan_exec(request, live.record.spec, self._settings)
        with self._counted(live):
            channel = await self._guest_of(live)
            subject = {"team": live.record.spec.team, "agent": live.record.id}
            program = {"program": plan.command[0][:1024], "arguments": len(plan.command), "tty": plan.tty}
            intent = await self._audit.intent("agent.exec", caller, **subject, **program)
            execution: Execution | None = None
            try:
                execution = Execution(channel, plan, _stdio(live, plan), live.record.pid or 0)
                if isinstance(request, ExecRequest) and not request.stdin:
                    execution.stdio.close_stdin()
                await execution.start()
                yield execution
            except BaseException as error:
                if execution is not None:
                    await uninterrupted(execution.kill("hang-up"))
                code = error.code if isinstance(error, IsolatorError) else "hang-up"
                self._audit.outcome_later(intent, "agent.exec", "failed", **subject, code=code)
                raise
            else:
                if not execution.has_exited:
                    await uninterrupted(execution.kill("hang-up"))
                ended = execution.outcome()
                self._audit.outcome_later(
                    intent, "agent.exec", "done", **subject, exit_code=ended.exit_code, reason=ended.reason
                )
            finally:
                if execution is not None:
                    execution.close()

    async def run(
        self, live: LiveAgent, request: CommandRequest, stdin: bytes, caller: Principal
    ) -> tuple[Outcome, bytes, bytes]:
        """Run a command to its end; how it ended, its output and its errors.

        Raises:
            IsolatorError: as `open`.
        """
        streams = {1: bytearray(), 2: bytearray()}

        async def keep(stream: int, data: bytes) -> None:
            streams[stream] += data

        async with self.open(live, request, caller) as execution:
            feeding = None
            if stdin:
                feeding = asyncio.create_task(_feed(execution, stdin))
            else:
                execution.stdio.close_stdin()
            try:
                await self.until_ended(execution, execution.pass_output(keep), request.timeout)
            finally:
                if feeding is not None:
                    feeding.cancel()
                    await asyncio.gather(feeding, return_exceptions=True)
            return execution.outcome(), bytes(streams[1]), bytes(streams[2])

    @staticmethod
    async def until_ended(execution: Execution, work: Coroutine[Any, Any, None], timeout: float | None) -> None:
        """Do `work`, which ends after the exec, and wait for its end; at the timeout it is killed.

        Raises:
            Whatever `work` raises; the exec may run on then.
        """
        task = asyncio.create_task(work)
        try:
            try:
                async with asyncio.timeout(timeout):
                    await execution.exited()
            except TimeoutError:
                await execution.kill("timeout")
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    @contextlib.contextmanager
    def _counted(self, live: LiveAgent) -> Iterator[None]:
        agent_id = live.record.id
        if (
            self._running[agent_id] >= self._settings.max_execs_per_agent
            or self._running.total() >= self._settings.max_execs
        ):
            raise TooMany(
                "execs_exhausted",
                f"{self._running[agent_id]} execs are under way in this agent and {self._running.total()} in all,"
                " which is the most. End some.",
                retry_after=1,
            )
        self._running[agent_id] += 1
        caller = asyncio.current_task()
        self._callers.add(caller)
        try:
            yield
        finally:
            self._callers.discard(caller)
            live.touch()
            self._running[agent_id] -= 1
            if self._running[agent_id] <= 0:
                del self._running[agent_id]

    async def _guest_of(self, live: LiveAgent) -> Channel:
        """The agent's channel with its guest there; after a restart of the daemon it needs a moment."""
        waited = 0.0
        while True:
            refuse_not_running(live)
            if live.channel is not None and live.channel.connected:
                return live.channel
            if waited >= _KNOCK:
                raise Unavailable("guest_unreachable", "The agent's guest does not answer.", retry_after=1)
            await asyncio.sleep(_LOOK)
            waited += _LOOK


def refuse_not_running(live: LiveAgent | None) -> LiveAgent:
    """The agent, if it runs.

    Raises:
        Conflict: `agent_not_running`.
    """
    if live is None or live.record.state != "running":
        state = "removed" if live is None else live.record.state
        raise Conflict("agent_not_running", f"The agent is {state}; only a running one can do this.", state=state)
    return live


async def _feed(execution: Execution, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):
        await write_all(execution.stdio.stdin, data)
    execution.stdio.close_stdin()


def _stdio(live: LiveAgent, plan: ExecPlan) -> Stdio:
    spec = live.record.spec
    try:
        if plan.tty:
            return Terminal(live.record.pid or 0, spec.uid, spec.gid, plan.size)
        return Pipes(spec.uid, spec.gid)
    except OSError as error:
        raise Unavailable(
            "descriptors_exhausted", f"The daemon can open no more ({error.strerror}). Try again.", retry_after=1
        ) from error
