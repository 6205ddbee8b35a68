"""Reading the audit log: is it whole, and what does it say. Works on the file, beside a running daemon or without."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isolator.audit.entry import GENESIS, check_line, leaf_hash
from isolator.audit.log import lines_of


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether a log is whole: entries read, hash of the last, and the first flaw found, if any."""

    entries: int
    head: str
    problem: str | None

    def answer(self) -> dict[str, Any]:
        """In JSON."""
        return {
            "ok": self.problem is None,
            "entries": self.entries,
            "head": self.head,
            "problem": self.problem,
        }


def verify(path: Path, *, expected_entries: int | None = None, size: int | None = None) -> Verification:
    """Check every line's number and chain.

    Args:
        path: the log.
        size: how many bytes of it, for one that is being written; None for all.
        expected_entries: how many it must have at least; fewer is truncation.
    """
    entries, previous = 0, GENESIS
    for line in lines_of(path, size):
        try:
            check_line(line, entries + 1, previous)
        except ValueError as error:
            return Verification(entries, previous, f"line {entries + 1} {error}")
        entries += 1
        previous = leaf_hash(line)
    if expected_entries is not None and entries < expected_entries:
        return Verification(
            entries, previous, f"the log ends at {entries}, but {expected_entries} entries were written"
        )
    return Verification(entries, previous, None)


def noted_entries(folder: Path) -> int | None:
    """How many entries the head beside the log speaks of; None where there is no head."""
    try:
        return int((folder / "head").read_bytes().split()[0])
    except (OSError, ValueError, IndexError):
        return None


@dataclass(frozen=True, slots=True)
class Query:
    """What to look for; None matches everything. `since` and `until` are RFC 3339 texts in UTC."""

    act: str | None = None
    actor: str | None = None
    team: str | None = None
    agent: str | None = None
    since: str | None = None
    until: str | None = None
    limit: int = 100


def search(path: Path, query: Query) -> list[dict[str, Any]]:
    """The newest entries that match, oldest of them first."""
    found: deque[dict[str, Any]] = deque(maxlen=query.limit)
    for line in lines_of(path):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and _matches(record, query):
            found.append(record)
    return list(found)


def _matches(record: dict[str, Any], query: Query) -> bool:
    for field in ("actor", "team", "agent"):
        wanted = getattr(query, field)
        if wanted is not None and record.get(field) != wanted:
            return False
    act = str(record.get("act", ""))
    if query.act is not None and act != query.act and not act.startswith(query.act + "."):
        return False
    moment = str(record.get("time", ""))
    return (query.since is None or moment >= query.since) and (query.until is None or moment <= query.until)
