"""The pool's shelves, with a builder that builds nothing: how many, of whom, when they go, and never twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from isolator.agents import pool as pool_module
from isolator.agents.builder import BuiltBox
from isolator.agents.pool import Pool, ReadyBox
from isolator.model.box import BoxSpec
from isolator.model.errors import BoxFailed
from isolator.policy.blank import Profile
from isolator.settings import Settings


class FakeChannel:
    """A guest that stays for as long as nobody says otherwise."""

    def __init__(self, folder: Path, **tell: Any) -> None:
        self.folder = folder
        self.connected = True
        self.closed = False
        self.tell(**tell)

    def tell(self, *, on_exit: Callable[[int, int], None], on_lost: Callable[[], None]) -> None:
        self.on_exit, self.on_lost = on_exit, on_lost

    async def stay(self) -> bool:
        await asyncio.sleep(0)
        return self.connected

    def close(self) -> None:
        self.closed = True

    def die(self) -> None:
        self.connected = False
        self.on_lost()


class FakeBuilder:
    """Notes what it is asked for. `gate` holds builds up, `failing` fails them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.gate = asyncio.Event()
        self.gate.set()
        self.failing: Exception | None = None
        self.building: set[str] = set()
        self.tried = 0
        self.there: dict[str, BoxSpec] = {}

    def folder(self, agent: str) -> Path:
        return self._folder / agent

    async def prepare(self, spec: BoxSpec, channel: FakeChannel) -> BuiltBox:
        del channel
        self.tried += 1
        self.building.add(spec.agent)
        try:
            await self.gate.wait()
        finally:
            self.building.discard(spec.agent)
        if self.failing is not None:
            raise self.failing
        self.there[spec.agent] = spec
        return BuiltBox(f"c-{spec.agent}", 1, swap_capped=True)

    async def demolish(self, spec: BoxSpec, channel: FakeChannel, box_id: str | None = None) -> None:
        assert box_id == f"c-{spec.agent}"
        await asyncio.sleep(0)
        channel.close()
        del self.there[spec.agent]
        await self.discard(spec.agent)

    async def discard(self, agent: str) -> None:
        self.folder(agent).rmdir()

    def left(self) -> list[str]:
        """What there is on engine and host."""
        return sorted({*self.there, *(entry.name for entry in self._folder.iterdir())})


@pytest.fixture(autouse=True)
def _without_a_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "Channel", FakeChannel)
    monkeypatch.setattr(pool_module, "create_folder", lambda folder: folder.mkdir())
    # The pauses between tries, short enough to wait for.
    monkeypatch.setattr(pool_module, "_PATIENCE", (0.02, 0.08))
    monkeypatch.setattr(pool_module, "profile_of", lambda spec: spec.profile)


def profile(team: str = "crew", owner: str = "uid:1", image: str = "i", digest: str = "1", uid: int = 1) -> Profile:
    return Profile(
        team, owner, "test", image, digest, "/usr/bin/python3", uid, uid, limits="l", network="team", seccomp="s",
        log_max_bytes=1,
    )  # type: ignore[arg-type]  # fmt: skip


class Bench:
    """A pool that runs, and what it works with."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.builder = FakeBuilder(folder)
        self.open = True
        self.busy = False
        whole = Settings(**{"pool_depth": 2, "pool_budget": 8, "pool_idle": 60.0, **settings})
        self.pool = Pool(whole, self.builder, lambda: self.open, lambda: self.busy)  # type: ignore[arg-type]

    def spec(self, which: Profile) -> Any:
        return SimpleNamespace(profile=which)

    def want(self, which: Profile) -> None:
        def blank(found: Profile) -> Callable[[str], Any]:
            assert found is which
            return lambda agent: SimpleNamespace(agent=agent, profile=which)

        self.pool.want(self.spec(which), blank)

    def take(self, which: Profile) -> ReadyBox | None:
        return self.pool.take(self.spec(which))

    def waiting(self, which: Profile | None = None) -> int:
        return sum(found == (which or found) for found, _ in self.pool.overview())

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
                await asyncio.sleep(0.005)

    async def quiet(self) -> None:
        """Long enough for whatever would happen to have begun."""
        for _ in range(20):
            await asyncio.sleep(0.002)


@asynccontextmanager
async def running(folder: Path, **settings: Any) -> AsyncIterator[Bench]:
    bench = Bench(folder, **settings)
    task = asyncio.create_task(bench.pool.run())
    try:
        yield bench
        assert not task.done(), task.exception()
    finally:
        bench.open = False
        bench.builder.gate.set()
        await bench.pool.close()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert bench.builder.left() == []
    assert bench.pool.boxes() == set()


async def test_a_shelf_is_filled_to_its_depth_and_again(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        one = profile()
        assert bench.take(one) is None, "nobody has asked yet"
        bench.want(one)
        await bench.until(lambda: bench.waiting() == 2)
        await bench.quiet()
        assert bench.builder.tried == 2
        ready = bench.take(one)
        assert ready is not None
        await bench.until(lambda: bench.waiting() == 2)
        assert ready.spec.agent in bench.pool.boxes(), "it is nobody's yet, and must not be eaten"
        bench.pool.taken_over(ready.spec.agent)
        assert ready.spec.agent not in bench.pool.boxes()
        await bench.builder.demolish(ready.spec, ready.channel, ready.box.box_id)  # type: ignore[arg-type]


@pytest.mark.parametrize("off", [{"pool_depth": 0}, {"pool_budget": 0}])
async def test_without_depth_or_budget_there_is_none(tmp_path: Path, off: dict[str, int]) -> None:
    async with running(tmp_path, **off) as bench:
        bench.want(profile())
        await bench.quiet()
        assert bench.builder.tried == 0
        assert bench.take(profile()) is None


async def test_a_box_is_taken_once(tmp_path: Path) -> None:
    async with running(tmp_path, pool_depth=8) as bench:
        one = profile()
        bench.want(one)
        await bench.until(lambda: bench.waiting() == 8)
        bench.open = False
        taken = [ready for _ in range(20) if (ready := bench.take(one))]
        assert len(taken) == len({ready.spec.agent for ready in taken}) == 8
        for ready in taken:
            bench.pool.taken_over(ready.spec.agent)
            await bench.builder.demolish(ready.spec, ready.channel, ready.box.box_id)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "other", [profile("rest"), profile(owner="uid:2"), profile(image="j"), profile(digest="2"), profile(uid=2)]
)
async def test_it_serves_its_own_profile_only(tmp_path: Path, other: Profile) -> None:
    async with running(tmp_path) as bench:
        bench.want(profile())
        await bench.until(lambda: bench.waiting() == 2)
        assert bench.take(other) is None
        assert bench.waiting() == 2


async def test_the_budget_holds_for_all_shelves_together(tmp_path: Path) -> None:
    async with running(tmp_path, pool_depth=4, pool_budget=5) as bench:
        most = 0
        bench.builder.gate.clear()
        for number in range(6):
            bench.want(profile(f"crew-{number}"))
            await bench.quiet()
            most = max(most, bench.waiting() + len(bench.builder.building))
            bench.builder.gate.set()
            await bench.quiet()
            bench.builder.gate.clear()
            most = max(most, len(bench.builder.there), bench.waiting() + len(bench.builder.building))
        bench.builder.gate.set()
        await bench.quiet()
        assert most <= 5 + 1, "one may still be leaving while its successor is built"
        assert bench.waiting() <= 5
        assert bench.waiting(profile("crew-5")), "who asked last has one: whose shelf was asked for first gave it up"


async def test_nobody_takes_more_than_their_share_of_the_budget(tmp_path: Path) -> None:
    async with running(tmp_path, pool_depth=2, pool_budget=6) as bench:
        quiet = profile("calm", "uid:2")
        bench.want(quiet)
        await bench.until(lambda: bench.waiting(quiet) == 2)
        # Somebody asks for ever new kinds.
        for number in range(12):
            bench.want(profile(f"wild-{number}", "uid:1"))
            await bench.quiet()
        assert bench.waiting(quiet) == 2
        # And whoever comes later gets theirs from whoever has most.
        late = profile("late", "uid:3")
        bench.want(late)
        await bench.until(lambda: bench.waiting(late))
        await bench.quiet()
        assert bench.waiting(quiet) == 2
        settled = bench.builder.tried
        await bench.quiet()
        assert bench.builder.tried == settled, "two owners take boxes from each other in turn"


async def test_the_number_of_kinds_is_bounded_and_the_greedy_lose_first(tmp_path: Path) -> None:
    async with running(tmp_path, pool_depth=1, pool_budget=2) as bench:
        calm = profile("calm", "uid:2")
        bench.want(calm)
        await bench.until(lambda: bench.waiting(calm) == 1)
        for number in range(pool_module.MOST_SHELVES + 20):
            bench.want(profile(f"wild-{number}"))
        assert len(bench.pool._shelves) == pool_module.MOST_SHELVES
        assert calm in bench.pool._shelves


async def test_what_nobody_asks_for_any_more_goes(tmp_path: Path) -> None:
    async with running(tmp_path, pool_idle=0.2) as bench:
        kept, idle = profile("kept"), profile("idle")
        bench.want(kept)
        bench.want(idle)
        await bench.until(lambda: bench.waiting() == 4)
        for _ in range(12):
            bench.want(kept)
            await asyncio.sleep(0.05)
        assert (bench.waiting(kept), bench.waiting(idle)) == (2, 0)


async def test_a_new_image_drops_the_old_ones_boxes_of_that_team(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        old, other_team, other_image = profile(), profile("rest"), profile(image="j")
        for each in (old, other_team, other_image):
            bench.want(each)
        await bench.until(lambda: bench.waiting() == 6)
        bench.want(replace(old, image_digest="2"))
        await bench.until(lambda: bench.waiting(replace(old, image_digest="2")) == 2)
        assert [bench.waiting(each) for each in (old, other_team, other_image)] == [0, 2, 2]


async def test_a_guest_that_is_lost_is_replaced(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        bench.want(profile())
        await bench.until(lambda: bench.waiting() == 2)
        _, ready = bench.pool.overview()[0]
        ready.channel.die()  # type: ignore[attr-defined]
        assert bench.waiting() == 1, "it is gone at once"
        await bench.until(lambda: bench.waiting() == 2 and len(bench.builder.there) == 2)
        assert ready.spec.agent not in bench.builder.there


async def test_a_guest_whose_loss_was_not_told_yet_is_not_handed_out(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        one = profile()
        bench.want(one)
        await bench.until(lambda: bench.waiting() == 2)
        dead, alive = (ready for _, ready in bench.pool.overview())
        dead.channel.connected = False  # type: ignore[misc]
        assert bench.take(one) is alive
        bench.pool.taken_over(alive.spec.agent)
        await bench.builder.demolish(alive.spec, alive.channel, alive.box.box_id)  # type: ignore[arg-type]


async def test_a_guest_that_leaves_while_its_box_is_prepared_leaves_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        stays = FakeChannel.stay

        async def leaves(self: FakeChannel) -> bool:
            await stays(self)
            return False

        FakeChannel.stay = leaves  # type: ignore[method-assign]
        try:
            bench.want(profile())
            await bench.until(lambda: bench.builder.tried >= 2)
            await bench.until(lambda: not bench.builder.there)
            assert bench.waiting() == 0
        finally:
            FakeChannel.stay = stays  # type: ignore[method-assign]


@pytest.mark.parametrize("error", [BoxFailed("engine_refused", "no"), OSError(28, "full"), ValueError("x"), KeyError()])
async def test_builds_that_fail_are_tried_again_ever_more_seldom(tmp_path: Path, error: Exception) -> None:
    async with running(tmp_path) as bench:
        bench.builder.failing = error
        bench.want(profile())
        await asyncio.sleep(0.5)
        assert 3 <= bench.builder.tried <= 24
        assert bench.builder.left() == []
        bench.builder.failing = None
        await bench.until(lambda: bench.waiting() == 2)


async def test_a_thousand_failures_later_it_still_tries(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        bench.builder.failing = OSError(28, "full")
        bench.want(profile())
        await bench.until(lambda: bench.builder.tried)
        next(iter(bench.pool._shelves.values())).failures = 5000
        tried = bench.builder.tried
        await bench.until(lambda: bench.builder.tried > tried + 2)


async def test_deleting_a_team_ends_its_builds_and_boxes_and_no_others(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        kept, gone = profile("kept"), profile("gone")
        bench.want(kept)
        await bench.until(lambda: bench.waiting() == 2)
        bench.builder.gate.clear()
        bench.want(gone)
        await bench.until(lambda: len(bench.builder.building) == 2)
        await asyncio.wait_for(bench.pool.drop_team("gone"), 2)
        assert bench.builder.building == set()
        assert len(bench.builder.left()) == bench.waiting(kept) == 2
        bench.builder.gate.set()
        await bench.quiet()
        assert bench.waiting(gone) == 0


async def test_a_box_finished_for_a_shelf_that_is_gone_is_removed(tmp_path: Path) -> None:
    async with running(tmp_path, pool_idle=0.05) as bench:
        bench.builder.gate.clear()
        bench.want(profile())
        await bench.until(lambda: len(bench.builder.building) == 2)
        await bench.until(lambda: not bench.pool._shelves)
        assert bench.pool.boxes() == bench.builder.building, "reconcile must leave alone what is still built"
        bench.builder.gate.set()
        await bench.until(lambda: bench.builder.tried == 2 and not bench.builder.left())


async def test_nothing_is_built_while_the_engine_is_away_or_a_spawn_under_way(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        bench.open = False
        bench.want(profile())
        await bench.quiet()
        assert bench.builder.tried == 0
        bench.open, bench.busy = True, True
        bench.want(profile())
        await bench.quiet()
        assert bench.builder.tried == 0
        bench.busy = False
        await bench.until(lambda: bench.waiting() == 2)


async def test_an_engine_that_went_away_makes_it_begin_anew(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        bench.want(profile())
        await bench.until(lambda: bench.waiting() == 2)
        old = dict(bench.builder.there)
        bench.open = False
        bench.pool.forget()
        assert bench.waiting() == 0
        assert bench.pool.boxes() == set(), "reconcile removes what is left of them"
        for agent in old:
            bench.builder.there.pop(agent)
            await bench.builder.discard(agent)
        bench.open = True
        bench.want(profile())
        await bench.until(lambda: bench.waiting() == 2)
        assert not old.keys() & bench.builder.there.keys()


async def test_closing_leaves_nothing_even_in_the_midst_of_a_build(tmp_path: Path) -> None:
    async with running(tmp_path) as bench:
        bench.want(profile("one"))
        await bench.until(lambda: bench.waiting() == 2)
        bench.builder.gate.clear()
        bench.want(profile("two"))
        await bench.until(lambda: len(bench.builder.building) == 2)
        bench.open = False
        await asyncio.wait_for(bench.pool.close(), 2)
        assert bench.builder.left() == []
