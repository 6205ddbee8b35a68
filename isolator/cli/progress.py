"""One line on standard error for a person who waits: for what and for how long, or how far an agent says it is."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Self

from isolator.cli.text import cut, duration, escape, progress

if TYPE_CHECKING:
    from isolator.client import Client, EventStream

_QUIET: Final = 1.0
_TICK: Final = 0.5
_CLEAR: Final = "\r\x1b[K"


class Progress:
    """Shows itself after a second of waiting, and is gone when the wait is over. A context manager."""

    def __init__(self, what: str, *, enabled: bool) -> None:
        """`enabled` False, or a standard error that is no terminal: says nothing at all."""
        self._what = what
        self._enabled = enabled and sys.stderr.isatty()
        self._started = time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def say(self, what: str) -> None:
        """What is waited for now."""
        self._what = what

    def __enter__(self) -> Self:
        if self._enabled:
            self._thread = threading.Thread(target=self._show, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=1)

    def _show(self) -> None:
        if self._over.wait(_QUIET):
            return
        while True:
            passed = duration(time.monotonic() - self._started)
            _say(f"{self._what} … {passed}")
            if self._over.wait(_TICK):
                break
        _say("")


class ProgressLine:
    """What an agent says of its progress, below its output while that comes. A context manager.

    It gives way to the output, and is not shown while the last line of that is unfinished. It is an extra: where the
    daemon has no stream left for it, there is none.
    """

    def __init__(self, client: Client, agent: str) -> None:
        """Where standard error is no terminal it says nothing at all."""
        self._client = client
        self._agent = agent
        self._events: EventStream | None = None
        self._lock = threading.Lock()
        self._text = ""
        self._shown = False
        self._at_start_of_line = True
        self._over = False

    def __enter__(self) -> Self:
        from isolator.client import IsolatorClientError  # noqa: PLC0415 - loaded with the client anyway

        if sys.stderr.isatty():
            with contextlib.suppress(IsolatorClientError):
                self._events = self._client.events(agent=self._agent)
                threading.Thread(target=self._listen, name="agent-progress", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()
        with self._lock:
            self._hide()
            self._over = True

    def around(self, write: Callable[[int, bytes], None]) -> Callable[[int, bytes], None]:
        """The same, with the line out of the way meanwhile."""
        if self._events is None:
            return write

        def write_above(stream: int, data: bytes) -> None:
            with self._lock:
                self._hide()
                write(stream, data)
                if data and os.isatty(stream):
                    self._at_start_of_line = data.endswith(b"\n")
                self._show()

        return write_above

    def hide(self) -> None:
        """Take it away until there is news."""
        self._set("")

    def _listen(self) -> None:
        from isolator.client import IsolatorClientError, Progress  # noqa: PLC0415 - as above

        assert self._events is not None
        with contextlib.suppress(IsolatorClientError, OSError):
            for event in self._events:
                told = Progress.from_answer(event.data) if event.type == "agent.progress" else None
                if told is not None:
                    self._set(progress(told.text, told.fraction, told.elapsed))

    def _set(self, text: str) -> None:
        with self._lock:
            self._hide()
            self._text = text
            self._show()

    def _hide(self) -> None:
        if self._shown:
            _say("")
            self._shown = False

    def _show(self) -> None:
        if self._text and self._at_start_of_line and not self._over:
            _say(self._text)
            self._shown = True


def _say(text: str) -> None:
    """The line, in place of what it was; an empty text takes it away."""
    columns = shutil.get_terminal_size().columns
    sys.stderr.write(_CLEAR + cut(escape(text), columns - 1))
    sys.stderr.flush()
