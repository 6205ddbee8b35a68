"""One line on standard error that says what is waited for and for how long; only where a person watches."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from typing import Final, Self

from isolator.cli.text import cut, duration, escape

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
            columns = shutil.get_terminal_size().columns
            self._write(_CLEAR + cut(f"{escape(self._what)} … {passed}", columns - 1))
            if self._over.wait(_TICK):
                break
        self._write(_CLEAR)

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()
