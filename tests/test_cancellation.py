"""Cleaning up is finished in order, also for somebody who is cancelled again and again."""

from __future__ import annotations

import asyncio

import pytest

from isolator.cancellation import uninterrupted


def test_what_was_cancelled_twice_still_waits_for_its_cleaning() -> None:
    order: list[str] = []

    async def clean() -> None:
        await asyncio.sleep(0.05)
        order.append("cleaned")

    async def act() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await uninterrupted(clean())
            order.append("not reached: the cancellation goes on")

    async def main() -> None:
        task = asyncio.create_task(act())
        for _ in range(3):
            await asyncio.sleep(0.01)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        order.append("ended")

    asyncio.run(main())
    assert order == ["cleaned", "ended"]


def test_without_a_cancellation_it_is_the_work_itself() -> None:
    async def give() -> int:
        return 7

    async def fail() -> None:
        raise ValueError("no")

    assert asyncio.run(uninterrupted(give())) == 7
    with pytest.raises(ValueError, match="no"):
        asyncio.run(uninterrupted(fail()))


def test_a_timeout_still_tells_itself() -> None:
    done: list[bool] = []

    async def slow() -> None:
        await asyncio.sleep(0.05)
        done.append(True)

    async def main() -> None:
        async with asyncio.timeout(0.01):
            await uninterrupted(slow())

    with pytest.raises(TimeoutError):
        asyncio.run(main())
    assert done == [True]
