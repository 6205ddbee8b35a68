"""Sizes as people write them: `512m`, `1.5g`, or a number of bytes."""

from __future__ import annotations

import re
from typing import Any

_UNITS = {"": 1, "b": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_SIZE = re.compile(r"(\d{1,15})(?:\.(\d{1,3}))?\s*([bkmgt]?)(?:i?b)?\Z", re.ASCII)
_LARGEST = 2**53


def parse_size(value: Any) -> int:
    """Bytes from an integer or a text such as `512m`.

    Raises:
        ValueError: not a size; booleans, floats, signs and exponents are none.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("a size is a whole number of bytes or a text such as '512m'")  # noqa: TRY004 - pydantic wants it
    if isinstance(value, int):
        size = value
    else:
        match = _SIZE.match(value.strip().lower())
        if match is None:
            raise ValueError(f"{value[:40]!r} is no size: write bytes, or a number with k, m, g or t")
        whole, fraction, unit = match.groups()
        factor = _UNITS[unit]
        size = int(whole) * factor + (int(fraction) * factor // 10 ** len(fraction) if fraction else 0)
    if not -_LARGEST <= size <= _LARGEST:
        raise ValueError("a size of more than 2**53 bytes is not meant")
    return size


def format_size(size: int) -> str:
    """A size for people: `512m`, `1.5g`, `100`."""
    for unit in ("t", "g", "m", "k"):
        factor = _UNITS[unit]
        if size >= factor:
            return f"{size / factor:.4g}{unit}"
    return str(size)
