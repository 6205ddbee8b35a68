"""The whole terminal for a live picture: drawn in place on the alternate screen, and given back on every way out."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Sequence
from types import FrameType
from typing import Any, Final, Self

_STDIN: Final = 0
# Alternate screen, no cursor, no line that goes on in the next one; and all of that undone.
_ENTER: Final = "\x1b[?1049h\x1b[?25l\x1b[?7l"
_LEAVE: Final = "\x1b[?7h\x1b[?25h\x1b[?1049l"
_DEADLY: Final = (signal.SIGTERM, signal.SIGHUP)
_SPENT: Final = 4096
_USUAL_SIZE: Final = (80, 24)


class Ended(Exception):
    """A signal asks us to end, or the terminal is gone: end by this signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def usable() -> bool:
    """Whether standard output is a terminal that can be drawn on."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Screen:
    """The terminal while we have it. A context manager; within it TERM and HUP raise `Ended`."""

    def __init__(self) -> None:
        """Changes nothing yet."""
        # None: no keys come from there.
        self._before: list[Any] | None = termios.tcgetattr(_STDIN) if os.isatty(_STDIN) else None
        self._reads_keys = self._before is not None
        self._suspended = False
        # The kernel's handler writes signals' numbers here, so that one wakes us whenever it comes.
        self._wakened, self._waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Take it."""
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        try:
            for number, handler in (
                (signal.SIGWINCH, self._note),
                (signal.SIGTSTP, self._note),
                *((number, self._end) for number in _DEADLY),
            ):
                # What we were started to ignore (nohup) stays ignored.
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, handler)
            self._take()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Give it back; a signal does not cut that short."""
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTSTP, *_DEADLY})
        try:
            self._give_back()
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(-1)
            for descriptor in (self._wakened, self._waker):
                os.close(descriptor)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    @staticmethod
    def size() -> tuple[int, int]:
        """Columns and rows."""
        with contextlib.suppress(OSError):
            columns, rows = os.get_terminal_size(sys.stdout.fileno())
            if columns and rows:
                return columns, rows
        return _USUAL_SIZE

    def draw(self, lines: Sequence[str]) -> None:
        """Show these lines, cut where the screen ends, in place of what it shows.

        Raises:
            Ended: the terminal is gone.
        """
        shown = "\r\n".join(f"\x1b[K{line}" for line in lines[: self.size()[1]])
        try:
            self._write(f"\x1b[H{shown}\x1b[J" if len(lines) < self.size()[1] else f"\x1b[H{shown}")
        except OSError:
            raise Ended(signal.SIGHUP) from None

    def wait(self, seconds: float) -> str:
        """Wait so long, or until a key is pressed or the size has changed; the keys."""
        watched = [self._wakened, *([_STDIN] if self._reads_keys else [])]
        ready, _, _ = select.select(watched, [], [], max(0.0, seconds))
        if self._wakened in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wakened, _SPENT)
            if self._suspended:
                self._suspend()
        if _STDIN not in ready:
            return ""
        try:
            keys = os.read(_STDIN, _SPENT)
        except OSError:
            keys = b""
        self._reads_keys = bool(keys)
        return keys.decode(errors="replace")

    def _take(self) -> None:
        if self._before is not None:
            # Keys come one by one and unseen; Ctrl-C and Ctrl-Z stay what they are.
            tty.setcbreak(_STDIN, termios.TCSANOW)
        self._write(_ENTER)

    def _give_back(self) -> None:
        with contextlib.suppress(OSError):
            self._write(_LEAVE)
        if self._before is not None:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(_STDIN, termios.TCSANOW, self._before)

    def _suspend(self) -> None:
        """Stop until told to go on, with the terminal given back for the time."""
        self._suspended = False
        self._give_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self._note)
        self._take()

    def _note(self, number: int, _: FrameType | None) -> None:
        self._suspended = self._suspended or number == signal.SIGTSTP

    @staticmethod
    def _end(number: int, _: FrameType | None) -> None:
        raise Ended(number)

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
