"""The daemon's end of an agent's socket: who is at the other end, and what it reports.

The socket is the identity. Each agent has a folder of its own on the host, mounted at /run/isolator in its box
and nowhere else; the socket in it is served by this channel. A connection counts as the guest's only if the
kernel says its peer is PID 1 of that agent's container. Anything else in the box may connect too, and is hung up
on; if it keeps knocking, the channel stops answering for a while, so that it can't keep the daemon busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

from isolator.agents.frames import (
    BYE,
    EXITED,
    FAILED,
    GO,
    HELLO,
    SIGNAL,
    STARTED,
    Decoder,
    Frame,
    ProtocolError,
    encode,
)
from isolator.host.processes import is_init_of

_BACKLOG = 16
_STRANGERS_ALLOWED = 20
_STRANGER_PAUSE = 1.0
_RECEIVE = 65536

Phase = Literal["waiting", "running", "ended"]


@dataclass(frozen=True, slots=True)
class Hello:
    """The guest's first words, from the process the kernel named. code and signal count once it has ended."""

    pid: int
    phase: Phase
    code: int
    signal: int


@dataclass(frozen=True, slots=True)
class StartFailure:
    """The command could not be executed."""

    errno: int


def create_folder(folder: Path) -> None:
    """Make an agent's folder with the guest in it; the agent may read and connect, only root may write."""
    folder.mkdir(mode=0o700)
    folder.chmod(0o755)  # whatever the umask: the agent, under its own uid, must get through
    guest = folder / "guest.py"
    guest.write_bytes(resources.files("isolator.guest").joinpath("guest.py").read_bytes())
    guest.chmod(0o444)


def remove_folder(folder: Path) -> None:
    """Remove an agent's folder; one that is absent is fine."""
    shutil.rmtree(folder, ignore_errors=True)


class Channel:
    """One agent's channel. Runs on the event loop; holds one listening and at most one guest's connection."""

    def __init__(
        self,
        folder: Path,
        *,
        on_exit: Callable[[int, int], None],
        on_lost: Callable[[], None],
        on_hello: Callable[[Hello], None] | None = None,
    ) -> None:
        """`on_exit(code, signal)` when the guest reports the end; `on_lost()` when its connection ends."""
        self._folder = folder
        self._loop = asyncio.get_running_loop()
        self._on_exit = on_exit
        self._on_lost = on_lost
        self._on_hello = on_hello
        self._container_id: str | None = None
        self._listener: socket.socket | None = None
        self._guest: socket.socket | None = None
        self._decoder = Decoder()
        self._strangers = 0
        self._released = False
        self._hello: asyncio.Future[Hello] = self._loop.create_future()
        self._started: asyncio.Future[int | StartFailure] = self._loop.create_future()

    def listen(self, container_id: str | None = None) -> None:
        """Serve the socket. `container_id` may come later; until then nobody is accepted.

        Raises:
            OSError: the folder is gone or the socket can't be made.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        # By descriptor: a path of a deep folder would be longer than a Unix address may be.
        folder = os.open(self._folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            address = Path(f"/proc/self/fd/{folder}/agent.sock")
            with contextlib.suppress(FileNotFoundError):
                address.unlink()
            listener.bind(str(address))
            # The folder above is closed to everybody on the host; inside the box any uid may knock.
            address.chmod(0o666)
        except BaseException:
            listener.close()
            raise
        finally:
            os.close(folder)
        listener.listen(_BACKLOG)
        self._listener = listener
        if container_id is not None:
            self.expect(container_id)

    def expect(self, container_id: str) -> None:
        """Accept the guest of this container from now on."""
        self._container_id = container_id
        if self._listener is not None:
            self._loop.add_reader(self._listener, self._accept)

    @property
    def connected(self) -> bool:
        """Whether the guest is there now."""
        return self._guest is not None

    async def hello(self) -> Hello:
        """The guest's first words; wait with a timeout."""
        return await asyncio.shield(self._hello)

    async def release(self, secrets: Sequence[tuple[str, str, bytes]]) -> int | StartFailure:
        """Hand the secrets over and let the command run; its pid in the box, or why it did not start.

        Args:
            secrets: (letter, name, value): `s` a file, `E` a variable.

        Raises:
            ConnectionError: the guest is not there, or left before it answered.
        """
        fields = [letter.encode() + name.encode() + b"\x00" + value for letter, name, value in secrets]
        await self._send(encode(GO, fields))
        self._released = True
        return await asyncio.shield(self._started)

    async def signal(self, number: int) -> bool:
        """Pass a signal to the command's process group; False when the guest is not there."""
        return await self._try_send(encode(SIGNAL, (str(number).encode(),)))

    async def bye(self) -> None:
        """The end was noted; the guest may leave."""
        await self._try_send(encode(BYE))

    def close(self) -> None:
        """Stop serving. Boxes go on and knock again."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        self._drop_guest()
        for future in (self._hello, self._started):
            future.cancel()

    async def _send(self, data: bytes) -> None:
        if self._guest is None:
            raise ConnectionError("the guest is not connected")
        await asyncio.wait_for(self._loop.sock_sendall(self._guest, data), 10)

    async def _try_send(self, data: bytes) -> bool:
        try:
            await self._send(data)
        except (OSError, TimeoutError):
            return False
        return True

    def _accept(self) -> None:
        if self._listener is None or self._container_id is None:
            return
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        size = struct.calcsize("3i")
        pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        if not is_init_of(pid, self._container_id):
            connection.close()
            self._turn_away()
            return
        self._drop_guest()
        self._guest, self._decoder, self._peer = connection, Decoder(), pid
        self._loop.add_reader(connection, self._read, connection)

    def _turn_away(self) -> None:
        if self._strangers == 0:
            self._loop.call_later(_STRANGER_PAUSE, self._forget_strangers)
        self._strangers += 1
        if self._strangers == _STRANGERS_ALLOWED and self._listener is not None:
            self._loop.remove_reader(self._listener)

    def _forget_strangers(self) -> None:
        paused = self._strangers >= _STRANGERS_ALLOWED
        self._strangers = 0
        if paused and self._listener is not None:
            self._loop.add_reader(self._listener, self._accept)

    def _read(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(_RECEIVE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        try:
            frames = self._decoder.feed(data) if data else []
            for frame in frames:
                self._handle(frame)
        except (ProtocolError, ValueError):
            data = b""
        if not data and self._guest is connection:
            self._drop_guest()
            if self._released and not self._started.done():
                self._started.set_exception(ConnectionError("the guest left before it started the command"))
            self._on_lost()

    def _handle(self, frame: Frame) -> None:
        match frame.kind:
            case kind if kind == HELLO:
                phase = frame.fields[0].decode() if frame.fields else ""
                if phase not in ("waiting", "running", "ended"):
                    raise ProtocolError("unknown phase")
                hello = Hello(self._peer, phase, frame.number(2), frame.number(3))  # type: ignore[arg-type]
                if not self._hello.done():
                    self._hello.set_result(hello)
                if self._on_hello is not None:
                    self._on_hello(hello)
                if phase == "ended":
                    self._on_exit(hello.code, hello.signal)
            case kind if kind == STARTED and not self._started.done():
                self._started.set_result(frame.number(0))
            case kind if kind == FAILED and not self._started.done():
                self._started.set_result(StartFailure(frame.number(0)))
            case kind if kind == EXITED:
                self._on_exit(frame.number(0), frame.number(1))

    def _drop_guest(self) -> None:
        if self._guest is not None:
            self._loop.remove_reader(self._guest)
            self._guest.close()
            self._guest = None
