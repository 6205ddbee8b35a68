"""The client's WebSocket and its execs, against aiohttp's server and against one that sends what no server may."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import WSMsgType, web
from hypothesis import given
from hypothesis import strategies as st
from websocket_helpers import PROTOCOL, saying, speaking

from isolator.client import AnswerInvalid, AnswerTimeout, Client, ConnectionLost, ExecStatus, ProblemError, RunResult
from isolator.client.frames import BINARY, CLOSE, PING, TEXT, Message, MessageDecoder, encode_head
from isolator.client.location import Location
from isolator.client.websocket import WebSocket, open_websocket

pytestmark = pytest.mark.timeout(60)
AGENT = "abcdefghjkmnpqrs"
LARGEST = 1 << 20
SMALL = 1 << 16


@pytest.fixture
def path() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="iso-"))
    yield folder / "s"
    shutil.rmtree(folder)


def connect(path: Path, largest: int = LARGEST) -> WebSocket:
    return open_websocket(Location(path, named=True), "/v1/x", PROTOCOL, largest=largest, timeout=5)


def frame(opcode: int, payload: bytes, *, final: bool = True) -> bytes:
    """As a server sends it."""
    size = len(payload)
    if size < 126:
        length = bytes((size,))
    else:
        length = struct.pack("!BH", 126, size) if size < 1 << 16 else struct.pack("!BQ", 127, size)
    return bytes(((0x80 if final else 0) | opcode,)) + length + payload


# frames


@given(st.data())
def test_any_messages_in_any_pieces_are_read_as_they_were_sent(data: st.DataObject) -> None:
    messages = data.draw(st.lists(st.tuples(st.sampled_from([TEXT, BINARY]), st.lists(st.binary(max_size=300)))))
    stream, wanted = b"", []
    for opcode, parts in messages:
        pieces = parts or [b""]
        for index, part in enumerate(pieces):
            if data.draw(st.booleans()):
                stream += frame(PING, b"between")
                wanted.append(Message(PING, b"between"))
            stream += frame(opcode if index == 0 else 0, part, final=index == len(pieces) - 1)
        wanted.append(Message(opcode, b"".join(pieces)))
    decoder, found = MessageDecoder(LARGEST), []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        found += decoder.feed(stream[:cut])
        stream = stream[cut:]
    assert found == wanted


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_any_bytes_are_read_or_refused_and_held_within_the_bound(pieces: list[bytes]) -> None:
    decoder = MessageDecoder(1000)
    try:
        for piece in pieces:
            for message in decoder.feed(piece):
                assert len(message.data) <= 1000
    except AnswerInvalid:
        pass
    assert len(decoder._buffer) <= 1000 + 10 + 200
    assert sum(map(len, decoder._parts)) <= 1000


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 300_000])
def test_lengths_in_both_directions(size: int) -> None:
    payload = bytes(size)
    assert list(MessageDecoder(LARGEST).feed(frame(BINARY, payload))) == [Message(BINARY, payload)]
    head = encode_head(BINARY, size)
    unmasked = bytes((head[0], head[1] & 0x7F)) + head[2:-4]
    assert list(MessageDecoder(LARGEST).feed(unmasked + payload)) == [Message(BINARY, payload)]
    assert head[1] & 0x80


@pytest.mark.parametrize(
    "words",
    [
        b"\x83\x00",  # an opcode that is none
        b"\xc2\x00",  # an extension nobody agreed on
        b"\x82\x81\0\0\0\0x",  # masked
        b"\x09\x00",  # a ping in pieces
        b"\x89\x7e\x00\x80" + bytes(128),  # a ping that is too long
        b"\x80\x00",  # goes on with nothing
        b"\x02\x00\x82\x00",  # begins inside another
        b"\x82\x7e\x00\x05hello",  # a length in more bytes than needed
        b"\x82\x7f" + (SMALL + 1).to_bytes(8, "big"),  # announces too much
        b"\x82\x7f" + b"\xff" * 8,
        frame(BINARY, bytes(40_000), final=False) + frame(0, bytes(40_000)),  # too much in pieces
        frame(BINARY, b"", final=False) + frame(0, b"", final=False) * (SMALL + 1),  # pieces without an end
    ],
)
def test_what_no_server_may_send_is_refused(path: Path, words: bytes) -> None:
    with saying(path, words), connect(path, SMALL) as socket, pytest.raises(AnswerInvalid):
        socket.receive(10)


# a conversation


async def echo(answer: web.WebSocketResponse) -> None:
    async for message in answer:
        if message.type == WSMsgType.TEXT:
            await answer.ping(b"are you there")
            await answer.send_str(message.data)
        else:
            await answer.send_bytes(message.data)


@pytest.mark.parametrize("size", [0, 5, 200, 70_000, LARGEST])
def test_messages_come_back(path: Path, size: int) -> None:
    text = "ü" * (size // 2)
    with speaking(path, echo), connect(path) as socket:
        socket.send_text(text)
        assert socket.receive(5) == Message(TEXT, text.encode())
        socket.send_binary(bytes(range(256)) * (size // 256), b"tail")
        answer = socket.receive(5) if size < LARGEST else None
        if answer is not None:
            assert answer == Message(BINARY, bytes(range(256)) * (size // 256) + b"tail")


def test_a_close_is_answered_and_its_code_known(path: Path) -> None:
    async def end(answer: web.WebSocketResponse) -> None:
        await answer.send_bytes(b"last")
        assert await answer.close(code=1011, message=b"why")
        codes.append(answer.close_code)

    codes: list[int | None] = []
    with speaking(path, end), connect(path) as socket:
        assert socket.receive(5) == Message(BINARY, b"last")
        assert socket.receive(5) is None
        assert socket.receive(5) is None
        assert socket.close_code == 1011


def test_pings_are_answered_with_their_bytes(path: Path) -> None:
    words = b"".join(frame(PING, bytes((number,))) for number in range(50)) + frame(BINARY, b"x") + frame(CLOSE, b"")
    with saying(path, words) as told:
        socket = connect(path)
        assert socket.receive(5) == Message(BINARY, b"x")
        assert socket.receive(5) is None
        assert socket.close_code == 1005
        socket.close()
    assert encode_head(10, 1) + bytes((49,)) in b"".join(told[1:])


def test_hang_up_silence_and_closing_by_another_thread(path: Path) -> None:
    with saying(path, b"\x82\x05hal"), connect(path) as socket, pytest.raises(ConnectionLost):
        socket.receive(5)
    path.unlink()
    with speaking(path, echo), connect(path) as socket:
        with pytest.raises(AnswerTimeout):
            socket.receive(0.05)
        threading.Timer(0.2, socket.close).start()
        with pytest.raises(ConnectionLost):
            socket.receive()
        with pytest.raises(ConnectionLost):
            socket.send_binary(b"x")
        with pytest.raises(ConnectionLost):
            socket.send_text("x")


@pytest.mark.parametrize("wrong", [{"accept": "AAAA"}, {"protocol": "v4.channel.k8s.io"}])
def test_a_wrong_upgrade_is_refused(path: Path, wrong: dict[str, str]) -> None:
    with saying(path, b"", **wrong), pytest.raises(AnswerInvalid):
        connect(path)


def test_a_server_that_only_talks_and_one_that_only_listens_do_not_lock_up(path: Path) -> None:
    """Both sides send more than fits anywhere, with pings between: the receiver must go on while the sender waits."""

    async def flood(answer: web.WebSocketResponse) -> None:
        for _ in range(100):
            await answer.send_bytes(bytes(200_000))
            await answer.ping(b"p")
        total = 0
        while total < 20_000_000:
            total += len((await answer.receive()).data)
        await answer.send_str(str(total))

    with speaking(path, flood), connect(path) as socket:
        sender = threading.Thread(target=lambda: [socket.send_binary(bytes(100_000)) for _ in range(200)])
        sender.start()
        got = 0
        while (message := socket.receive(20)) is not None and message.opcode == BINARY:
            got += len(message.data)
        sender.join(10)
        assert (got, message) == (20_000_000, Message(TEXT, b"20000000"))


# execs


def status(**changes: object) -> bytes:
    told = {"status": "Success", "exit_code": 0, "signal": None, "timed_out": False, "oom_killed": False}
    return b"\x03" + json.dumps({**told, "truncated": False, **changes}).encode()


def test_an_exec_asks_and_tells_as_agreed(path: Path) -> None:
    heard: list[object] = []

    async def serve(answer: web.WebSocketResponse) -> None:
        heard.append(json.loads((await answer.receive()).data))
        await answer.send_str('{"started": {"pid": 42}}')
        heard.extend([(await answer.receive()).data for _ in range(4)])
        await answer.send_str('{"of a newer daemon": 1}')
        await answer.send_bytes(b"")
        await answer.send_bytes(b"\x09unknown")
        await answer.send_bytes(b"\x01out\x00")
        await answer.send_bytes(b"\x02err\xff")
        await answer.send_bytes(status(exit_code=139, signal=11, oom_killed=True, reason="NonZeroExitCode"))
        await answer.close()

    options = {"env": {"A": "b"}, "cwd": "/tmp", "timeout": 3}
    with speaking(path, serve), Client(path) as client:
        execution = client.exec(AGENT, ["x"], **options, tty=True, size=(80, 24))  # type: ignore[arg-type]
        with execution:
            assert execution.pid == 42
            execution.write(b"in")
            execution.signal(15)
            execution.resize(100, 30)
            execution.close_stdin()
            assert list(execution) == [(1, b"out\0"), (2, b"err\xff")]
            ended = execution.wait()
            assert ended == ExecStatus(139, 11, False, True, False, "NonZeroExitCode")
            assert execution.wait() == ended
            with pytest.raises(BrokenPipeError):
                execution.write(b"too late")
            execution.signal(15)
            execution.close_stdin()
    assert heard[0] == {**options, "command": ["x"], "tty": True, "stdin": True, "size": {"width": 80, "height": 24}}
    assert heard[1:] == [b"\0in", '{"signal": 15}', b'\x04{"Width": 100, "Height": 30}', b"\xff\0"]


def test_a_refusal_and_a_lost_daemon_are_told(path: Path) -> None:
    async def refuse(answer: web.WebSocketResponse) -> None:
        await answer.receive()
        refusal = {"code": "command_not_found", "detail": "no", "http_status": 400, "command": "x"}
        await answer.send_bytes(status(status="Failure", exit_code=None, **refusal))
        await answer.close()

    with speaking(path, refuse), Client(path) as client:
        with pytest.raises(ProblemError) as caught:
            client.exec(AGENT, ["x"])
        assert caught.value.answer() == {"code": "command_not_found", "status": 400, "detail": "no", "command": "x"}
        with pytest.raises(TypeError):
            client.exec(AGENT, "sh -c x")

    async def leave(answer: web.WebSocketResponse) -> None:
        await answer.receive()
        await answer.send_str('{"started": {"pid": 42}}')
        await answer.send_bytes(b"\x01half")

    path.unlink(missing_ok=True)
    with speaking(path, leave), Client(path) as client, client.exec(AGENT, ["x"]) as execution:
        output = iter(execution)
        assert next(output) == (1, b"half")
        with pytest.raises(ConnectionLost):
            next(output)
        with pytest.raises(ConnectionLost):
            execution.wait()


@pytest.mark.parametrize("first", ["[]", '{"started": {}}', "no json", b"\x01early", b"\x03[]"])
def test_an_exec_that_does_not_begin_as_agreed(path: Path, first: str | bytes) -> None:
    async def serve(answer: web.WebSocketResponse) -> None:
        await answer.receive()
        await (answer.send_str(first) if isinstance(first, str) else answer.send_bytes(first))
        await answer.receive()

    with speaking(path, serve), Client(path) as client, pytest.raises(AnswerInvalid):
        client.exec(AGENT, ["x"])


def test_a_run_result_is_read() -> None:
    answer = {"exit_code": 137, "signal": 9, "stdout": "AP8=", "stderr": "", "timed_out": True, "duration": 0.5}
    assert RunResult.from_answer(answer) == RunResult(137, 9, b"\0\xff", b"", True, False, False, 0.5)
    for wrong in ({"stdout": "?"}, {"stderr": 3}, {"exit_code": "3"}):
        with pytest.raises(AnswerInvalid):
            RunResult.from_answer({**answer, **wrong})
