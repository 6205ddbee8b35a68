"""The append-only, hash-chained record of every act.

An intent is durable (fdatasync) before the act it announces; its outcome is a second line. If a line can't be
written, the act is refused. Lines that wait at the same moment share one fdatasync.

Beside the log stands its head: number and hash of the last line, overwritten after each append. At start the log
may be ahead of the head (killed in between) but never behind it: a log cut shorter, or cut off while we were
away, is refused until an operator acknowledges. Someone who edits both log and head is not caught by this file
alone; `docs/threat-model.md` says so.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isolator.audit.entry import GENESIS, Kind, check_line, leaf_hash, render
from isolator.model.agent import timestamp
from isolator.model.errors import Unavailable
from isolator.model.identity import Principal

LOG_FILE = "audit.jsonl"
_BLOCK = 65536


@dataclass(frozen=True, slots=True)
class Head:
    """The last line: its number, its hash, and the log's size in bytes after it."""

    sequence: int
    hash: str
    size: int


class AuditLogDamaged(Exception):
    """The log does not continue what was written; serving on would hide it."""


class AuditLog:
    """The log of one daemon; opened once, written by one thread."""

    def __init__(self, folder: Path) -> None:
        """Open the log in `folder`, made if absent.

        Raises:
            AuditLogDamaged: truncated or broken at its end. BlockingIOError: another daemon has it open.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = folder / LOG_FILE
        self._head_path = folder / "head"
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._head_descriptor = os.open(self._head_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self.recovered = self._set_torn_aside()
        self.head = self._read_head()
        self._broken: str | None = None
        self._queue: queue.SimpleQueue[tuple[dict[str, Any], Future[None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="isolator-audit", daemon=True)
        self._thread.start()

    # writing

    async def intent(self, act: str, caller: Principal | None, **subject: Any) -> str:
        """Announce an act; durable on return. The id given back joins its outcome to it.

        Raises:
            Unavailable: `audit_unavailable`; the act must not happen.
        """
        number = secrets.token_hex(8)
        await self._append("intent", act, caller, number, subject)
        return number

    async def outcome(self, intent: str, act: str, result: str, **subject: Any) -> None:
        """Note how an announced act ended: `done`, `failed`, `undone`."""
        await self._append("outcome", act, None, intent, {"result": result, **subject})

    def outcome_later(self, intent: str, act: str, result: str, **subject: Any) -> None:
        """As `outcome`, without waiting for the disk: a kill in the next moment may lose it, and the intent tells.

        For acts that are many and whose end changes nothing that was promised. A log that can't be written refuses
        the next intent.
        """
        if self._broken is None:
            self._enqueue("outcome", act, None, intent, {"result": result, **subject})

    async def note(self, act: str, caller: Principal | None, **subject: Any) -> None:
        """Note what happened of itself (an exit, a refusal, a start of the daemon)."""
        await self._append("note", act, caller, secrets.token_hex(8), subject)

    async def _append(
        self, kind: Kind, act: str, caller: Principal | None, number: str, subject: dict[str, Any]
    ) -> None:
        if self._broken is not None:
            raise _unavailable(self._broken)
        await asyncio.wrap_future(self._enqueue(kind, act, caller, number, subject))

    def _enqueue(
        self, kind: Kind, act: str, caller: Principal | None, number: str, subject: dict[str, Any]
    ) -> Future[None]:
        record: dict[str, Any] = {
            "seq": 0,
            "time": timestamp(time.time()),
            "kind": kind,
            "act": act,
            "id": number,
            "actor": caller.owner if caller else "isolator",
        }
        if caller is not None:
            record["pid"] = caller.pid
        for field in ("team", "agent", "result"):
            if subject.get(field) is not None:
                record[field] = subject.pop(field)
            else:
                subject.pop(field, None)
        record["detail"] = subject
        done: Future[None] = Future()
        # From here on it can't be cancelled: a caller who hangs up only stops waiting, the line is written.
        done.set_running_or_notify_cancel()
        self._queue.put((record, done))
        return done

    def _write_all(self) -> None:
        ended = False
        while not ended:
            batch = [self._queue.get()]
            while not self._queue.empty():
                batch.append(self._queue.get())
            ended = None in batch
            waiting = [item for item in batch if item is not None]
            if not waiting:
                continue
            try:
                self._write([record for record, _ in waiting])
            except Exception as error:  # noqa: BLE001 - whatever it is, everybody who waits must hear of it
                reason = getattr(error, "strerror", None) or type(error).__name__
                for _, done in waiting:
                    done.set_exception(_unavailable(reason))
            else:
                for _, done in waiting:
                    done.set_result(None)

    def _write(self, records: list[dict[str, Any]]) -> None:
        sequence, previous = self.head.sequence, self.head.hash
        lines: list[bytes] = []
        for record in records:
            sequence += 1
            line = render({**record, "seq": sequence, "prev": previous})
            previous = leaf_hash(line)
            lines.append(line + b"\n")
        data = b"".join(lines)
        try:
            _write_whole(self._descriptor, data)
            os.fdatasync(self._descriptor)
        except OSError:
            # Half a line would break the chain for whoever comes next.
            try:
                os.ftruncate(self._descriptor, self.head.size)
            except OSError:
                self._broken = "a torn line could not be taken back"
            raise
        self.head = Head(sequence, previous, self.head.size + len(data))
        os.pwrite(self._head_descriptor, f"{sequence:020d} {previous} {self.head.size:020d}\n".encode(), 0)

    def close(self) -> None:
        """Write what waits and close."""
        self._broken = "it is closed"
        self._queue.put(None)
        self._thread.join(timeout=10)
        os.close(self._descriptor)
        os.close(self._head_descriptor)

    # start

    def _set_torn_aside(self) -> str | None:
        """Cut a last line without its newline, which no act was waiting for; its hash, or None."""
        size = os.fstat(self._descriptor).st_size
        end = _after_last_newline(self._descriptor, size)
        if end == size:
            return None
        torn = os.pread(self._descriptor, size - end, end)
        aside = self.path.with_suffix(f".torn-{int(time.time())}")
        aside.write_bytes(torn)
        os.ftruncate(self._descriptor, end)
        os.fsync(self._descriptor)
        return leaf_hash(torn)

    def _noted(self) -> tuple[int, str] | None:
        """Number and hash the head file speaks of; None for a new one."""
        text = os.pread(self._head_descriptor, 256, 0)
        if not text:
            return None
        try:
            number, digest, _ = text.split()
            return int(number), digest.decode("ascii")
        except ValueError as error:
            raise AuditLogDamaged(f"{self._head_path} is not what isolator wrote there") from error

    def _read_head(self) -> Head:
        size = os.fstat(self._descriptor).st_size
        noted = self._noted()
        if size == 0:
            if noted is not None and noted[0] > 0:
                raise AuditLogDamaged(f"{self.path} is empty but had {noted[0]} entries")
            return Head(0, GENESIS, 0)
        start = _after_last_newline(self._descriptor, size - 1)
        line = os.pread(self._descriptor, size - start, start).rstrip(b"\n")
        try:
            record = json.loads(line)
            sequence = int(record["seq"])
            check_line(line, sequence, str(record["prev"]))
        except (ValueError, KeyError, TypeError) as error:
            raise AuditLogDamaged(f"the last line of {self.path} is no audit entry") from error
        head = Head(sequence, leaf_hash(line), size)
        if noted is not None:
            noted_sequence, noted_hash = noted
            if sequence < noted_sequence or (sequence == noted_sequence and head.hash != noted_hash):
                raise AuditLogDamaged(
                    f"{self.path} ends at entry {sequence}, but {noted_sequence} were written: it was cut or edited"
                )
        return head


def _write_whole(descriptor: int, data: bytes) -> None:
    if os.write(descriptor, data) != len(data):
        raise OSError(28, "the disk took only part of the audit line")


def _unavailable(reason: str) -> Unavailable:
    return Unavailable(
        "audit_unavailable",
        f"The audit log can't be written ({reason}), so nothing may be done. Free or repair its disk.",
    )


def _after_last_newline(descriptor: int, end: int) -> int:
    """Offset behind the last newline before `end`, 0 if there is none."""
    while end > 0:
        start = max(0, end - _BLOCK)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def lines_of(path: Path, size: int | None = None) -> Iterator[bytes]:
    """Lines of a log, without newlines, a torn last one too; of its first `size` bytes only, if given."""
    position = 0
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            if size is not None and position > size:
                return
            yield line.rstrip(b"\n")
