"""M1: a message there and back. Gateway to agent and back to the gateway, and one agent to another and back.

Our side: the gateway's WebSocket and the agents' lines of JSON, each end acknowledging what it received, as any
receiver must; the agents are plain Python in two boxes. The raw side: one line of the same size through a bare Unix
socket to another process of the host and back, with no envelope, no daemon between and no box. All three in turn.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
from typing import Any

from measure import Samples, Table, milliseconds, verdict
from raw_side import TEAM
from rig import Rig, running_rig

P50, P99 = 0.5, 2.0
_ROUNDS, _QUICK_ROUNDS = 3000, 300
_WARM_UP = 100
_BODY = "x" * 64
_COLUMNS = ("side", "rounds", "p50 ms", "p95 ms", "p99 ms", "p50 / raw p50")

# What both agents run. One that is told "measure" times a message to its mate and back; anything else it echoes.
AGENT = """
import json, os, socket, time
link = socket.socket(socket.AF_UNIX)
link.connect(os.environ["ISOLATOR_AGENT_SOCKET"])
lines = link.makefile("rb")
link.sendall(b'{"receive":true}\\n')
received = lambda m: b'{"received":"%s"}\\n' % m["id"].encode()
message = lambda to, body: json.dumps({"to": to, "type": "echo", "body": body}).encode() + b"\\n"
while True:
    told = json.loads(lines.readline())
    if "from" not in told:
        continue
    if told["type"] != "measure":
        link.sendall(received(told) + message(told["from"], told["body"]))
        continue
    link.sendall(received(told))
    began = time.perf_counter()
    link.sendall(message(told["body"]["mate"], told["body"]["text"]))
    while "from" not in (back := json.loads(lines.readline())):
        pass
    took = time.perf_counter() - began
    link.sendall(received(back) + message("gateway", took))
"""

RAW = """
import socket
listener = socket.socket(fileno=0)
link, _ = listener.accept()
while data := link.recv(65536):
    link.sendall(data)
"""


class Gateway:
    """A gateway's end of one agent's WebSocket."""

    def __init__(self, rig: Rig, agent: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(30)
        self._socket.connect(str(rig.socket))
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET /v1/agents/{agent}/messages HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
        )
        self._read = b""
        while b"\r\n\r\n" not in self._read:
            self._read += self._socket.recv(65536)
        head, _, self._read = self._read.partition(b"\r\n\r\n")
        if b" 101 " not in head:
            raise RuntimeError(f"no WebSocket: {head.decode()}")

    def say(self, text: bytes) -> None:
        """Send a text; a mask of zeros is a mask."""
        head = bytes([0x80 | len(text)]) if len(text) < 126 else b"\xfe" + len(text).to_bytes(2, "big")
        self._socket.sendall(b"\x81" + head + bytes(4) + text)

    def _bytes(self, count: int) -> bytes:
        while len(self._read) < count:
            self._read += self._socket.recv(65536)
        data, self._read = self._read[:count], self._read[count:]
        return data

    def message(self) -> dict[str, Any]:
        """The next message; the daemon's answers to our own are passed over."""
        while True:
            length = self._bytes(2)[1]
            if length == 126:
                length = int.from_bytes(self._bytes(2), "big")
            told: dict[str, Any] = json.loads(self._bytes(length))
            if "from" in told:
                return told

    def exchange(self, kind: str, body: Any) -> dict[str, Any]:
        """A message there and one back, which is acknowledged."""
        self.say(json.dumps({"type": kind, "body": body}).encode())
        back = self.message()
        self.say(b'{"received":"%s"}' % back["id"].encode())
        return back

    def close(self) -> None:
        self._socket.close()


class RawEcho:
    """Another process behind a bare Unix socket."""

    def __init__(self, rig: Rig) -> None:
        path = rig.home / "echo.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(path))
            listener.listen(1)
            self._process = subprocess.Popen([sys.executable, "-c", RAW], stdin=listener.fileno())
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))
        path.unlink()

    def exchange(self, line: bytes) -> None:
        self._socket.sendall(line)
        got = 0
        while got < len(line):
            got += len(self._socket.recv(65536))

    def close(self) -> None:
        self._socket.close()
        self._process.wait(10)


def measure(quick: bool) -> Table:
    with running_rig(start=False) as rig:
        # One exchange after the other is more than an agent may send in a second; its pace is not what is measured.
        rig.start(ISOLATOR_MESSAGE_RATE="1000000")
        rig.await_proof()
        return _measure(rig, _QUICK_ROUNDS if quick else _ROUNDS)


def _measure(rig: Rig, rounds: int) -> Table:
    ours, between = Samples("gateway -> agent -> gateway"), Samples("agent -> agent -> agent")
    raw = Samples("raw: a bare Unix-socket echo")
    agents = [rig.spawn(TEAM, ["python3", "-c", AGENT]) for _ in range(2)]
    gateway, echo = Gateway(rig, agents[0]), RawEcho(rig)
    line = json.dumps({"type": "echo", "body": _BODY}).encode() + b"\n"
    order = {"mate": agents[1], "text": _BODY}
    try:
        for number in range(_WARM_UP + rounds):
            sides = (ours, between, raw) if number >= _WARM_UP else (Samples(""), Samples(""), Samples(""))
            sides[0].timed(gateway.exchange, "echo", _BODY)
            sides[1].seconds.append(gateway.exchange("measure", order)["body"])
            sides[2].timed(echo.exchange, line)
    finally:
        gateway.close()
        echo.close()
        for agent in agents:
            rig.stop(agent)
    return Table(
        "M1",
        "a message there and back, both acknowledged",
        _COLUMNS,
        tuple(_row(side, raw) for side in (ours, between, raw)),
        tuple(
            verdict(f"{side.name}: {name}", value * 1000, most, " ms")
            for side in (ours, between)
            for name, value, most in (("p50", side.p50, P50), ("p99", side.quantile(0.99), P99))
        ),
        (
            "a round is two messages, each through the daemon, into a receiver's window and out by its acknowledgement",
            "the bound of messages a second (message_rate) is lifted for this",
        ),
    )


def _row(side: Samples, raw: Samples) -> tuple[str, ...]:
    figures = (side.p50, side.p95, side.quantile(0.99))
    return (side.name, str(len(side.seconds)), *map(milliseconds, figures), f"{side.p50 / raw.p50:.1f}x")
