"""What was changed in the audit log afterwards is found, and a log that can't be trusted is not written on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isolator.audit.entry import leaf_hash
from isolator.audit.log import AuditLog, AuditLogDamaged
from isolator.audit.reading import verify
from isolator.model.identity import Principal

ADA = Principal(1000, 1000, (), 77)


async def write(folder: Path, count: int = 6) -> Path:
    """A log of that many notes, closed; its path."""
    log = AuditLog(folder)
    for number in range(count):
        await log.note("agent.spawn", ADA, team="crew", agent=f"a{number}", number=number)
    log.close()
    return log.path


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def torn_files(folder: Path) -> list[bytes]:
    return [entry.read_bytes() for entry in folder.glob("audit.torn-*")]


def _edit(found: list[bytes]) -> list[bytes]:
    return [*found[:2], found[2].replace(b'"number":2', b'"number":9'), *found[3:]]


def _edit_actor(found: list[bytes]) -> list[bytes]:
    return [found[0].replace(b"uid:1000", b"uid:2000"), *found[1:]]


def _swap(found: list[bytes]) -> list[bytes]:
    return [found[0], found[2], found[1], *found[3:]]


def _remove(found: list[bytes]) -> list[bytes]:
    return [*found[:2], *found[3:]]


def _insert(found: list[bytes]) -> list[bytes]:
    return [*found[:2], found[1], *found[2:]]


def _truncate(found: list[bytes]) -> list[bytes]:
    return found[:-2]


def _garbage(found: list[bytes]) -> list[bytes]:
    return [*found[:2], b"not json\n", *found[3:]]


def _list(found: list[bytes]) -> list[bytes]:
    return [*found[:2], b"[1]\n", *found[3:]]


def _first(found: list[bytes]) -> list[bytes]:
    return found[1:]


def _space(found: list[bytes]) -> list[bytes]:
    return [*found[:2], found[2].replace(b'":', b'": ', 1), *found[3:]]


@pytest.mark.parametrize(
    "change", [_edit, _edit_actor, _swap, _remove, _insert, _truncate, _garbage, _list, _first, _space]
)
async def test_a_change_afterwards_is_found(tmp_path: Path, change: Any) -> None:
    path = await write(tmp_path)
    assert verify(path, expected_entries=6).problem is None
    path.write_bytes(b"".join(change(lines(path))))
    found = verify(path, expected_entries=6)
    assert found.problem is not None
    assert found.entries < 6


async def test_an_edited_last_line_is_found_by_the_head(tmp_path: Path) -> None:
    path = await write(tmp_path)
    found = lines(path)
    path.write_bytes(b"".join([*found[:-1], found[-1].replace(b'"number":5', b'"number":7')]))
    with pytest.raises(AuditLogDamaged, match="cut or edited"):
        AuditLog(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 3, 5])
async def test_a_log_cut_shorter_is_refused_at_start(tmp_path: Path, keep: int) -> None:
    path = await write(tmp_path)
    path.write_bytes(b"".join(lines(path)[:keep]))
    with pytest.raises(AuditLogDamaged):
        AuditLog(tmp_path)


@pytest.mark.parametrize("damage", ["log gone", "last line rubbish", "head rubbish", "head short"])
async def test_a_log_that_can_not_be_trusted_is_refused_at_start(tmp_path: Path, damage: str) -> None:
    path = await write(tmp_path)
    match damage:
        case "log gone":
            path.unlink()
        case "last line rubbish":
            path.write_bytes(path.read_bytes() + b"{}\n")
        case "head rubbish":
            (tmp_path / "head").write_bytes(b"\xff\xfe nonsense here\n")
        case "head short":
            (tmp_path / "head").write_bytes(b"00")
    with pytest.raises(AuditLogDamaged):
        AuditLog(tmp_path)


async def test_a_log_left_alone_goes_on(tmp_path: Path) -> None:
    path = await write(tmp_path)
    log = AuditLog(tmp_path)
    assert log.recovered is None
    await log.note("again", None)
    log.close()
    assert json.loads(lines(path)[-1])["seq"] == 7
    assert verify(path, expected_entries=7).problem is None


async def test_a_torn_line_is_set_aside_and_told(tmp_path: Path) -> None:
    path = await write(tmp_path)
    torn = b'{"seq":7,"time":"20'
    path.write_bytes(path.read_bytes() + torn)
    assert verify(path).problem is not None
    log = AuditLog(tmp_path)
    assert log.recovered == leaf_hash(torn)
    await log.note("after", None)
    log.close()
    assert verify(path, expected_entries=7).problem is None
    assert torn_files(tmp_path) == [torn]


async def test_killed_between_line_and_head_is_no_damage(tmp_path: Path) -> None:
    path = await write(tmp_path)
    head = (tmp_path / "head").read_bytes()
    log = AuditLog(tmp_path)
    await log.note("unnoted", None)
    log.close()
    (tmp_path / "head").write_bytes(head)
    log = AuditLog(tmp_path)
    assert log.head.sequence == 7
    log.close()
    assert verify(path).problem is None
