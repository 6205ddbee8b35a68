"""Reading the audit log: is it whole, and what does it say. Works on the file, beside a running daemon or without."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from isolator.audit.entry import GENESIS, check_line, leaf_hash
from isolator.audit.log import LOG_FILE, lines_of
from isolator.model.agent import timestamp
from isolator.model.errors import TooMany

Result = TypeVar("Result")
_MOST_WAITING = 4
_FIELDS = ("actor", "team", "agent")


class Stopped(Exception):
    """Nobody waits for what was being read."""


class LogReader:
    """One thread that reads the log for requests, and the few of them that may wait for it.

    The log may be long and anybody may ask. Reading it must not take the threads that others need, nor more than one
    core, nor go on for a caller who has hung up.
    """

    def __init__(self) -> None:
        """Nothing runs yet."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="isolator-audit-reader")
        # Waiting is done here, not in the thread's queue: that one keeps what was cancelled until its turn comes.
        self._turn = asyncio.Lock()
        self._present = 0

    async def run(self, work: Callable[[threading.Event], Result]) -> Result:
        """What `work` returns. The flag it is given is set when nobody waits any more; it must look at it.

        Raises:
            TooMany: `audit_busy`.
        """
        if self._present > _MOST_WAITING:
            raise TooMany("audit_busy", "Others read the audit log now, and more wait. Try again.", retry_after=2)
        self._present += 1
        stop = threading.Event()
        try:
            async with self._turn:
                return await asyncio.get_running_loop().run_in_executor(self._thread, work, stop)
        finally:
            stop.set()
            self._present -= 1


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


def verify(
    path: Path,
    *,
    expected_entries: int | None = None,
    size: int | None = None,
    stop: threading.Event | None = None,
) -> Verification:
    """Check every line's number and chain.

    Args:
        path: the log.
        size: how many bytes of it, for one that is being written; None for all.
        expected_entries: how many it must have at least; fewer is truncation.
        stop: ends the reading once it is set.

    Raises:
        Stopped: `stop` was set.
    """
    entries, previous = 0, GENESIS
    for line in _until(stop, lines_of(path, size)):
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


def verify_folder(folder: Path) -> Verification:
    """Check the log in a daemon's audit folder, or a copy of one, against the head beside it.

    Raises:
        OSError: it can't be read.
    """
    path, noted = folder / LOG_FILE, noted_entries(folder)
    if not path.exists():
        folder.stat()
        return Verification(0, GENESIS, f"{path} is gone, with {noted} entries" if noted else None)
    return verify(path, expected_entries=noted)


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


def moment_text(text: str) -> str:
    """A moment (RFC 3339, UTC if it names no zone) as the log writes moments, so that the texts compare.

    Raises:
        ValueError, OverflowError: it is none.
    """
    moment = datetime.fromisoformat(text)
    return str(timestamp((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()))


@dataclass(frozen=True, slots=True)
class Found:
    """Entries that match, oldest first; `truncated` if there were older ones that the bound on bytes left out."""

    items: list[dict[str, Any]]
    truncated: bool


def search(path: Path, query: Query) -> list[dict[str, Any]]:
    """The newest entries that match, oldest of them first."""
    return find(path, query).items


def find(path: Path, query: Query, *, most_bytes: int | None = None, stop: threading.Event | None = None) -> Found:
    """The newest entries that match, together at most `most_bytes` long as they stand in the log.

    Raises:
        Stopped: `stop` was set.
    """
    # Lines, not records: what was parsed takes ten times the memory.
    found: deque[bytes] = deque()
    held, matching = 0, 0
    needles = _needles(query)
    for line in _until(stop, lines_of(path)):
        if not _may_match(line, needles) or (record := _record(line)) is None or not _matches(record, query):
            continue
        matching += 1
        found.append(line)
        held += len(line)
        while len(found) > query.limit or (most_bytes is not None and held > most_bytes):
            held -= len(found.popleft())
    items = [record for line in found if (record := _record(line)) is not None]
    return Found(items, truncated=len(items) < min(matching, query.limit))


def _until(stop: threading.Event | None, lines: Iterator[bytes]) -> Iterator[bytes]:
    for line in lines:
        if stop is not None and stop.is_set():
            raise Stopped
        yield line


def _needles(query: Query) -> list[bytes]:
    """Bytes that a line must hold to match, unless something in it is escaped."""
    wanted = [(value, '"') for field in _FIELDS if (value := getattr(query, field)) is not None]
    if query.act is not None:
        wanted.append((query.act, ""))  # or its first part: the text may go on
    # Only texts that JSON can write in no other way without a backslash.
    return [f'"{value}{end}'.encode() for value, end in wanted if json.dumps(value) == f'"{value}"']


def _may_match(line: bytes, needles: list[bytes]) -> bool:
    """Whether it is worth parsing. Finding bytes is many times faster, and most lines are somebody else's."""
    return b"\\" in line or all(needle in line for needle in needles)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _matches(record: dict[str, Any], query: Query) -> bool:
    for field in _FIELDS:
        wanted = getattr(query, field)
        if wanted is not None and record.get(field) != wanted:
            return False
    act = str(record.get("act", ""))
    if query.act is not None and act != query.act and not act.startswith(query.act + "."):
        return False
    moment = str(record.get("time", ""))
    return (query.since is None or moment >= query.since) and (query.until is None or moment <= query.until)
