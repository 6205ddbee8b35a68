"""Reading the audit log takes bounded memory, one thread, and nobody's time but the reader's own."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolator.api.metrics import Metrics
from isolator.api.parts import Parts
from isolator.api.server import ApiServer
from isolator.audit.log import AuditLog
from isolator.audit.reading import Query, Stopped, find, search, verify
from isolator.model.identity import Principal

ADA = Principal(1000, 1000, (), 77)
BOB = Principal(2000, 2000, (), 88)


def write_lines(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


async def test_what_is_found_is_bounded_in_bytes_and_says_so(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    for number in range(20):
        await log.note("agent.spawn", ADA if number % 2 else BOB, text="x" * 400, n=number)
    log.close()
    everything = find(log.path, Query())
    assert (len(everything.items), everything.truncated) == (20, False)
    some = find(log.path, Query(), most_bytes=3000)
    assert some.truncated
    assert some.items == everything.items[-len(some.items) :]
    assert 3 <= len(some.items) < 20
    # A limit that is reached first is what was asked for, and nothing was left out.
    assert find(log.path, Query(limit=2), most_bytes=3000).truncated is False
    assert [item["detail"]["n"] for item in find(log.path, Query(limit=2), most_bytes=3000).items] == [18, 19]
    nothing = find(log.path, Query(), most_bytes=10)
    assert (nothing.items, nothing.truncated) == ([], True)


_TEXTS = st.sampled_from(["uid:1000", "uid:100", "a", 'a"', "a\\", "ä", "a.b", "a b", ""])
_RECORDS = st.lists(st.fixed_dictionaries({"actor": _TEXTS, "act": _TEXTS, "team": _TEXTS}), max_size=6)


@settings(max_examples=200, deadline=None)
@given(_RECORDS, _TEXTS, st.sampled_from(["actor", "act", "team"]), st.booleans(), st.booleans())
def test_lines_are_found_however_they_are_written(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[dict[str, str]],
    wanted: str,
    field: str,
    escaped: bool,
    spaced: bool,
) -> None:
    """Lines that can't match are passed over unread; one that somebody wrote by hand must not be among them."""
    lines = []
    for record in records:
        line = json.dumps(record, ensure_ascii=escaped, separators=(", ", ": ") if spaced else (",", ":"))
        lines.append((line.replace("uid", "\\u0075id") if escaped else line).encode())
    path = write_lines(tmp_path_factory.mktemp("log") / "audit.jsonl", *lines)

    def matches(record: dict[str, str]) -> bool:
        return record[field] == wanted or (field == "act" and record["act"].startswith(wanted + "."))

    assert search(path, Query(**{field: wanted})) == [record for record in records if matches(record)]


async def test_a_reading_nobody_waits_for_ends(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    await log.note("one", None)
    log.close()
    stop = threading.Event()
    assert find(log.path, Query(), stop=stop).items
    assert verify(log.path, stop=stop).problem is None
    stop.set()
    with pytest.raises(Stopped):
        find(log.path, Query(), stop=stop)
    with pytest.raises(Stopped):
        verify(log.path, stop=stop)


class EndlessLog:
    """A log whose end is never reached: a pipe that gets a line now and then, as long as somebody reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begun, self.left = threading.Event(), threading.Event()
        self._end = threading.Event()
        os.mkfifo(path)
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        with contextlib.suppress(BrokenPipeError), self.path.open("wb", buffering=0) as pipe:
            self.begun.set()
            while not self._end.wait(0.01):
                pipe.write(b'{"seq":1,"time":"2030","actor":"uid:0","act":"x"}\n')
        self.left.set()

    def close(self) -> None:
        self._end.set()
        # Whoever waits at either end of the pipe goes on.
        os.close(os.open(self.path, os.O_RDWR | os.O_NONBLOCK))
        self._thread.join(10)


@pytest.fixture
async def endless(tmp_path: Path) -> AsyncIterator[EndlessLog]:
    """Ended before the loop is, which waits for whoever still reads."""
    log = EndlessLog(tmp_path / "endless")
    try:
        yield log
    finally:
        log.close()


class Asker:
    """One request on a connection of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def ask(self, line: str) -> asyncio.StreamWriter:
        self._reader, self._writer = await asyncio.open_unix_connection(self._path)
        self._writer.write(f"{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return self._writer

    async def answer(self) -> tuple[int, dict[str, Any], str]:
        """Status, body, and the head as it came."""
        try:
            head, _, body = (await self._reader.read()).partition(b"\r\n\r\n")
        finally:
            self._writer.close()
        return int(head.split()[1]), json.loads(body), head.decode()


@contextlib.asynccontextmanager
async def serving(audit: Any, folder: Path) -> AsyncIterator[Path]:
    """The API's socket, of a daemon that has nothing but this audit log."""
    chosen = SimpleNamespace(max_body=1000, request_timeout=10, max_connections=100, admin_uids=[os.geteuid()])
    given: dict[str, Any] = {"settings": chosen, "audit": audit, "metrics": Metrics()}
    others = {part.name: None for part in dataclasses.fields(Parts) if part.default_factory is dataclasses.MISSING}
    server = ApiServer(Parts(**(others | given)))
    path = folder / "api.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(100)
    listener.setblocking(False)
    await server.start([listener])
    try:
        yield path
    finally:
        await server.stop()


async def ask(path: Path, line: str) -> tuple[int, dict[str, Any], str]:
    asker = Asker(path)
    await asker.ask(line)
    return await asyncio.wait_for(asker.answer(), 10)


async def test_many_searches_hold_up_nobody_and_end_when_their_askers_leave(
    tmp_path: Path, endless: EndlessLog
) -> None:
    log = AuditLog(tmp_path / "audit")
    await log.note("agent.spawn", ADA)
    audit = SimpleNamespace(path=endless.path, head=log.head)
    async with serving(audit, tmp_path) as path:
        askers = [Asker(path) for _ in range(40)]
        writers = [await asker.ask("GET /v1/audit?limit=1") for asker in askers]
        answers = [asyncio.create_task(asker.answer()) for asker in askers]
        try:
            # What spawns do on the loop's own threads still finds one.
            await asyncio.wait_for(asyncio.to_thread(int), 5)
            done: set[asyncio.Task[Any]] = set()
            async with asyncio.timeout(10):
                while len(done) < 35:
                    done, _ = await asyncio.wait(answers, timeout=0.1)
            for answer in done:
                status, body, head = answer.result()
                assert (status, body["code"]) == (429, "audit_busy")
                assert "Retry-After: 2" in head
            # One reads, four wait, and whoever verifies waits for none of them.
            audit.path = log.path
            status, body, _ = await ask(path, "POST /v1/audit/verify")
            assert (status, body["ok"], body["entries"]) == (200, True, 1)
            assert sum(not answer.done() for answer in answers) == 5
            assert not endless.left.is_set()
        finally:
            for writer, answer in zip(writers, answers, strict=True):
                writer.close()
                answer.cancel()
        assert await asyncio.to_thread(endless.left.wait, 5), "the search went on for nobody"
        status, body, _ = await ask(path, "GET /v1/audit")
        assert (status, len(body["items"]), body["next"], "truncated" in body) == (200, 1, None, False)
    log.close()


@pytest.mark.engine  # needs none, but ten seconds, which the quick tests do not have
async def test_a_stop_of_the_server_ends_a_search(tmp_path: Path, endless: EndlessLog) -> None:
    async with serving(SimpleNamespace(path=endless.path), tmp_path) as path:
        asker = Asker(path)
        writer = await asker.ask("GET /v1/audit")
        assert await asyncio.to_thread(endless.begun.wait, 5)
        assert not endless.left.is_set()
    assert await asyncio.to_thread(endless.left.wait, 5)
    writer.close()


async def test_an_answer_of_a_long_log_is_cut_and_says_so(tmp_path: Path) -> None:
    line = b'{"seq":1,"time":"2030","actor":"uid:0","act":"x","detail":{"text":"%s"}}' % (b"x" * 7000)
    log = write_lines(tmp_path / "audit.jsonl", *[line] * 1000)
    async with serving(SimpleNamespace(path=log), tmp_path) as path:
        status, body, head = await ask(path, "GET /v1/audit?limit=10000")
        assert (status, body["truncated"], body["next"]) == (200, True, None)
        assert (4 << 20) - 8192 < len(body["items"]) * len(line) <= 4 << 20
        assert "Content-Type: application/json" in head
        status, body, _ = await ask(path, "GET /v1/audit?limit=500")
        assert (status, "truncated" in body, len(body["items"])) == (200, False, 500)
