"""Execs over a channel, against a guest that lies about them; visitors; and ten thousand knocks."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

from isolator.agents import door as door_module
from isolator.agents.channel import Channel, ExecOrder
from isolator.agents.frames import (
    EXEC,
    EXEC_EXITED,
    EXEC_FAILED,
    EXEC_GONE,
    EXEC_KILL,
    EXEC_SIGNAL,
    EXEC_STARTED,
    HELLO,
    Decoder,
    Frame,
    encode,
)

ORDER = ExecOrder(["/bin/true"], [("A", "b=c")], "/tmp")


@dataclass
class Told:
    """What an exec's watcher was told."""

    words: list[tuple[object, ...]] = field(default_factory=list)

    def on_started(self, pid: int) -> None:
        self.words.append(("started", pid))

    def on_failed(self, errno: int, where: str) -> None:
        self.words.append(("failed", errno, where))

    def on_exited(self, code: int, number: int) -> None:
        self.words.append(("exited", code, number))

    def on_gone(self) -> None:
        self.words.append(("gone",))


class Guest:
    """This process as a guest: what it says is up to the test."""

    def __init__(self, folder: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(folder / "agent.sock"))
        self.socket.setblocking(False)
        self.decoder = Decoder()
        self.say(HELLO, b"running", b"2", b"0", b"0", b"7")

    def say(self, kind: int, *fields: bytes) -> None:
        self.socket.sendall(encode(kind, fields))

    async def heard(self) -> list[Frame]:
        """The next frames; descriptors beside them are closed."""
        async with asyncio.timeout(5):
            while True:
                try:
                    data, descriptors, _, _ = socket.recv_fds(self.socket, 65536, 16)
                except BlockingIOError:
                    await asyncio.sleep(0.005)
                    continue
                for descriptor in descriptors:
                    os.close(descriptor)
                return self.decoder.feed(data)


def open_descriptors() -> int:
    gc.collect()  # what an earlier test dropped does not count
    return len(list(Path("/proc/self/fd").iterdir()))


def pipe_end() -> int:
    read_end, write_end = os.pipe()
    os.close(read_end)
    return write_end


async def until(condition: Callable[[], object], seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.005)


@pytest_asyncio.fixture
async def visitors() -> list[socket.socket]:
    return []


@pytest_asyncio.fixture
async def channel(
    tmp_path: Path, visitors: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Channel]:
    """A channel that takes this very process for its guest."""
    monkeypatch.setattr(door_module, "is_init_of", lambda pid, _: pid == os.getpid())
    channel = Channel(tmp_path, on_exit=lambda *_: None, on_lost=lambda: None, on_visitor=visitors.append)
    channel.listen("c" * 64)
    yield channel
    channel.close()


@pytest_asyncio.fixture
async def guest(channel: Channel, tmp_path: Path) -> AsyncIterator[Guest]:
    guest = Guest(tmp_path)
    await asyncio.wait_for(channel.hello(), 5)
    yield guest
    guest.socket.close()


async def test_an_exec_from_order_to_end(channel: Channel, guest: Guest) -> None:
    told = Told()
    number = channel.execute(ORDER, [pipe_end()], told)
    assert await guest.heard() == [Frame(EXEC, (number, b"", b"/tmp", b"eA\x00b=c", b"a/bin/true"))]
    guest.say(EXEC_STARTED, number, b"12")
    channel.signal_exec(number, 15)
    channel.kill_exec(number)
    guest.say(EXEC_EXITED, number, b"3", b"0")
    guest.say(EXEC_GONE, number)
    await until(lambda: len(told.words) == 3)
    assert told.words == [("started", 12), ("exited", 3, 0), ("gone",)]
    assert await guest.heard() == [Frame(EXEC_SIGNAL, (number, b"15")), Frame(EXEC_KILL, (number,))]
    guest.say(EXEC_EXITED, number, b"4", b"0")
    guest.say(EXEC_GONE, number)
    await asyncio.sleep(0.05)
    assert len(told.words) == 3, "what is gone says no more"


async def test_numbers_are_never_those_of_another_exec_and_not_to_be_guessed(channel: Channel, guest: Guest) -> None:
    numbers = {channel.execute(ORDER, [], Told()) for _ in range(50)}
    assert len(numbers) == 50
    assert {len(number) for number in numbers} == {12}
    await guest.heard()


async def test_what_is_said_of_unknown_and_of_forgotten_execs_reaches_nobody(channel: Channel, guest: Guest) -> None:
    told, forgotten = Told(), Told()
    channel.execute(ORDER, [], told)
    other = channel.execute(ORDER, [], forgotten)
    channel.forget_exec(other)
    for number in (b"", b"0", other, b"\xff" * 12, b"x" * 10_000):
        guest.say(EXEC_STARTED, number, b"1")
        guest.say(EXEC_FAILED, number, b"2", b"cwd")
        guest.say(EXEC_EXITED, number, b"0", b"0")
        guest.say(EXEC_GONE, number)
    await asyncio.sleep(0.1)
    assert told.words == forgotten.words == []
    assert channel.connected


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (EXEC_STARTED, ()),
        (EXEC_STARTED, (b"-1",)),
        (EXEC_STARTED, (b"1" * 11,)),
        (EXEC_FAILED, (b"2",)),
        (EXEC_FAILED, (b"4096", b"")),
        (EXEC_EXITED, (b"0",)),
        (EXEC_EXITED, (b"256", b"0")),
        (EXEC_EXITED, (b"0", b"65")),
        (EXEC_EXITED, (b"x", b"0")),
    ],
)
async def test_nonsense_about_an_exec_ends_the_connection_and_the_exec(
    channel: Channel, guest: Guest, kind: int, fields: tuple[bytes, ...]
) -> None:
    told = Told()
    number = channel.execute(ORDER, [], told)
    guest.say(kind, number, *fields)
    await until(lambda: told.words == [("gone",)])
    assert not channel.connected


async def test_a_frame_about_no_exec_at_all_ends_the_connection(channel: Channel, guest: Guest) -> None:
    guest.say(EXEC_GONE)
    await until(lambda: not channel.connected)


@pytest.mark.parametrize("how", ["hangs up", "knocks again", "channel closed"])
async def test_a_link_that_ends_ends_its_execs(channel: Channel, guest: Guest, tmp_path: Path, how: str) -> None:
    told = [Told(), Told()]
    for item in told:
        channel.execute(ORDER, [pipe_end()], item)
    again = None
    if how == "hangs up":
        guest.socket.close()
    elif how == "knocks again":
        again = Guest(tmp_path)
    else:
        channel.close()
    await until(lambda: [item.words for item in told] == [[("gone",)]] * 2)
    if again is not None:
        later = Told()
        number = channel.execute(ORDER, [], later)
        again.say(EXEC_STARTED, number, b"1")
        await until(lambda: later.words == [("started", 1)])
        again.socket.close()


async def test_half_a_frame_holds_up_nobody(channel: Channel, guest: Guest) -> None:
    told = Told()
    number = channel.execute(ORDER, [], told)
    frame = encode(EXEC_EXITED, (number, b"0", b"0"))
    guest.socket.sendall(frame[:-1])
    await asyncio.sleep(0.05)
    assert told.words == []
    channel.kill_exec(number)
    guest.socket.sendall(frame[-1:])
    await until(lambda: told.words == [("exited", 0, 0)])


async def test_descriptors_do_not_leak_on_any_failure(channel: Channel, guest: Guest, tmp_path: Path) -> None:
    await asyncio.sleep(0)
    before = open_descriptors()
    for _ in range(20):
        channel.execute(ORDER, [pipe_end(), pipe_end()], Told())
    await guest.heard()
    await until(lambda: open_descriptors() == before)
    # A guest that reads no more: what waits is closed with its link.
    with contextlib.suppress(ConnectionError):
        for _ in range(2000):
            channel.execute(ExecOrder(["x" * 100_000], [], "/"), [pipe_end()], Told())
    guest.socket.close()
    assert not channel.connected
    after = open_descriptors()
    for _ in range(20):
        with pytest.raises(ConnectionError):
            channel.execute(ORDER, [pipe_end(), pipe_end()], Told())
    assert open_descriptors() == after == before - 2


async def test_who_is_pid_one_is_the_guest_who_is_in_the_box_a_visitor_and_all_else_nobody(
    channel: Channel, visitors: list[socket.socket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[tuple[int, str]] = []

    def in_the_box(pid: int, container: str) -> bool:
        judged.append((pid, container))
        return len(judged) == 1

    monkeypatch.setattr(door_module, "is_init_of", lambda *_: False)
    monkeypatch.setattr(door_module, "is_in", in_the_box)
    strangers = []
    for _ in range(2):
        stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stranger.connect(str(tmp_path / "agent.sock"))
        stranger.send(encode(HELLO, (b"ended", b"2", b"0", b"0", b"0")))
        strangers.append(stranger)
        await until(lambda: len(judged) == len(strangers))
    assert judged == [(os.getpid(), "c" * 64)] * 2
    assert len(visitors) == 1
    assert visitors[0].getblocking() is False
    visitors[0].send(b"hello")
    strangers[0].settimeout(5)
    strangers[1].settimeout(5)
    assert strangers[0].recv(10) == b"hello"
    with contextlib.suppress(ConnectionError):
        assert strangers[1].recv(10) == b""
    assert not channel.connected
    for item in (*visitors, *strangers):
        item.close()


@pytest.mark.parametrize("as_guest", [False, True])
async def test_ten_thousand_connections_cost_a_bounded_time_and_leave_nothing(
    channel: Channel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_guest: bool
) -> None:
    """From PID 1 itself too: in a foreign image it may be anybody's program."""
    judged = 0

    def judge(pid: int, container: str) -> bool:
        nonlocal judged
        judged += 1
        return as_guest

    monkeypatch.setattr(door_module, "is_init_of", judge)
    before, held = open_descriptors(), list[socket.socket]()
    loop = asyncio.get_running_loop()
    began, slowest, refused = loop.time(), 0.0, 0
    for attempt in range(10_000):
        knocker = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        knocker.setblocking(False)
        try:
            knocker.connect(str(tmp_path / "agent.sock"))
            held.append(knocker)
        except BlockingIOError:
            refused += 1
            knocker.close()
        if attempt % 10 == 0:
            at = loop.time()
            await asyncio.sleep(0)
            slowest = max(slowest, loop.time() - at)
    seconds = loop.time() - began
    assert 0 < judged <= door_module.KNOCKS_ALLOWED * (seconds + 1)
    assert refused > 5000
    assert slowest < 0.5
    for item in held:
        item.close()
    monkeypatch.setattr(door_module, "is_init_of", lambda pid, _: pid == os.getpid())
    await asyncio.sleep(1.2)
    await until(lambda: open_descriptors() <= before)
    guest = Guest(tmp_path)
    await until(lambda: channel.connected)
    guest.socket.close()


async def test_without_descriptors_left_the_door_rests_and_opens_again(
    channel: Channel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the loop would spin on a listener that it can't accept from."""
    tries = 0

    class Exhausted:
        def __init__(self, listener: socket.socket) -> None:
            self.listener = listener

        def fileno(self) -> int:
            return self.listener.fileno()

        def accept(self) -> object:
            nonlocal tries
            tries += 1
            raise OSError(24, "Too many open files")

        def close(self) -> None:
            self.listener.close()

    listener = channel._door._listener
    assert listener is not None
    monkeypatch.setattr(channel._door, "_listener", Exhausted(listener))
    guest = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    guest.connect(str(tmp_path / "agent.sock"))
    await until(lambda: tries)
    await asyncio.sleep(0.3)
    assert tries == 1
    monkeypatch.setattr(channel._door, "_listener", listener)
    await until(lambda: channel.connected, 3)
    guest.close()
