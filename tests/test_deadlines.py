"""The one heap of deadlines: in order, once, after a failure too, however late they were set."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest_asyncio

from isolator.agents.deadlines import Action, Deadlines


@pytest_asyncio.fixture
async def deadlines() -> AsyncIterator[Deadlines]:
    heap = Deadlines()
    task = asyncio.create_task(heap.run())
    yield heap
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def noting(done: list[str], word: str) -> Action:
    async def note() -> None:
        done.append(word)

    return note


async def until(done: list[str], count: int) -> None:
    async with asyncio.timeout(5):
        while len(done) < count:  # noqa: ASYNC110 - the actions under test set no event
            await asyncio.sleep(0.005)


async def test_they_come_in_the_order_of_their_times_not_of_their_setting(deadlines: Deadlines) -> None:
    done: list[str] = []
    now = time.time()
    deadlines.at(now + 0.15, noting(done, "third"))
    deadlines.at(now + 0.05, noting(done, "first"))
    deadlines.at(now + 0.10, noting(done, "second"))
    await until(done, 3)
    assert done == ["first", "second", "third"]


async def test_one_that_is_overdue_comes_at_once_and_one_in_the_future_does_not(deadlines: Deadlines) -> None:
    done: list[str] = []
    deadlines.at(time.time() + 3600, noting(done, "later"))
    deadlines.at(time.time() - 3600, noting(done, "overdue"))
    await until(done, 1)
    await asyncio.sleep(0.05)
    assert done == ["overdue"]


async def test_each_comes_once_even_with_equal_times(deadlines: Deadlines) -> None:
    done: list[str] = []
    moment = time.time() + 0.02
    for number in range(50):
        deadlines.at(moment, noting(done, str(number)))
    await until(done, 50)
    await asyncio.sleep(0.05)
    assert sorted(done, key=int) == [str(number) for number in range(50)]


async def test_one_that_fails_or_hangs_holds_up_no_other(deadlines: Deadlines) -> None:
    done: list[str] = []

    async def fail() -> None:
        raise RuntimeError("on purpose")

    async def hang() -> None:
        await asyncio.Event().wait()

    deadlines.at(time.time() - 2, fail)
    deadlines.at(time.time() - 1, hang)
    deadlines.at(time.time() + 0.02, noting(done, "after"))
    await until(done, 1)


async def test_what_was_set_before_it_ran_is_not_forgotten() -> None:
    heap, done = Deadlines(), list[str]()
    heap.at(time.time() + 0.02, noting(done, "early"))
    task = asyncio.create_task(heap.run())
    await until(done, 1)
    task.cancel()


async def test_an_action_may_set_the_next_one(deadlines: Deadlines) -> None:
    done: list[str] = []

    async def again() -> None:
        done.append("again")
        if len(done) < 3:
            deadlines.at(time.time() + 0.01, again)

    deadlines.at(time.time(), again)
    await until(done, 3)
    assert len(done) == 3
