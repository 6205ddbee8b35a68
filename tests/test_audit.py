"""The audit log: what is written stays whole, what was changed afterwards is found, no act goes without its line."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolator.audit.entry import GENESIS, MAX_LINE, check_line, leaf_hash, render
from isolator.audit.log import AuditLog, lines_of
from isolator.audit.reading import Query, noted_entries, search, verify
from isolator.model.errors import Unavailable
from isolator.model.identity import Principal

ADA = Principal(1000, 1000, (), 77)
BOB = Principal(2000, 2000, (), 88)


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


async def test_each_line_holds_who_what_and_the_line_before(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    intent = await log.intent("agent.spawn", ADA, team="crew", agent="a1", image="x")
    await log.outcome(intent, "agent.spawn", "done", team="crew", agent="a1")
    await log.note("daemon.stop", None)
    log.close()
    first, second, third = (json.loads(line) for line in lines(log.path))
    assert (first["seq"], first["prev"], first["kind"], first["actor"], first["pid"]) == (
        1,
        GENESIS,
        "intent",
        "uid:1000",
        77,
    )
    assert (first["team"], first["agent"], first["detail"]) == ("crew", "a1", {"image": "x"})
    assert (second["id"], second["kind"], second["result"]) == (intent, "outcome", "done")
    assert second["prev"] == leaf_hash(lines(log.path)[0].rstrip(b"\n"))
    assert (third["actor"], third["detail"]) == ("isolator", {})
    assert [item["time"] for item in (first, second, third)] == sorted(item["time"] for item in (first, second, third))
    assert verify(log.path, expected_entries=3).answer() == {
        "ok": True, "entries": 3, "head": leaf_hash(lines(log.path)[2].rstrip(b"\n")), "problem": None,
    }  # fmt: skip
    assert mode_of(log.path) == 0o600


async def test_a_line_is_on_disk_when_the_intent_returns(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit")
    await log.intent("agent.spawn", ADA, team="crew")
    assert len(lines(log.path)) == 1
    assert noted_entries(tmp_path / "audit") == 1
    log.close()


async def test_many_at_once_all_come_back_and_share_their_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(tmp_path)
    syncs: list[int] = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: (syncs.append(1), real(descriptor))[1])
    ids = await asyncio.wait_for(asyncio.gather(*(log.intent("act", ADA, n=n) for n in range(500))), 30)
    log.close()
    records = [json.loads(line) for line in lines(log.path)]
    assert len(set(ids)) == 500
    assert {record["id"] for record in records} == set(ids)
    assert [record["seq"] for record in records] == list(range(1, 501))
    assert verify(log.path, expected_entries=500).problem is None
    assert len(syncs) < 250


async def test_two_writers_are_refused(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    with pytest.raises(BlockingIOError):
        AuditLog(tmp_path)
    log.close()
    AuditLog(tmp_path).close()


async def test_a_log_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "audit").mkdir()
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / "audit" / "audit.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        AuditLog(tmp_path / "audit")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tiny"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=True, timeout=10)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=10)


def enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=256k", str(disk)], check=True, timeout=10)


async def test_a_full_disk_refuses_the_act_and_keeps_the_chain(tiny_disk: Path) -> None:
    log = AuditLog(tiny_disk / "audit")
    written = 0
    refusal = None
    while refusal is None:
        try:
            await asyncio.wait_for(log.intent("agent.spawn", ADA, text="x" * 400), 10)
            written += 1
        except Unavailable as error:
            refusal = error
    assert refusal.code == "audit_unavailable"
    assert "disk" in refusal.detail
    assert 10 < written < 1000
    with pytest.raises(Unavailable):
        await log.note("still full", None, text="y" * 500)
    assert verify(log.path, expected_entries=written).problem is None
    assert len(lines(log.path)) == written
    # Room again: the next act is written and follows on.
    enlarge(tiny_disk)
    await log.intent("agent.spawn", ADA)
    log.close()
    assert verify(log.path, expected_entries=written + 1).problem is None
    AuditLog(tiny_disk / "audit").close()


async def test_what_can_not_be_written_down_refuses_the_act_and_not_the_next(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    with pytest.raises(Unavailable):
        await asyncio.wait_for(log.intent("act", ADA, strange=object()), 10)
    await asyncio.wait_for(log.intent("act", ADA, fine=1), 10)
    log.close()
    assert verify(log.path, expected_entries=1).problem is None


async def test_after_closing_nothing_is_promised(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    log.close()
    with pytest.raises(Unavailable):
        await asyncio.wait_for(log.intent("late", ADA), 10)


_VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.text(max_size=600),
        st.sampled_from(["\n", "\r\n{}", "\x00", "\u2028", "\ud800"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=20), inner, max_size=4)),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=20), _VALUES, max_size=6), st.text(max_size=60))
def test_whatever_is_noted_is_one_bounded_line(detail: dict[str, Any], act: str) -> None:
    record = {"seq": 1, "act": act, "actor": "uid:1000", "detail": detail, "prev": GENESIS}
    line = render(record)
    assert len(line) <= MAX_LINE
    assert line.isascii()
    assert not any(byte < 0x20 or byte == 0x7F for byte in line)
    read = check_line(line, 1, GENESIS)
    assert (read["act"], read["actor"]) == (act, "uid:1000")


async def test_a_name_can_not_forge_a_line(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    forged = 'x"}\n{"seq":2,"prev":"0","act":"forged","actor":"uid:0"}\n'
    await log.note("agent.spawn", ADA, team=forged, program=forged)
    log.close()
    assert len(lines(log.path)) == 1
    assert search(log.path, Query(act="forged")) == []
    assert search(log.path, Query(team=forged))[0]["detail"]["program"] == forged


async def test_search_finds_by_every_field(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    await log.note("agent.spawn", ADA, team="crew", agent="a1")
    await log.note("agent.stop", ADA, team="crew", agent="a2")
    await log.note("agents.other", BOB, team="other", agent="b1")
    await log.note("team.create", BOB, team="other")
    log.close()
    moments = [record["time"] for record in search(log.path, Query())]

    def found(**query: Any) -> list[int]:
        return [record["seq"] for record in search(log.path, Query(**query))]

    assert found() == [1, 2, 3, 4]
    assert found(act="agent") == [1, 2]
    assert found(act="agent.stop") == [2]
    assert found(actor="uid:2000") == [3, 4]
    assert found(team="crew", agent="a1") == [1]
    assert found(since=moments[2]) == [3, 4]
    assert found(until=moments[1]) == [1, 2]
    assert found(limit=1) == [4]
    assert found(actor="uid:3000") == []


async def test_reading_beside_a_writer_sees_whole_lines_only(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    await log.note("one", None)
    size = log.head.size
    await log.note("two", None)
    assert len(list(lines_of(log.path, size))) == 1
    assert verify(log.path, expected_entries=1, size=size).problem is None
    log.close()


def test_whoever_stops_waiting_stops_nobody_else(tmp_path: Path) -> None:
    """A caller who hangs up while their line is written must not take the writer along."""

    async def main() -> None:
        log = AuditLog(tmp_path / "audit")
        for turns in range(30):
            impatient = asyncio.create_task(log.note("request.refused", None))
            for _ in range(turns % 3):
                await asyncio.sleep(0)
            impatient.cancel()
            await asyncio.wait({impatient})
        await asyncio.wait_for(log.note("daemon.stop", None), 5)
        log.close()

    asyncio.run(main())
    assert verify(tmp_path / "audit" / "audit.jsonl").problem is None
