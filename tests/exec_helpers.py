"""Running commands in a box and looking at it from the host; the exec WebSocket through aiohttp's own client."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from conftest import RunningDaemon, wait_for
from engine_helpers import lives

STDIN, STDOUT, STDERR, STATUS, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255
PROTOCOL = "v5.channel.k8s.io"


@dataclass
class Ran:
    """A run's answer, its streams decoded."""

    answer: dict[str, Any]
    stdout: bytes
    stderr: bytes


def run(daemon: RunningDaemon, agent: str, *command: str, stdin: bytes | None = None, **body: Any) -> Ran:
    """POST …/run; it must be 200."""
    if stdin is not None:
        body["stdin"] = base64.b64encode(stdin).decode()
    answer = daemon.post(f"/v1/agents/{agent}/run", {"command": list(command), **body})
    assert answer.status == 200, answer.content
    found: dict[str, Any] = answer.json
    return Ran(found, base64.b64decode(found["stdout"]), base64.b64decode(found["stderr"]))


def inside(container: str) -> list[str]:
    """Command lines of what runs in a container, by the host's word, but its guest and the guest's runners."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and lives(int(entry.name)):
            with contextlib.suppress(OSError):
                if container in (entry / "cgroup").read_text():
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if "/run/isolator/guest.py" not in command:
                        found.append(command)
    return found


def runners(container: str) -> list[int]:
    """Host pids of the guest's runners in a container."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if container in (entry / "cgroup").read_text():
                    status = (entry / "status").read_text()
                    innermost = next(line for line in status.splitlines() if line.startswith("NSpid")).split()[-1]
                    if innermost != "1" and b"/run/isolator/guest.py" in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
    return found


def empty(container: str, seconds: float = 5) -> None:
    """Assert that nothing but the guest runs in a container, now or in a moment."""
    wait_for(lambda: not inside(container), seconds, lambda: f"still there: {inside(container)}")


def descriptors(daemon: RunningDaemon) -> list[str]:
    """The daemon's open descriptors but connections of its API and the database's, each by what it is."""
    assert daemon.process is not None
    found = []
    for entry in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(entry.readlink()))
    return found


def pipes(daemon: RunningDaemon) -> int:
    """The daemon's pipes and terminals."""
    return sum(name.startswith("pipe:") or "ptmx" in name or "pts" in name for name in descriptors(daemon))


@dataclass
class Exec:
    """One exec's WebSocket."""

    socket: aiohttp.ClientWebSocketResponse
    started: dict[str, Any] = field(default_factory=dict)
    output: dict[int, bytearray] = field(default_factory=lambda: {STDOUT: bytearray(), STDERR: bytearray()})
    status: dict[str, Any] | None = None

    async def ask(self, *command: str, **body: Any) -> None:
        """Send the request and wait until it is told to be started, or refused."""
        await self.socket.send_str(json.dumps({"command": list(command), **body}))
        await self.step()

    async def step(self, seconds: float = 15) -> bool:
        """Take one message; False at the end."""
        message = await self.socket.receive(seconds)
        if message.type == aiohttp.WSMsgType.TEXT:
            self.started = json.loads(message.data)["started"]
        elif message.type == aiohttp.WSMsgType.BINARY:
            channel, data = message.data[0], message.data[1:]
            if channel == STATUS:
                self.status = json.loads(data)
            else:
                self.output[channel] += data
        else:
            return False
        return True

    async def until(self, word: bytes, channel: int = STDOUT) -> None:
        """Take messages until the output holds `word`."""
        while word not in self.output[channel]:
            assert await self.step(), (self.output, self.status)

    async def end(self) -> dict[str, Any]:
        """Take all the rest; the status."""
        while await self.step():
            pass
        assert self.status is not None
        return self.status

    async def type(self, data: bytes) -> None:
        await self.socket.send_bytes(bytes((STDIN,)) + data)

    async def resize(self, width: int, height: int) -> None:
        size = json.dumps({"Width": width, "Height": height}).encode()
        await self.socket.send_bytes(bytes((RESIZE,)) + size)

    async def close_stdin(self) -> None:
        await self.socket.send_bytes(bytes((CLOSE, STDIN)))

    async def signal(self, name: str | int) -> None:
        await self.socket.send_str(json.dumps({"signal": name}))

    async def hang_up(self) -> None:
        """Without a word, as a caller that was killed."""
        transport = self.socket._response.connection.transport  # type: ignore[union-attr]
        transport.abort()
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def exec_socket(daemon: RunningDaemon, agent: str) -> AsyncIterator[Exec]:
    """An open WebSocket on which nothing has been asked yet."""
    connector = aiohttp.UnixConnector(path=str(daemon.socket))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.ws_connect(
            f"http://localhost/v1/agents/{agent}/exec",
            protocols=(PROTOCOL,),
            max_msg_size=0,
            timeout=aiohttp.ClientWSTimeout(ws_close=2),
        ) as socket,
    ):
        assert socket.protocol == PROTOCOL
        yield Exec(socket)
