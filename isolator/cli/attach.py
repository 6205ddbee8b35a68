"""`spawn --wait`: an agent's output to ours, our interruption to it, and its end as our own.

The agent lives with the command that waits for it: Ctrl-C, TERM, HUP, or a reader that went away stop it. If
the daemon restarts meanwhile the agent runs on, and so does the wait, for a minute at most.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Final, TypeVar

from isolator.cli.output import writer
from isolator.cli.progress import ProgressLine
from isolator.cli.session import OWN_FAILURE, note

if TYPE_CHECKING:
    from isolator.client import Agent, Client

_PATIENCE: Final = 60.0
_PAUSE: Final = 0.2
_SIGNALLED: Final = 128
_KILLED: Final = _SIGNALLED + signal.SIGKILL
_NOT_FOUND: Final = 404
_OUR_DOING: Final = ("oom", "wall", "ttl")

Result = TypeVar("Result")


class _Terminated(Exception):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run_to_end(client: Client, agent: Agent, *, copy: bool) -> tuple[Agent | None, int]:
    """Wait for an agent's end.

    Args:
        client: of its daemon.
        agent: just spawned.
        copy: write its output to ours meanwhile.

    Returns:
        The agent as it ended (None if we were interrupted), and the exit code that says so.
    """
    try:
        with _raising_signals():
            if copy:
                _copy(client, agent)
            final = _patiently(client, lambda: client.wait(agent.id))
        return final, exit_code(final)
    except KeyboardInterrupt:
        number = int(signal.SIGINT)
    except _Terminated as asked:
        number = asked.number
    except BrokenPipeError:
        number = int(signal.SIGPIPE)
        # What is still buffered would fail again, loudly, when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _stop(client, agent)
    return None, _SIGNALLED + number


def exit_code(agent: Agent) -> int:
    """The agent's end as an exit code; what ended it against its will is told on standard error."""
    ended = agent.exit
    if ended is None or ended.reason == "lost":
        note(f"isolator: agent {agent.id} is {agent.state}; how its command ended is not known.")
        return OWN_FAILURE
    told = _SIGNALLED + ended.signal if ended.signal else ended.code
    if ended.reason in _OUR_DOING:
        why = {
            "oom": "it ran out of memory",
            "wall": "its wall time was over",
            "ttl": "its time to live was over",
        }
        detail = (ended.detail or why[ended.reason]).rstrip(".")
        note(f"isolator: agent {agent.id} was ended: {detail} ({ended.reason}).")
        return told or _KILLED
    if ended.reason == "killed":
        by = _signal_name(ended.signal) if ended.signal else "force"
        note(f"isolator: agent {agent.id} was ended by {by}." + (f" {ended.detail}" if ended.detail else ""))
        return told or _KILLED
    return _KILLED if told is None else told


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _copy(client: Client, agent: Agent) -> None:
    """The output, whole even over a broken connection: what was written already is passed over."""
    from isolator.client import ProblemError  # noqa: PLC0415 - loaded with the client anyway

    written = {1: 0, 2: 0}
    try:
        with ProgressLine(client, agent.id) as line:
            write = line.around(writer("raw"))

            def once() -> None:
                passed = dict(written)
                try:
                    with client.logs(agent.id, follow=True) as stream:
                        for number, data in stream:
                            fresh = data[min(passed[number], len(data)) :]
                            passed[number] -= len(data) - len(fresh)
                            if fresh:
                                write(number, fresh)
                                written[number] += len(fresh)
                finally:
                    line.hide()  # what we say next stands on a line of its own

            _patiently(client, once)
    except ProblemError as problem:
        note(f"isolator: no more of the output can be shown: {problem.detail}")


def _patiently(client: Client, act: Callable[[], Result]) -> Result:
    """Do it; each time the daemon goes away, wait a minute for it and do it again. A refusal is raised at once."""
    from isolator.client import AnswerTimeout, ConnectionLost, SocketNotFound  # noqa: PLC0415 - as above

    away = (ConnectionLost, AnswerTimeout, SocketNotFound)
    while True:
        try:
            return act()
        except away:
            note("isolator: the daemon went away; the agent runs on. Waiting for it to come back …")
        # Slow to load, and needed only now.
        from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential  # noqa: PLC0415

        time.sleep(_PAUSE)
        Retrying(
            retry=retry_if_exception_type(away),
            stop=stop_after_delay(_PATIENCE),
            wait=wait_exponential(multiplier=_PAUSE, max=3),
            reraise=True,
        )(client.healthy)


def _stop(client: Client, agent: Agent) -> None:
    """Ask it to end, then kill it; a second Ctrl-C kills it at once, a third gives up."""
    from isolator.client import IsolatorClientError, ProblemError  # noqa: PLC0415 - as above

    for grace in (None, 0.0):
        try:
            client.stop(agent.id, grace)
        except KeyboardInterrupt:
            continue
        except IsolatorClientError as error:
            if not (isinstance(error, ProblemError) and error.status == _NOT_FOUND):
                note(f"isolator: agent {agent.id} may still run: {error.detail}")
        return
    note(f"isolator: agent {agent.id} may still run. Stop it: isolator stop {agent.id}")


@contextlib.contextmanager
def _raising_signals() -> Iterator[None]:
    """TERM and HUP become an exception here, as INT is one already. What we were started to ignore (nohup) stays so."""

    def raise_it(number: int, _: FrameType | None) -> None:
        raise _Terminated(number)

    raised = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, raise_it) for number in raised}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
