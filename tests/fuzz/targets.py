"""What is fuzzed: both sides of the guest's protocol, and what a caller may say on the exec WebSocket.

Run by run.py, one target in a process: `python tests/fuzz/targets.py daemon -max_total_time=20`. A target fails by
raising what it may not raise.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["isolator"]):
    from isolator.agents.channel import Channel
    from isolator.agents.frames import EXEC_EXITED, EXEC_FAILED, EXEC_GONE, EXEC_STARTED, Decoder, ProtocolError, encode
    from isolator.api import execs as exec_routes
    from isolator.api.wire import parse_model
    from isolator.guest import guest as guest_side
    from isolator.model.errors import IsolatorError
    from isolator.model.request import ExecRequest, RunRequest, TerminalSize

KNOWN = b"known-number"


class Watcher:
    """An exec's; counts what it is told."""

    def __init__(self) -> None:
        self.told = 0

    def on_started(self, pid: int) -> None:
        assert 0 <= pid < 10**10
        self.told += 1

    def on_failed(self, errno: int, where: str) -> None:
        assert 0 <= errno < 4096
        assert isinstance(where, str)
        self.told += 1

    def on_exited(self, code: int, number: int) -> None:
        assert 0 <= code < 256
        assert 0 <= number < 65
        self.told += 1

    def on_gone(self) -> None:
        self.told += 1


class DaemonSide:
    """Whatever a guest sends is understood or ends its connection, and no exec but its own hears of it."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()

    def __call__(self, data: bytes) -> None:
        self.loop.run_until_complete(self.feed(data))

    async def feed(self, data: bytes) -> None:
        def on_exit(code: int, number: int) -> None:
            assert 0 <= code < 256
            assert 0 <= number < 65

        channel = Channel(Path("/nowhere"), on_exit=on_exit, on_lost=lambda: None)
        known, other = Watcher(), Watcher()
        channel._execs = {KNOWN: known, b"other-number": other}
        decoder, position = Decoder(), 0
        about_other = b"other-number" in data
        # Raw bytes, and the same as the fields of a frame that is whole.
        stream = data + encode(data[0] if data else 0, (KNOWN, *data.split(b",")))
        with contextlib.suppress(ProtocolError):
            while position < len(stream):
                step = 1 + stream[position] % 97
                for frame in decoder.feed(stream[position : position + step]):
                    assert frame.kind < 256
                    channel._handle(frame)
                position += step
        for kind in (EXEC_STARTED, EXEC_FAILED, EXEC_EXITED, EXEC_GONE):
            with contextlib.suppress(ProtocolError):
                channel._handle(Decoder().feed(encode(kind, (KNOWN, *data[:200].split(b","))))[0])
        assert about_other or other.told == 0
        for future in (channel._hello, channel._started):
            future.cancel()


class GuestSide:
    """The guest takes what comes in pieces, or hangs up; it never fails and never keeps a descriptor."""

    def __call__(self, data: bytes) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        wire = guest_side.Wire(guest_side.select.poll(), theirs)
        descriptors = [1] * (data[0] % 20 if data else 0)
        try:
            with contextlib.suppress(OSError):
                for start in range(0, len(data), 3000):
                    piece = data[start : start + 3000]
                    if descriptors:
                        socket.send_fds(ours, [piece], descriptors)
                        descriptors = []
                    else:
                        ours.send(piece)
                    for kind, fields in wire.receive():
                        assert 0 <= kind < 256
                        assert guest_side.parse(guest_side.frame(kind, *fields)[4:]) == (kind, fields)
                    if wire.socket is None:
                        break
            assert len(wire.descriptors) <= guest_side.MAX_DESCRIPTORS
        finally:
            wire.close()
            ours.close()
            theirs.close()
        assert wire.descriptors == []


class Silent:
    """An execution that is told to signal."""

    def send_signal(self, number: int) -> None:
        assert 0 < number < 65


class ApiSide:
    """A caller's first message, sizes and signals: a model, or a refusal of ours."""

    def __call__(self, data: bytes) -> None:
        text = data.decode(errors="surrogateescape")
        for model in (ExecRequest, RunRequest, TerminalSize):
            for body in (data, text):
                with contextlib.suppress(IsolatorError):
                    parse_model(body, model)
        exec_routes._control(Silent(), text)  # type: ignore[arg-type]
        exec_routes._control(Silent(), f'{{"signal": {text}}}')  # type: ignore[arg-type]
        with contextlib.suppress(IsolatorError):
            exec_routes._decoded(text)


TARGETS: dict[str, Callable[[], Callable[[bytes], None]]] = {
    "daemon": DaemonSide,
    "guest": GuestSide,
    "api": ApiSide,
}

if __name__ == "__main__":
    target = TARGETS[sys.argv.pop(1)]()
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
