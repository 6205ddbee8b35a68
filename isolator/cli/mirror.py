"""A command in the box as if it ran here: bytes both ways, signals there, its end told back.

One thread reads standard input, one writes what the command wrote, the main one waits for signals and the end; so
a reader that pauses, or a command that does not read, holds up nothing else. Standard input is read no further
ahead than about 1.5 MiB: one piece here, what the sockets hold, what the daemon holds.

Accepted misses: one connection carries both outputs, so a reader that pauses on one holds up the other too; and a
command that suspends itself without being asked to, goes unnoticed.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from isolator.cli.ending import end_by
from isolator.cli.session import Failure

if TYPE_CHECKING:
    from isolator.cli.terminal import Terminal
    from isolator.client import Exec, ExecStatus

Output = Callable[[int, bytes], None]

_PIECE: Final = 64 * 1024
_DEADLY: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_PASSED: Final = (*_DEADLY, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTSTP, signal.SIGCONT)
# How long one of them may wait behind input that nobody takes, before we hang up.
_UNHEARD: Final = 1.0
_BACKGROUND_PAUSE: Final = 0.2


class _Gone(Exception):
    """Whom we worked for is gone, or does not want to wait: end by this signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def keep_standard_streams() -> frozenset[int]:
    """Open /dev/null where standard streams are closed, lest our connection be taken for one. Which were closed."""
    closed = set()
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            closed.add(number)
            os.open(os.devnull, os.O_RDWR)
    return frozenset(closed)


def raw_output(stream: int, data: bytes) -> None:
    """The very bytes, at once, to standard output or errors. Raises BrokenPipeError: the reader is gone."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(stream, rest) :]
        except BlockingIOError:  # whoever shares it has set it so
            _wait(stream, select.POLLOUT)
        except BrokenPipeError:
            raise
        except OSError as error:
            name = "output" if stream == 1 else "error"
            raise Failure(f"Standard {name} can't be written: {error.strerror}.", "output_failed") from error


class Mirror:
    """One command and us."""

    def __init__(self, execution: Exec, output: Output, terminal: Terminal | None) -> None:
        """`output` takes (1 or 2, bytes); `terminal`: ours, for a command that has one."""
        self._execution = execution
        self._output = output
        self._terminal = terminal
        # How it ended, or why that will not be known.
        self._told: ExecStatus | BaseException | None = None
        # The kernel's handler writes signals' numbers here; a thread that has told something, a zero. A queue would
        # not do: a signal that comes just before the main thread waits for one does not wake it.
        self._wakened, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # Pieces of input offered to the daemon, and whether it has yet to take the last.
        self._offered = 0
        self._offering = False

    def run(self, *, stdin: bool) -> ExecStatus:
        """Until the command has ended, or we have: does not return when a signal ends us, or our reader is gone."""
        try:
            with self._catching_signals(), contextlib.ExitStack() as stack:
                if self._terminal is not None:
                    stack.enter_context(self._terminal.raw())
                self._start_threads(stdin=stdin)
                return self._until_ended()
        except BrokenPipeError:
            number = int(signal.SIGPIPE)
        except _Gone as gone:
            number = gone.number
        self._execution.close()
        return end_by(number)

    def _start_threads(self, *, stdin: bool) -> None:
        # Signals are for the main thread; and a terminal that others have must not stop us for reading it.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {*_PASSED, signal.SIGWINCH, signal.SIGTTIN})
        try:
            threading.Thread(target=self._write_output, daemon=True).start()
            if stdin:
                if self._terminal is None:
                    self._execution.on_stdin_closed = _close_input
                threading.Thread(target=self._read_input, daemon=True).start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _until_ended(self) -> ExecStatus:
        unheard: tuple[int, int] | None = None
        while True:
            if unheard is not None and not _wait(self._wakened, select.POLLIN, _UNHEARD):
                if self._offering and self._offered == unheard[1]:
                    raise _Gone(unheard[0])
                unheard = None
            _wait(self._wakened, select.POLLIN)
            (number,) = os.read(self._wakened, 1)
            if number:
                self._pass_on(number)
                if number in _DEADLY and self._offering:
                    unheard = (number, self._offered)
            elif isinstance(self._told, BaseException):
                raise self._told
            elif self._told is not None:
                return self._told

    def _tell(self, what: ExecStatus | BaseException) -> None:
        self._told = what
        os.write(self._waker, b"\0")

    # output

    def _write_output(self) -> None:
        closed: set[int] = set()
        try:
            for stream, data in self._execution:
                if stream in closed:
                    continue
                try:
                    self._output(stream, data)
                except BrokenPipeError:
                    if self._terminal is not None:
                        raise
                    # The command is told, and decides itself what becomes of it.
                    closed.add(stream)
                    self._execution.close_output(stream)
            self._tell(self._execution.wait())
        except BaseException as error:  # noqa: BLE001 - raised again by the main thread
            self._tell(error)

    # input

    def _read_input(self) -> None:
        try:
            while data := _read():
                self._offered += 1
                self._offering = True
                self._execution.write(data)
                self._offering = False
        except BrokenPipeError:
            return  # it has ended; its status is on the way
        except OSError:
            pass  # a folder, a terminal that hung up: nothing more to read
        if self._terminal is None:
            self._execution.close_stdin()
        else:
            self._tell(_Gone(signal.SIGHUP))

    # signals

    @contextlib.contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """What we were started to ignore (nohup, background) stays ignored."""
        caught = [*_PASSED, *([] if self._terminal is None else [signal.SIGWINCH])]
        before = {number: signal.getsignal(number) for number in caught}
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, _catch)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(-1)

    def _pass_on(self, number: int) -> None:
        if number == signal.SIGTSTP:
            self._suspend()
        elif number in (signal.SIGCONT, signal.SIGWINCH) and self._terminal is not None:
            if number == signal.SIGCONT:
                self._terminal.make_raw()
            if size := self._terminal.size():
                self._execution.resize(*size)
        else:
            self._execution.signal(number)

    def _suspend(self) -> None:
        """Stop, the command too, until told to go on. One with a terminal of its own waits for its terminal only."""
        if self._terminal is None:
            # Not TSTP: a process group that nobody manages, as in a box, would not stop.
            self._execution.signal(signal.SIGSTOP)
        else:
            self._terminal.restore()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)
        # We go on: told so, or at once where nobody manages us either.
        signal.signal(signal.SIGTSTP, _catch)
        self._pass_on(signal.SIGCONT)


def _catch(number: int, frame: object) -> None:
    """Nothing: that there is a handler has the kernel's own write the number."""
    del number, frame


def _read() -> bytes:
    """The next piece of standard input, empty at its end. Raises OSError: it can't be read."""
    while True:
        try:
            return os.read(0, _PIECE)
        except BlockingIOError:
            _wait(0, select.POLLIN)
        except OSError:
            if not _in_background():
                raise
            time.sleep(_BACKGROUND_PAUSE)


def _close_input() -> None:
    """Whoever writes to us is told that nobody reads; a thread that waits to read goes on waiting, harmlessly."""
    with contextlib.suppress(OSError):
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(nothing, 0)
        os.close(nothing)


def _in_background() -> bool:
    try:
        return os.tcgetpgrp(0) != os.getpgrp()
    except OSError:
        return False


def _wait(descriptor: int, event: int, seconds: float | None = None) -> bool:
    """Whether it is ready, within so many seconds."""
    waiting = select.poll()
    waiting.register(descriptor, event)
    return bool(waiting.poll(None if seconds is None else seconds * 1000))
