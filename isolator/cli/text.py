"""Text for people: aligned tables, short times and sizes, and nothing an agent wrote shown raw.

Names, commands and exit details come from agents and from whoever spawned them. A terminal obeys control
characters, and bidirectional marks make a name look like another, so whatever is not printable is shown as
its code instead.
"""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

_GAP: Final = "  "
_NARROWEST: Final = 8
_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_ESCAPES: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def escape(value: Any, *, keep: str = "") -> str:
    r"""The text with every character that is not printable as its code: `\n`, `\x1b`, `\u202e`."""
    text = "" if value is None else str(value)
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in keep else _ESCAPES.get(letter, _code(letter)) for letter in text
    )


def _code(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")


def width(text: str) -> int:
    """Columns a terminal needs for it: two for wide letters, none for marks that sit on another."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def cut(text: str, columns: int) -> str:
    """The text in so many columns; what was cut shows as an ellipsis."""
    if width(text) <= columns:
        return text
    kept, used = "", 0
    for letter in text:
        used += width(letter)
        if used > columns - 1:
            break
        kept += letter
    return kept + "…"


def terminal_columns() -> int | None:
    """How wide the terminal on standard output is; None when that is no terminal, and nothing is cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    flexible: Sequence[int] = (),
    columns: int | None = None,
) -> str:
    """Aligned columns; every cell is escaped.

    Args:
        headers: one a column.
        rows: cells; None is shown as `-`.
        flexible: columns that may be cut (with an ellipsis) where the terminal is narrow. Ids never are.
        columns: the terminal's width; None for as wide as it takes. Where even cut columns don't fit, each
        row
            becomes a block of `HEADER: value` lines: cut in half, a table tells wrong things.
    """
    cells = [["-" if cell is None or cell == "" else escape(cell) for cell in row] for row in rows]
    widths = [max([width(header), *(width(row[i]) for row in cells)]) for i, header in enumerate(headers)]
    if columns is not None:
        for index in flexible:
            over = sum(widths) + len(_GAP) * (len(widths) - 1) - columns
            if over > 0:
                least = max(_NARROWEST, width(headers[index]))
                widths[index] = max(min(widths[index], least), widths[index] - over)
        if sum(widths) + len(_GAP) * (len(widths) - 1) > columns:
            return _blocks(headers, cells)
    lines = [_line(headers, widths), *(_line(row, widths) for row in cells)]
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    fitted = (cut(cell, columns) for cell, columns in zip(cells, widths, strict=True))
    padded = (cell + " " * (columns - width(cell)) for cell, columns in zip(fitted, widths, strict=True))
    return _GAP.join(padded).rstrip()


def _blocks(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n\n".join(
        "\n".join(f"{header}: {cell}" for header, cell in zip(headers, row, strict=True)) for row in rows
    )


def fields(pairs: Sequence[tuple[str, Any]]) -> str:
    """`name: value` lines with the values under each other, escaped; what is None is left out."""
    shown = [(name, escape(value)) for name, value in pairs if value is not None]
    longest = max((width(name) for name, _ in shown), default=0)
    return "\n".join(f"{name + ':':<{longest + 1}} {value}".rstrip() for name, value in shown)


def duration(seconds: float) -> str:
    """Roughly how long, in two units at most: `4.2 s`, `3 min`, `2 h 5 min`, `3 d 4 h`."""
    if seconds < _MINUTE:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    if whole < _HOUR:
        return f"{whole // _MINUTE} min"
    if whole < _DAY:
        return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"
    return f"{whole // _DAY} d {whole % _DAY // _HOUR} h"


def progress(text: str | None, fraction: float | None, elapsed: float | None) -> str:
    """How far an agent says it is: `42% fetching pages (12 s)`; not escaped."""
    done = "" if fraction is None else f"{int(min(max(fraction, 0.0), 1.0) * 100)}%"
    took = "" if elapsed is None else f"({f'{elapsed:.0f} s' if elapsed < _MINUTE - 0.5 else duration(elapsed)})"
    return " ".join(part for part in (done, text, took) if part)


def age(moment: str | None) -> str:
    """How long ago an RFC 3339 time was; `-` for none, the text itself if it is no such time."""
    if not moment:
        return "-"
    try:
        then = datetime.fromisoformat(moment)
    except ValueError:
        return moment
    return duration(max(0.0, (datetime.now(UTC) - then).total_seconds()))
