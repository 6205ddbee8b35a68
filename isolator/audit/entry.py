"""One line of the audit log: how it is written, chained and checked. Pure.

A line is JSON text; its hash is SHA-256 over a zero byte and the stored bytes without the newline (the leaf hash of
RFC 6962, so that a Merkle tree over the same lines can come later). Each line holds the hash of the one before.
What is hashed is always the bytes as stored, never a second rendering of them.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

Kind = Literal["intent", "outcome", "note"]

GENESIS = "0" * 64
MAX_LINE = 8192
_MAX_TEXT = 512


def leaf_hash(line: bytes) -> str:
    """The hash of a stored line (without its newline), 64 hex digits."""
    return hashlib.sha256(b"\x00" + line).hexdigest()


def render(record: dict[str, Any]) -> bytes:
    """The line for a record, without a newline: ASCII, no control characters, at most MAX_LINE bytes.

    Long texts are cut, and a record that is still too long loses its detail, never its act or actor.
    """
    line = json.dumps(_bounded(record), separators=(",", ":"), sort_keys=False).encode()
    if len(line) > MAX_LINE:
        line = json.dumps({**_bounded(record), "detail": {"cut": len(line)}}, separators=(",", ":")).encode()
    return line


def _bounded(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= _MAX_TEXT else value[:_MAX_TEXT] + "…"
    if isinstance(value, dict):
        return {str(key)[:_MAX_TEXT]: _bounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_bounded(item) for item in value]
    return value


def check_line(line: bytes, sequence: int, previous: str) -> dict[str, Any]:
    """The record of a line that must be entry `sequence` after the hash `previous`.

    Raises:
        ValueError: it is not; the text says why.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError("is not JSON") from error
    if not isinstance(record, dict):
        raise ValueError("is not an object")  # noqa: TRY004 - every flaw of a line is a ValueError
    if record.get("seq") != sequence:
        raise ValueError(f"has number {record.get('seq')} where {sequence} belongs")
    if record.get("prev") != previous:
        raise ValueError("does not follow from the line before it: something was edited, removed or inserted here")
    return record
