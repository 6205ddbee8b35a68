"""The store keeps what it acknowledged, tells a name that is taken, and never repeats an event's number."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from isolator.model.agent import Agent, Exit
from isolator.model.box import BoxMount, BoxSpec, Scratch, SecretRef
from isolator.model.errors import Conflict, Unavailable
from isolator.model.limits import Limits
from isolator.model.team import Team
from isolator.store.records import dump_agent, load_agent
from isolator.store.schema import MIGRATIONS
from isolator.store.store import Store

SPEC = BoxSpec(
    agent="a1",
    name="worker",
    team="crew",
    owner="uid:1000",
    instance="default",
    session="s",
    parent=None,
    image="isolator/agent-python",
    image_digest="sha256:" + "1" * 64,
    interpreter="/usr/bin/python3",
    guest_source="/run/isolator/agents/a1",
    command=("echo", "\u00fc\n'\"; DROP TABLE agent; --"),
    environment=(("A", "1"),),
    working_dir="/tmp",
    uid=1000,
    gid=1000,
    hostname="worker",
    limits=Limits(1.0, 2**29, 256, 2**26, 4096, None),
    mounts=(BoxMount("/srv/a", "/workspace", False, "/run/x", 1, 2, True),),
    scratch=(Scratch("/tmp", 2**26, 0o1777),),
    network="team",
    network_name="openclaw-team-crew",
    seccomp="sha256:5",
    secrets=(SecretRef("KEY", "env", "KEY"),),
    log_max_bytes=10**7,
    ttl=None,
    idle_ttl=None,
    cleanup_grace=60.0,
    labels=(("openclaw.managed", "true"),),
)


def agent(number: int, state: str = "running", **changes: object) -> Agent:
    fields = {"name": f"n{number}", **changes}
    spec = replace(SPEC, agent=f"a{number}", **fields)  # type: ignore[arg-type]
    return Agent(spec.agent, spec, state, 1000.0 + number, "docker", "sha256:0")  # type: ignore[arg-type]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "isolator.db", events_kept=1000)
    yield opened
    await opened.close()


def test_a_record_comes_back_as_it_was() -> None:
    whole = agent(1).changed(
        exit=Exit(137, 9, "oom", "too much"),
        warnings=({"code": "x", "detail": "y"},),
        receipt={"seccomp": {"held": True}},
    )
    assert load_agent(dump_agent(whole)) == whole
    assert asdict(load_agent(dump_agent(agent(2)))) == asdict(agent(2))


async def test_what_was_written_is_there_after_a_new_start(tmp_path: Path) -> None:
    path = tmp_path / "isolator.db"
    first = await Store.open(path, 1000)
    await first.add_team(Team("crew", "uid:1000", "10.208.0.0/24", 1.0, "net"))
    await first.add_agent(agent(1), ("uid:1000", "key", "digest"))
    await first.set_fact("x", "1")
    await first.set_fact("x", "2")
    await first.close()
    assert mode(path) == 0o600
    again = await Store.open(path, 1000)
    assert await again.teams() == [Team("crew", "uid:1000", "10.208.0.0/24", 1.0, "net")]
    assert await again.agent("a1") == agent(1)
    assert await again.idempotent("uid:1000", "key") == ("digest", "a1")
    assert await again.fact("x") == "2"
    await again.close()


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


async def test_a_name_is_taken_while_its_agent_lives(store: Store) -> None:
    await store.add_agent(agent(1, name="same"))
    with pytest.raises(Conflict) as caught:
        await store.add_agent(agent(2, name="same"), ("uid:1000", "key", "digest"))
    assert caught.value.code == "name_taken"
    assert await store.agent("a2") is None
    assert await store.idempotent("uid:1000", "key") is None
    await store.add_agent(agent(3, name="same", team="other"))
    await store.save_agent(agent(1, "exited", name="same"))
    await store.add_agent(agent(2, name="same"))


async def test_a_team_and_a_subnet_are_given_once(store: Store) -> None:
    await store.add_team(Team("crew", "uid:1000", "10.208.0.0/24", 1.0))
    for team, code in (
        (Team("crew", "uid:2000", "10.208.1.0/24", 1.0), "team_exists"),
        (Team("other", "uid:2000", "10.208.0.0/24", 1.0), "subnet_taken"),
    ):
        with pytest.raises(Conflict) as caught:
            await store.add_team(team)
        assert caught.value.code == code
    await store.delete_team("crew")
    await store.add_team(Team("other", "uid:2000", "10.208.0.0/24", 1.0))


async def test_an_undone_spawn_leaves_neither_record_nor_key(store: Store) -> None:
    await store.add_agent(agent(1, "creating"), ("uid:1000", "key", "digest"))
    await store.delete_agent("a1")
    assert await store.agent("a1") is None
    assert await store.idempotent("uid:1000", "key") is None


async def test_agents_are_found_by_all_that_is_given(store: Store) -> None:
    await store.add_agent(agent(1, session="x"))
    await store.add_agent(agent(2, "exited", owner="uid:2000"))
    await store.add_agent(agent(3, "removed", team="other"))

    async def found(**query: object) -> list[str]:
        return [item.id for item in await store.agents(**query)]  # type: ignore[arg-type]

    assert await found() == ["a1", "a2", "a3"]
    assert await found(states=("running", "exited")) == ["a1", "a2"]
    assert await found(owner="uid:2000") == ["a2"]
    assert await found(team="other", owner="uid:2000") == []
    assert await found(session="x' OR '1'='1") == []
    assert await found(states=()) == []


async def test_old_records_are_pruned_and_living_ones_never(store: Store) -> None:
    for number in range(10):
        await store.add_agent(agent(number, "removed" if number < 8 else "running"))
    await store.prune(3)
    assert [item.id for item in await store.agents()] == ["a5", "a6", "a7", "a8", "a9"]
    await store.prune(3)
    assert len(await store.agents()) == 5


async def test_the_record_removed_longest_ago_goes_first_however_young_its_agent(store: Store) -> None:
    await store.add_agent(agent(0))
    await store.add_agent(agent(1, "exited").changed(finished_at=1500.0))
    await store.add_agent(agent(2, "lost").changed(finished_at=1501.0))
    for number in range(10, 20):
        await store.add_agent(agent(number))
        await store.save_agent(agent(number, "removed").changed(finished_at=2000.0 + number))
    # Both are older, and the second ended before all the others did.
    await store.save_agent(agent(0, "removed").changed(finished_at=3000.0))
    await store.save_agent(agent(1, "removed").changed(finished_at=1500.0))
    await store.prune(3)
    assert [item.id for item in await store.agents()] == ["a0", "a1", "a2", "a19"]
    # Written again, it is not removed again: its turn stays.
    await store.save_agent(agent(19, "removed"))
    await store.save_agent(agent(2, "removed"))
    await store.prune(3)
    assert [item.id for item in await store.agents()] == ["a0", "a1", "a2"]


async def test_a_database_of_the_first_schema_is_brought_up_with_its_records_in_order(tmp_path: Path) -> None:
    path = tmp_path / "isolator.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(f"{MIGRATIONS[0]} PRAGMA user_version = 1;")
        for number, state, finished in ((1, "removed", 1900.0), (2, "removed", 1800.0), (3, "running", None)):
            record = agent(number, state).changed(finished_at=finished)
            connection.execute(
                "INSERT INTO agent (id, team, name, owner, session, state, created_at, finished_at, record)"
                " VALUES (?, 'crew', ?, 'uid:1000', 's', ?, ?, ?, ?)",
                (record.id, record.spec.name, state, record.created_at, finished, dump_agent(record)),
            )
    connection.close()
    store = await Store.open(path, 1000)
    assert [item.id for item in await store.agents()] == ["a1", "a2", "a3"]
    await store.save_agent(agent(3, "removed"))
    await store.prune(2)
    assert [item.id for item in await store.agents()] == ["a1", "a3"]
    await store.close()


async def test_event_numbers_grow_and_are_never_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "isolator.db"
    store = await Store.open(path, events_kept=100)
    assert await store.last_event() == 0
    for number in range(600):
        event = await store.add_event("x", "uid:1000", "crew", None, {"n": number})
        assert event.id == number + 1
    kept = [event.id for event in await store.events_after(0, 10_000)]
    # pruned in steps, and never below what was promised to be kept
    assert 100 <= len(kept) <= 100 + 256
    assert kept == list(range(600 - len(kept) + 1, 601))
    assert [event.data for event in await store.events_after(598, 10)] == [{"n": 598}, {"n": 599}]
    assert len(await store.events_after(0, 7)) == 7
    await store.close()
    forget_events(path)
    again = await Store.open(path, events_kept=100)
    assert await again.last_event() == 600
    assert (await again.add_event("x", None, None, None, {})).id == 601
    await again.close()


async def test_what_agents_say_of_themselves_pushes_out_no_other_event(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "isolator.db", events_kept=100)
    await store.add_event("agent.exited", "uid:1000", "crew", None, {})
    for _ in range(600):
        await store.add_event("agent.progress", "uid:1001", "loud", None, {})
    kept = [event.type for event in await store.events_after(0, 10_000)]
    assert kept[0] == "agent.exited"
    assert 100 <= len(kept) - 1 <= 100 + 256
    await store.close()


def forget_events(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM event")


async def test_a_database_of_a_newer_isolator_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "isolator.db"
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(Unavailable) as caught:
        await Store.open(path, 1000)
    assert caught.value.code == "store_newer"


@pytest.mark.parametrize("damage", ["rubbish", "folder"])
async def test_what_is_no_database_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "isolator.db"
    if damage == "rubbish":
        path.write_bytes(b"this is no database, and long enough to be read as one" * 100)
    else:
        path.mkdir()
    with pytest.raises(Unavailable) as caught:
        await Store.open(path, 1000)
    assert caught.value.code == "store_damaged"
    assert str(path) in caught.value.detail


async def test_a_full_or_broken_disk_is_told_as_unavailable(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "isolator.db", 1000)
    store._connection.execute("PRAGMA max_page_count = 1")
    with pytest.raises(Unavailable) as caught:
        await store.add_event("x", None, None, None, {"text": "x" * 500_000})
    assert caught.value.code == "store_unavailable"
    assert await store.teams() == []
    await store.close()
