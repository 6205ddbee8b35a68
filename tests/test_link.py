"""One link to a guest that floods, stops reading, or hangs up: bounded, and no descriptor is ever left."""

from __future__ import annotations

import array
import asyncio
import contextlib
import gc
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolator.agents import link as link_module
from isolator.agents.frames import Frame, ProtocolError, encode
from isolator.agents.link import Link


class Ends:
    """A link, the guest's side of it, and what the link told."""

    def __init__(self) -> None:
        self.theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        self.theirs.setblocking(False)
        self.heard: list[Frame] = []
        self.ended = 0
        self.link = Link(ours, on_frame=self.hear, on_end=self.on_end)

    def hear(self, frame: Frame) -> None:
        self.heard.append(frame)
        if frame.kind == 255:
            raise ProtocolError("nonsense")

    def on_end(self, link: Link) -> None:
        assert link is self.link
        self.ended += 1

    def close(self) -> None:
        self.link.close()
        self.theirs.close()


@contextlib.contextmanager
def linked() -> Iterator[Ends]:
    ends = Ends()
    try:
        yield ends
    finally:
        ends.close()


def open_descriptors() -> int:
    gc.collect()  # what an earlier test dropped does not count
    return len(list(Path("/proc/self/fd").iterdir()))


async def until(condition: Callable[[], object], seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.005)


async def test_descriptors_arrive_with_their_frame_and_are_closed_here() -> None:
    with linked() as ends:
        before = open_descriptors()
        pipes = [os.pipe() for _ in range(2)]
        ends.link.send(b"first", [pipes[0][1]])
        ends.link.send(b"second", [pipes[1][1]])
        for index, word in enumerate((b"first", b"second")):
            data, ancillary, _, _ = ends.theirs.recvmsg(100, 100)
            assert data == word
            numbers = array.array("i")
            numbers.frombytes(ancillary[0][2])
            os.write(numbers[0], word)
            os.close(numbers[0])
            assert os.read(pipes[index][0], 10) == word
            assert os.read(pipes[index][0], 10) == b"", "ours is closed"
            os.close(pipes[index][0])
        assert open_descriptors() == before


async def test_a_guest_that_never_reads_is_cut_off_at_the_bound_and_nothing_is_left() -> None:
    before = open_descriptors()
    with linked() as ends:
        queued = 0
        with contextlib.suppress(ConnectionError):
            while queued < 100 * 1024 * 1024:
                read_end, write_end = os.pipe()
                os.close(read_end)
                ends.link.send(bytes(65536), [write_end])
                queued += 65536
        assert link_module.MAX_QUEUED <= queued < link_module.MAX_QUEUED + 1024 * 1024
        assert (ends.ended, ends.link.open) == (1, False)
        read_end, write_end = os.pipe()
        os.close(read_end)
        with pytest.raises(ConnectionError):
            ends.link.send(b"x", [write_end])
        with pytest.raises(ConnectionError):
            await ends.link.drained(1)
    assert open_descriptors() == before


async def test_a_guest_that_takes_nothing_for_long_is_cut_off_below_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "STALLED_SECONDS", 0.3)
    before = open_descriptors()
    with linked() as ends:
        for _ in range(16):
            read_end, write_end = os.pipe()
            os.close(read_end)
            ends.link.send(bytes(65536), [write_end])
        assert ends.link.open
        assert open_descriptors() > before
        await until(lambda: ends.ended == 1)
    assert open_descriptors() == before


async def test_a_guest_that_reads_slowly_gets_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "STALLED_SECONDS", 0.3)
    with linked() as ends:
        data = os.urandom(2 * 1024 * 1024)
        ends.link.send(data)
        got = bytearray()
        while len(got) < len(data):
            await asyncio.sleep(0.01)
            with contextlib.suppress(BlockingIOError):
                got += ends.theirs.recv(50_000)
        await ends.link.drained(5)
        assert (bytes(got), ends.ended) == (data, 0)
        await asyncio.sleep(0.4)
        assert ends.link.open, "what was taken in time does not count as stalled later"


async def test_waiting_for_a_guest_that_does_not_read_ends_in_time() -> None:
    with linked() as ends:
        ends.link.send(bytes(2 * 1024 * 1024))
        with pytest.raises(TimeoutError):
            await ends.link.drained(0.1)
        waiting = asyncio.create_task(ends.link.drained(5))
        await asyncio.sleep(0.01)
        ends.theirs.close()
        with pytest.raises(ConnectionError):
            await waiting


@pytest.mark.parametrize("frame", [encode(8, (b"x",)), encode(200), encode(5, (b"x" * 15_000,))])
async def test_a_flood_is_heard_in_doses_and_nobody_else_is_held_up(frame: bytes) -> None:
    with linked() as ends, linked() as other:
        flood = frame * (2_000_000 // len(frame))
        position = 0

        def pour() -> None:
            nonlocal position
            with contextlib.suppress(BlockingIOError):
                position += ends.theirs.send(flood[position : position + 65536])

        asyncio.get_running_loop().add_writer(ends.theirs, pour)
        loop = asyncio.get_running_loop()
        began, slowest = loop.time(), 0.0
        while loop.time() < began + 0.8:
            before, told = loop.time(), len(other.heard)
            other.theirs.send(encode(9))
            await until(lambda told=told: len(other.heard) > told)
            slowest = max(slowest, loop.time() - before)
        first = len(ends.heard)
        assert 0 < first * (len(frame) + link_module.FRAME_COST) < link_module.MAX_HEARD + 16384 * 14
        await until(lambda: len(ends.heard) > first)
        assert ends.link.open
        assert slowest < 0.5
        loop.remove_writer(ends.theirs)


async def test_what_is_nonsense_ends_the_link_once_and_what_came_after_is_not_heard() -> None:
    with linked() as ends:
        ends.theirs.send(encode(7) + encode(255) + encode(8))
        await until(lambda: ends.ended)
        assert [frame.kind for frame in ends.heard] == [7, 255]
        await asyncio.sleep(0.05)
        assert ends.ended == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=300), st.just(encode(5, (b"a", b"1"))), st.just(b"\0" * 5)), max_size=12))
def test_whatever_a_guest_says_ends_the_link_or_is_understood(pieces: list[bytes]) -> None:
    """Never an exception on the loop, never more frames than bytes, and no descriptor afterwards."""

    async def talk() -> None:
        failures: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        with linked() as ends:
            for piece in pieces:
                with contextlib.suppress(OSError):
                    ends.theirs.send(piece)
                await asyncio.sleep(0)
            ends.theirs.shutdown(socket.SHUT_WR)
            await until(lambda: ends.ended)
            assert len(ends.heard) * 5 <= sum(map(len, pieces))
        assert failures == []

    before = open_descriptors()
    asyncio.run(talk())
    assert open_descriptors() == before
