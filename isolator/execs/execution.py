"""One exec from its order to its end: started, fed, read, signalled, killed with all that came of it."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from isolator.agents.channel import Channel, ExecOrder
from isolator.execs.descriptors import pump
from isolator.execs.stdio import Stdio
from isolator.host.cgroups import oom_kills
from isolator.model.errors import BadRequest, Conflict, IsolatorError, TooMany, Unavailable
from isolator.policy.execs import ExecPlan

START_TIMEOUT = 15.0
KILL_TIMEOUT = 10.0
_SIGNAL_BASE = 128
_KILLED = (0, int(signal.SIGKILL))

Sink = Callable[[int, bytes], Awaitable[None]]
"""Takes (1 or 2, what was written there)."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an exec ended.

    exit_code: its first process's, 128 + signal if one ended it; duration in seconds; reason: why isolator ended it
    (`timeout`, `hang-up`), or why its end was not told (`agent-ended`), else None.
    """

    exit_code: int
    signal: int | None
    timed_out: bool
    oom_killed: bool
    truncated: bool
    duration: float
    reason: str | None = None


class Execution:
    """One exec. It is the watcher that the guest's reports reach."""

    def __init__(self, channel: Channel, plan: ExecPlan, stdio: Stdio, pid: int) -> None:
        """`pid`: the box's PID 1 on the host, whose cgroup tells of kills for memory."""
        loop = asyncio.get_running_loop()
        self.stdio = stdio
        self.truncated = False
        self.pid = 0
        self._readers: dict[int, asyncio.Task[None]] = {}
        self._channel = channel
        self._plan = plan
        self._init = pid
        self._number: bytes | None = None
        self._began = time.monotonic()
        self._oom_kills = 0
        self._reason: str | None = None
        self._started: asyncio.Future[int] = loop.create_future()
        self._exited: asyncio.Future[tuple[int, int]] = loop.create_future()
        self._gone: asyncio.Future[None] = loop.create_future()

    # what the guest reports

    def on_started(self, pid: int) -> None:
        """It runs."""
        if not self._started.done():
            self._started.set_result(pid)

    def on_failed(self, errno: int, where: str) -> None:
        """It could not be started."""
        if not self._started.done():
            self._started.set_exception(_refusal(self._plan, errno, where))
            self._started.exception()  # seen: whoever waited may be gone

    def on_exited(self, code: int, number: int) -> None:
        """Its first process ended."""
        if not self._exited.done():
            self._exited.set_result((code, number))

    def on_gone(self) -> None:
        """Nothing is left of it, or of the guest."""
        if not self._started.done():
            self._started.set_exception(_unreachable())
            self._started.exception()
        if not self._exited.done():
            self._reason = self._reason or "agent-ended"
            self._exited.set_result(_KILLED)
        if not self._gone.done():
            self._gone.set_result(None)

    # what is done with it

    async def start(self) -> None:
        """Have it started; `pid` is then its first process's in the box.

        Raises:
            BadRequest: `command_not_found`, `command_not_executable`, `command_too_long`, `cwd_invalid`.
            Conflict: `agent_not_running`. TooMany: `box_full`. Unavailable: `guest_unreachable`.
        """
        order = ExecOrder(
            self._plan.command, self._plan.environment, self._plan.working_dir, terminal=self.stdio.terminal
        )
        try:
            theirs, self.stdio.theirs = self.stdio.theirs, []
            self._number = self._channel.execute(order, theirs, self)
            self._oom_kills = oom_kills(self._init)  # while the guest is at it: it takes longer than this
            self.pid = await asyncio.wait_for(asyncio.shield(self._started), START_TIMEOUT)
        except (ConnectionError, TimeoutError):
            raise _unreachable() from None

    async def pass_output(self, sink: Sink) -> None:
        """Hand over what it writes, until it has ended and all of it was handed over. What is too much is dropped."""
        streams = {1: self.stdio.stdout, 2: self.stdio.stderr}
        self._readers = {
            stream: asyncio.create_task(pump(descriptor, self._capped(stream, sink), self._exited))
            for stream, descriptor in streams.items()
            if descriptor >= 0
        }
        readers = self._readers.values()
        try:
            await asyncio.wait(readers, return_when=asyncio.FIRST_EXCEPTION)
            for reader in readers:
                if reader.done() and not reader.cancelled():
                    reader.result()
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    def close_output(self, stream: int) -> None:
        """Nobody reads 1 or 2 any more: whoever writes there is told so, as by any pipe. A terminal's stays open."""
        reader = self._readers.get(stream)
        if reader is not None and not self.stdio.terminal:
            reader.add_done_callback(lambda _: self.stdio.close_output(stream))
            reader.cancel()

    def _capped(self, stream: int, sink: Sink) -> Callable[[bytes], Awaitable[None]]:
        left = self._plan.max_output

        async def take(data: bytes) -> None:
            nonlocal left
            if left is not None:
                if len(data) > left:
                    self.truncated = True
                    data = data[:left]
                left -= len(data)
            if data:
                await sink(stream, data)

        return take

    def send_signal(self, number: int) -> None:
        """To its first process's group; on a terminal, what keys send goes to the foreground group."""
        if not self.stdio.press(number) and self._number is not None and not self._exited.done():
            self._channel.signal_exec(self._number, number)

    async def kill(self, reason: str) -> None:
        """End every process of it and wait until nothing is left, at most `KILL_TIMEOUT` seconds."""
        if self._number is None or self._gone.done():
            return
        self._reason = self._reason or reason
        self._channel.kill_exec(self._number)
        try:
            await asyncio.wait_for(asyncio.shield(self._gone), KILL_TIMEOUT)
        except TimeoutError:
            self.on_gone()  # whoever waits for its end need not wait for a guest that does not tell

    async def exited(self) -> None:
        """Wait until its first process has ended."""
        await asyncio.shield(self._exited)

    @property
    def has_exited(self) -> bool:
        """Whether its first process has ended."""
        return self._exited.done()

    def outcome(self) -> Outcome:
        """How it ended; call it after it has."""
        code, number = self._exited.result() if self._exited.done() else _KILLED
        killed_hard = number == signal.SIGKILL or code == _SIGNAL_BASE + signal.SIGKILL
        return Outcome(
            exit_code=_SIGNAL_BASE + number if number else code,
            signal=number or None,
            timed_out=self._reason == "timeout",
            # Only where nobody of us killed it: the kernel counts its kills, not whom they were for.
            oom_killed=killed_hard and self._reason is None and oom_kills(self._init) > self._oom_kills,
            truncated=self.truncated,
            duration=time.monotonic() - self._began,
            reason=self._reason,
        )

    def close(self) -> None:
        """Let go of it. What its first process left running goes on, and may write to nobody."""
        if self._number is not None:
            self._channel.forget_exec(self._number)
        for future in (self._started, self._exited, self._gone):
            future.cancel()
        self.stdio.close()


def _refusal(plan: ExecPlan, errno: int, where: str) -> IsolatorError:
    program = plan.command[0][:200]
    if where == "cwd":
        return BadRequest(
            "cwd_invalid",
            f"{plan.working_dir[:200]} is no folder the agent may enter (errno {errno}).",
            field="cwd",
            errno=errno,
        )
    if where == "phase":
        return Conflict("agent_not_running", "The agent's command has just ended.")
    if where in ("fork", "guest") or errno == 11:
        return TooMany(
            "box_full",
            "The box has all the processes (limits.pids) or open files (limits.nofile) it may have. End some.",
            retry_after=1,
        )
    if errno == 2:
        return BadRequest(
            "command_not_found",
            f"{program} is not in the box (or its interpreter is not).",
            command=program,
        )
    if errno == 7:
        return BadRequest("command_too_long", "The command and environment are longer than the kernel takes.")
    return BadRequest(
        "command_not_executable",
        f"{program} can't be executed (errno {errno}): is it a program with its x bit set? /tmp is noexec.",
        command=program,
        errno=errno,
    )


def _unreachable() -> Unavailable:
    return Unavailable(
        "guest_unreachable", "The agent's guest does not answer; nothing of the command runs.", retry_after=1
    )
