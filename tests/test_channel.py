"""The daemon's end of an agent's socket, against whoever connects and whatever they say."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from isolator.agents import door as door_module
from isolator.agents.channel import Channel, Hello, Release, StartFailure
from isolator.agents.frames import BYE, EXITED, FAILED, GO, HELLO, STARTED, Decoder, Frame, ProtocolError, encode
from isolator.guest import guest as guest_module

FIELDS = st.lists(st.binary(max_size=200), max_size=8)


@given(st.integers(0, 255), FIELDS)
def test_what_one_side_writes_the_other_reads(kind: int, fields: list[bytes]) -> None:
    written = encode(kind, fields)
    assert Decoder().feed(written) == [Frame(kind, tuple(fields))]
    assert guest_module.frame(kind, *fields) == written
    assert guest_module.parse(written[4:]) == (kind, fields)


@given(st.lists(st.tuples(st.integers(0, 255), FIELDS), max_size=6), st.integers(1, 50))
def test_frames_are_the_same_however_they_are_cut(frames: list[tuple[int, list[bytes]]], size: int) -> None:
    stream = b"".join(encode(kind, fields) for kind, fields in frames)
    decoder, found = Decoder(), list[Frame]()
    for start in range(0, len(stream), size):
        found += decoder.feed(stream[start : start + size])
    assert found == [Frame(kind, tuple(fields)) for kind, fields in frames]


@given(st.binary(max_size=3000))
def test_garbage_is_refused_or_understood_never_more(data: bytes) -> None:
    decoder = Decoder(limit=1000)
    try:
        frames = decoder.feed(data)
    except ProtocolError:
        return
    assert sum(5 + sum(4 + len(item) for item in frame.fields) for frame in frames) <= len(data)
    for frame in frames:
        for index in range(len(frame.fields) + 1):
            with contextlib.suppress(ProtocolError):
                assert 0 <= frame.number(index) < 10**10


@given(st.binary(min_size=1, max_size=3000))
def test_the_guest_takes_garbage_for_fields_that_add_up_or_refuses_it(body: bytes) -> None:
    try:
        kind, fields = guest_module.parse(body)
    except ValueError:
        with pytest.raises(ProtocolError):
            Decoder().feed(len(body).to_bytes(4, "big") + body)
        return
    assert guest_module.frame(kind, *fields)[4:] == body
    assert Decoder().feed(guest_module.frame(kind, *fields)) == [Frame(kind, tuple(fields))]


@pytest.mark.parametrize(
    "field", [b"", b"-1", b"+1", b" 1", b"1.0", b"0x1", b"1_0", "٣".encode(), b"9" * 11, b"1\n", b"abc"]
)
def test_a_number_is_digits_and_few(field: bytes) -> None:
    assert Frame(1, (b"42",)).number(0) == 42
    with pytest.raises(ProtocolError):
        Frame(1, (field,)).number(0)


@dataclass
class Told:
    exits: list[tuple[int, int]] = field(default_factory=list)
    lost: int = 0
    hellos: list[Hello] = field(default_factory=list)

    def on_exit(self, code: int, number: int) -> None:
        self.exits.append((code, number))

    def on_lost(self) -> None:
        self.lost += 1


@pytest_asyncio.fixture
async def told() -> Told:
    return Told()


@pytest_asyncio.fixture
async def served(tmp_path: Path, told: Told) -> AsyncIterator[Channel]:
    """A channel as it really is: nobody here is PID 1 of a container."""
    channel = Channel(tmp_path, on_exit=told.on_exit, on_lost=told.on_lost, on_hello=told.hellos.append)
    channel.listen("c" * 64)
    yield channel
    channel.close()


@pytest_asyncio.fixture
async def trusting(served: Channel, monkeypatch: pytest.MonkeyPatch) -> Channel:
    """The same, taking this very process for the guest: only who may speak is replaced, not what is made of it."""
    monkeypatch.setattr(door_module, "is_init_of", lambda pid, _: pid == os.getpid())
    return served


async def connected(folder: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.wait_for(asyncio.open_unix_connection(str(folder / "agent.sock")), 5)


async def until(condition) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.005)


async def test_a_stranger_is_hung_up_on_unheard(served: Channel, told: Told, tmp_path: Path) -> None:
    reader, writer = await connected(tmp_path)
    writer.write(encode(HELLO, (b"ended", b"1", b"0", b"0", b"0")))
    with contextlib.suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    assert (told.exits, told.hellos, served.connected) == ([], [], False)


async def test_a_thousand_strangers_do_not_hold_up_the_loop_or_keep_the_guest_out(
    served: Channel, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowest, before = 0.0, asyncio.get_running_loop().time()
    for _ in range(1000):
        knocker = socket.socket(socket.AF_UNIX)
        knocker.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            knocker.connect(str(tmp_path / "agent.sock"))
        knocker.close()
        await asyncio.sleep(0)
        now = asyncio.get_running_loop().time()
        slowest, before = max(slowest, now - before), now
    assert slowest < 1
    assert told.hellos == []
    monkeypatch.setattr(door_module, "is_init_of", lambda pid, _: pid == os.getpid())
    async with asyncio.timeout(15):
        while not told.hellos:
            with contextlib.suppress(OSError, TimeoutError):
                _, writer = await connected(tmp_path)
                writer.write(encode(HELLO, (b"running", b"1", b"0", b"0", b"7")))
                await asyncio.sleep(0.2)
                writer.close()
    assert told.hellos[0].phase == "running"


async def test_a_guest_is_heard_from_hello_to_exit(trusting: Channel, told: Told, tmp_path: Path) -> None:
    reader, writer = await connected(tmp_path)
    writer.write(encode(HELLO, (b"waiting", b"1", b"0", b"0", b"0")))
    hello = await asyncio.wait_for(trusting.hello(), 5)
    assert (hello.pid, hello.phase) == (os.getpid(), "waiting")
    releasing = asyncio.create_task(trusting.release(Release([("s", "token", b"v\x00w"), ("E", "KEY", b"k")])))
    expected = encode(GO, (b"stoken\x00v\x00w", b"EKEY\x00k"))
    assert await asyncio.wait_for(reader.readexactly(len(expected)), 5) == expected
    writer.write(encode(STARTED, (b"5",)))
    assert await asyncio.wait_for(releasing, 5) == 5
    writer.write(encode(EXITED, (b"3", b"0")))
    await until(lambda: told.exits == [(3, 0)])
    await trusting.bye()
    assert await asyncio.wait_for(reader.readexactly(5), 5) == encode(BYE)
    writer.close()
    await until(lambda: told.lost == 1)


async def test_a_command_that_failed_is_told_with_its_errno(trusting: Channel, tmp_path: Path) -> None:
    _, writer = await connected(tmp_path)
    writer.write(encode(HELLO, (b"waiting", b"1", b"0", b"0", b"0")))
    await asyncio.wait_for(trusting.hello(), 5)
    releasing = asyncio.create_task(trusting.release(Release()))
    writer.write(encode(FAILED, (b"13", b"/x")))
    assert await asyncio.wait_for(releasing, 5) == StartFailure(13)
    writer.close()


async def test_a_guest_that_dies_instead_of_starting_is_noticed_at_once(trusting: Channel, tmp_path: Path) -> None:
    _, writer = await connected(tmp_path)
    writer.write(encode(HELLO, (b"waiting", b"1", b"0", b"0", b"0")))
    await asyncio.wait_for(trusting.hello(), 5)
    releasing = asyncio.create_task(trusting.release(Release()))
    await asyncio.sleep(0.05)
    writer.close()
    with pytest.raises(ConnectionError):
        await asyncio.wait_for(releasing, 5)


async def test_releasing_without_a_guest_is_refused(served: Channel) -> None:
    with pytest.raises(ConnectionError):
        await asyncio.wait_for(served.release(Release()), 5)
    assert await served.signal(15) is False


NONSENSE = {
    "garbage": b"GET / HTTP/1.1\r\n\r\n",
    "a huge length": b"\xff\xff\xff\xffxxxx",
    "a length of nothing": b"\x00\x00\x00\x00",
    "a field beyond its frame": b"\x00\x00\x00\x06\x01\xff\xff\xff\xff1",
    "an unknown phase": encode(HELLO, (b"weird", b"1", b"0", b"0", b"0")),
    "a hello of nothing": encode(HELLO),
    "a phase that is no text": encode(HELLO, (b"\xff\xfe", b"1", b"0", b"0", b"0")),
    "an exit without a code": encode(EXITED),
    "an exit code that is none": encode(EXITED, (b"-3", b"0")),
}


@pytest.mark.parametrize("words", NONSENSE)
async def test_nonsense_ends_the_connection_and_nothing_is_believed(
    trusting: Channel, told: Told, tmp_path: Path, words: str
) -> None:
    reader, writer = await connected(tmp_path)
    writer.write(NONSENSE[words])
    with contextlib.suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(), 5) == b""
    await until(lambda: told.lost == 1)
    writer.close()
    assert told.exits == []
    assert not trusting.connected
    # The twin: it may knock again and be heard.
    _, writer = await connected(tmp_path)
    writer.write(encode(HELLO, (b"ended", b"1", b"4", b"0", b"0")))
    await until(lambda: told.exits == [(4, 0)])
    writer.close()


async def test_half_a_frame_waits_and_a_new_connection_starts_afresh(
    trusting: Channel, told: Told, tmp_path: Path
) -> None:
    _, writer = await connected(tmp_path)
    writer.write(encode(EXITED, (b"3", b"0"))[:-1])
    await until(lambda: trusting.connected)
    await asyncio.sleep(0.05)
    assert told.exits == []
    _, second = await connected(tmp_path)
    second.write(encode(HELLO, (b"running", b"1", b"0", b"0", b"7")))
    await until(lambda: [hello.phase for hello in told.hellos] == ["running"])
    assert told.exits == [], "the half frame of the first connection is not joined to the second"
    for item in (writer, second):
        item.close()


async def test_it_is_served_from_the_deepest_folder_and_again_over_a_stale_socket(tmp_path: Path, told: Told) -> None:
    folder = tmp_path.joinpath(*["a-rather-long-name-of-a-folder"] * 8)
    folder.mkdir(parents=True)
    for _ in range(2):
        channel = Channel(folder, on_exit=told.on_exit, on_lost=told.on_lost)
        channel.listen("c" * 64)
        assert (folder / "agent.sock").is_socket()
        channel.close()
