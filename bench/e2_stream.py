"""E2: one gigabyte of a command's output. Our side: the exec WebSocket, from its request to its status.

The raw side: `docker exec … cat` of as much, its standard output a pipe that is read to its end. Both readers look at
nothing: ours strips the frames' heads, for that is what it costs.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess

from measure import Samples, Table, milliseconds
from rig import ENGINE_SOCKET, Rig

SIZE = 1 << 30
TARGET = 1.0
COMMAND = ["head", "-c", str(SIZE), "/dev/zero"]
_CHUNK = 1 << 20


class LeanSocket:
    """As much of a WebSocket client as it takes to count what comes."""

    def __init__(self, rig: Rig, agent: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(60)
        self._socket.connect(str(rig.socket))
        head = (
            f"GET /v1/agents/{agent}/exec HTTP/1.1", "Host: x", "Connection: Upgrade", "Upgrade: websocket",
            "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
            "Sec-WebSocket-Protocol: v5.channel.k8s.io", "", "",
        )  # fmt: skip
        self._socket.sendall("\r\n".join(head).encode())
        self._buffer = bytearray(_CHUNK)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += self._socket.recv(1)
        if b" 101 " not in answer:
            raise RuntimeError(f"no WebSocket: {answer!r}")

    def send_text(self, text: str) -> None:
        data = text.encode()
        assert len(data) < 65536
        self._socket.sendall(b"\x81\xfe" + len(data).to_bytes(2, "big") + b"\0\0\0\0" + data)

    def _take(self, size: int) -> bytes:
        """The next bytes, few."""
        while self._end - self._start < size:
            self._fill()
        found = bytes(self._view[self._start : self._start + size])
        self._start += size
        return found

    def _fill(self) -> None:
        if self._start:
            rest = self._buffer[self._start : self._end]
            self._buffer[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        got = self._socket.recv_into(self._view[self._end :])
        if not got:
            raise RuntimeError("the daemon hung up")
        self._end += got

    def _skip(self, size: int) -> None:
        here = min(size, self._end - self._start)
        self._start += here
        size -= here
        while size:
            self._start = self._end = 0
            got = self._socket.recv_into(self._view[: min(size, _CHUNK)])
            if not got:
                raise RuntimeError("the daemon hung up")
            size -= got

    def count(self) -> tuple[int, dict[str, object]]:
        """Bytes of output until the status, and the status."""
        total = 0
        while True:
            head = self._take(2)
            size = head[1] & 127
            if size > 125:
                size = int.from_bytes(self._take(2 if size == 126 else 8), "big")
            if head[0] & 15 != 2:
                self._skip(size)
                continue
            channel = self._take(1)[0]
            if channel == 3:
                return total, json.loads(self._take(size - 1))
            self._skip(size - 1)
            total += size - 1

    def close(self) -> None:
        self._socket.close()


def ours_once(rig: Rig, agent: str) -> None:
    link = LeanSocket(rig, agent)
    link.send_text(json.dumps({"command": COMMAND, "stdin": False}))
    total, status = link.count()
    link.close()
    if total != SIZE or status["exit_code"] != 0:
        raise RuntimeError(f"{total} bytes came, {status}")


def raw_once(container: str) -> None:
    command = ["docker", "-H", f"unix://{ENGINE_SOCKET}", "exec", container, *COMMAND]
    total = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        buffer = bytearray(_CHUNK)
        while got := os.readv(process.stdout.fileno(), [buffer]):
            total += got
    if total != SIZE or process.returncode != 0:
        raise RuntimeError(f"{total} bytes came, exit code {process.returncode}")


def measure(rig: Rig, rounds: int) -> Table:
    ours, raw = Samples("isolator: exec WebSocket"), Samples("raw: docker exec, its output a pipe")
    agent, container = rig.spawn(), rig.raw.spawn(rig.raw.body())
    try:
        for _ in range(max(3, rounds // 6)):
            ours.timed(ours_once, rig, agent)
            raw.timed(raw_once, container)
    finally:
        rig.stop(agent)
        rig.raw.remove(container)
    speed = {side.name: SIZE / side.p50 / 2**20 for side in (ours, raw)}
    ratio = speed[ours.name] / speed[raw.name]
    return Table(
        "E2",
        "exec stream, 1 GiB of standard output",
        ("side", "rounds", "p50 ms", "MiB/s", "throughput / raw"),
        tuple(
            (
                side.name,
                str(len(side.seconds)),
                milliseconds(side.p50),
                f"{speed[side.name]:.0f}",
                f"{speed[side.name] / speed[raw.name]:.2f}x",
            )
            for side in (ours, raw)
        ),
        (f"{'reached' if ratio >= TARGET else 'missed'}: throughput {ratio:.2f}x, target at least {TARGET:g}x",),
    )
