"""Our terminal while a command in the box has it: every key goes there, and afterwards all is as it was."""

from __future__ import annotations

import contextlib
import os
import termios
import tty
from collections.abc import Iterator

_STDIN = 0


class Terminal:
    """The terminal on standard input, as it was when this was made."""

    def __init__(self) -> None:
        self._before = termios.tcgetattr(_STDIN)

    def size(self) -> tuple[int, int] | None:
        """Columns and rows, or None where nobody has set them, or the terminal is gone."""
        try:
            columns, rows = os.get_terminal_size(_STDIN)
        except OSError:
            return None
        return (columns, rows) if columns and rows else None

    def make_raw(self) -> None:
        """Keys come one by one, unchanged and unseen; what was typed already is kept."""
        with contextlib.suppress(termios.error):
            tty.setraw(_STDIN, termios.TCSANOW)

    def restore(self) -> None:
        """As it was."""
        with contextlib.suppress(termios.error):
            termios.tcsetattr(_STDIN, termios.TCSANOW, self._before)

    @contextlib.contextmanager
    def raw(self) -> Iterator[None]:
        """Raw inside, restored on every way out."""
        try:
            self.make_raw()
            yield
        finally:
            self.restore()
