"""The daemon's end of an agent's socket: the guest behind it, what it is told, and what it reports.

The connection counts as the guest's only if the kernel says its peer is PID 1 of that agent's container (door.py).
What it reports is believed for its own box alone: how its command and its execs ended.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, Protocol

from isolator.agents.door import Door
from isolator.agents.frames import (
    BYE,
    EXEC,
    EXEC_EXITED,
    EXEC_FAILED,
    EXEC_GONE,
    EXEC_KILL,
    EXEC_SIGNAL,
    EXEC_STARTED,
    EXITED,
    FAILED,
    GO,
    HELLO,
    MAX_CODE,
    MAX_ERRNO,
    MAX_SIGNAL,
    SIGNAL,
    STARTED,
    STAY,
    Frame,
    ProtocolError,
    encode,
)
from isolator.agents.link import Link

_SEND_TIMEOUT = 10.0

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
    """The command could not be executed; with `folder`, because its working folder can't be entered."""

    errno: int
    folder: bool = False


@dataclass(frozen=True, slots=True)
class Release:
    """What a box is given with its release.

    secrets: (letter, name, value): `s` a file, `E` a variable. A box that was made before its agent was known gets
    its command, whole environment and working folder now; None: they stand in the container's configuration.
    """

    secrets: Sequence[tuple[str, str, bytes]] = ()
    command: Sequence[str] = ()
    environment: Sequence[tuple[str, str]] = ()
    working_dir: str | None = None

    def fields(self) -> list[bytes]:
        """GO's fields."""
        given = [b"v" + f"{name}\x00{value}".encode() for name, value in self.environment]
        given += [letter.encode() + name.encode() + b"\x00" + value for letter, name, value in self.secrets]
        given += [b"c" + word.encode() for word in self.command]
        return given if self.working_dir is None else [b"w" + self.working_dir.encode(), *given]


@dataclass(frozen=True, slots=True)
class ExecOrder:
    """One exec as the guest is told: `terminal` is the path of a terminal in the box, or empty for three pipes."""

    command: Sequence[str]
    environment: Sequence[tuple[str, str]]
    working_dir: str
    terminal: str = ""

    def fields(self) -> list[bytes]:
        """EXEC's fields behind its number."""
        return [
            self.terminal.encode(),
            self.working_dir.encode(),
            *(b"e" + f"{name}\x00{value}".encode() for name, value in self.environment),
            *(b"a" + word.encode() for word in self.command),
        ]


class ExecWatcher(Protocol):
    """Whoever is told of an exec. None of these may wait or raise."""

    def on_started(self, pid: int) -> None:
        """It runs, under this pid in the box."""

    def on_failed(self, errno: int, where: str) -> None:
        """It could not be started: `where` is `cwd`, `fork`, `guest`, or anything else for the program itself."""

    def on_exited(self, code: int, signal: int) -> None:
        """Its first process ended; `signal` is 0 if none ended it."""

    def on_gone(self) -> None:
        """Nothing is left of it, or nobody is there any more who could tell."""


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
        on_visitor: Callable[[socket.socket], None] | None = None,
    ) -> None:
        """As `tell`."""
        self.tell(on_exit=on_exit, on_lost=on_lost, on_hello=on_hello, on_visitor=on_visitor)
        self._door = Door(folder, on_guest=self._greet, on_visitor=self._visited)
        self._link: Link | None = None
        self._peer = 0
        self._released = False
        self._execs: dict[bytes, ExecWatcher] = {}
        loop = asyncio.get_running_loop()
        self._hello: asyncio.Future[Hello] = loop.create_future()
        self._started: asyncio.Future[int | StartFailure] = loop.create_future()

    def tell(
        self,
        *,
        on_exit: Callable[[int, int], None],
        on_lost: Callable[[], None],
        on_hello: Callable[[Hello], None] | None = None,
        on_visitor: Callable[[socket.socket], None] | None = None,
    ) -> None:
        """Whom to tell from now on.

        `on_exit(code, signal)` when the guest reports the end; `on_lost()` when its connection ends;
        `on_visitor(connection)` owns the connection of another process of the box; None: there are no visitors.
        """
        self._on_exit = on_exit
        self._on_lost = on_lost
        self._on_hello = on_hello
        self._on_visitor = on_visitor

    def listen(self, container_id: str | None = None) -> None:
        """Serve the socket. `container_id` may come later; until then nobody is accepted.

        Raises:
            OSError: the folder is gone or the socket can't be made.
        """
        self._door.listen()
        if container_id is not None:
            self.expect(container_id)

    def expect(self, container_id: str) -> None:
        """Accept the guest of this container from now on."""
        self._door.expect(container_id)

    @property
    def may_have_started(self) -> bool:
        """Whether the command may run or have run: it was released, and nobody said that it could not be started."""
        if self._started.done() and not self._started.cancelled() and self._started.exception() is None:
            return not isinstance(self._started.result(), StartFailure)
        return self._released

    @property
    def connected(self) -> bool:
        """Whether the guest is there now."""
        return self._link is not None

    async def hello(self) -> Hello:
        """The guest's first words; wait with a timeout."""
        return await asyncio.shield(self._hello)

    async def release(self, release: Release) -> int | StartFailure:
        """Hand over what the box is given and let the command run; its pid in the box, or why it did not start.

        Raises:
            ConnectionError: the guest is not there, or left before it answered.
        """
        link = self._send(encode(GO, release.fields()))
        await link.drained(_SEND_TIMEOUT)
        self._released = True
        return await asyncio.shield(self._started)

    async def signal(self, number: int) -> bool:
        """Pass a signal to the command's process group; False when the guest is not there."""
        return await self._try_send(encode(SIGNAL, (str(number).encode(),)))

    async def stay(self) -> bool:
        """Have the guest wait for its release as long as this daemon is there; False when it is not there."""
        return await self._try_send(encode(STAY))

    async def bye(self) -> None:
        """The end was noted; the guest may leave."""
        await self._try_send(encode(BYE))

    # execs

    def execute(self, order: ExecOrder, descriptors: Sequence[int], watcher: ExecWatcher) -> bytes:
        """Have the guest start an exec; its number. The descriptors, the box's ends, are closed here in any case.

        Raises:
            ConnectionError: the guest is not there.
        """
        # Not counted from one: a guest that outlived an earlier daemon may still be ending execs of that one.
        number = secrets.token_hex(6).encode()
        self._send(encode(EXEC, (number, *order.fields())), descriptors)
        self._execs[number] = watcher
        return number

    def signal_exec(self, number: bytes, signal_number: int) -> None:
        """Pass a signal to the process group of an exec's first process; one that has ended is fine."""
        self._tell(encode(EXEC_SIGNAL, (number, str(signal_number).encode())))

    def kill_exec(self, number: bytes) -> None:
        """Have every process of an exec ended; its watcher is told when nothing is left."""
        self._tell(encode(EXEC_KILL, (number,)))

    def forget_exec(self, number: bytes) -> None:
        """Tell its watcher nothing more."""
        self._execs.pop(number, None)

    def close(self) -> None:
        """Stop serving. Boxes go on and knock again."""
        self._door.close()
        self._drop_guest()
        for future in (self._hello, self._started):
            future.cancel()

    def _send(self, data: bytes, descriptors: Sequence[int] = ()) -> Link:
        if self._link is None:
            Link.close_all(descriptors)
            raise ConnectionError("the guest is not connected")
        link = self._link
        link.send(data, descriptors)
        return link

    def _tell(self, data: bytes) -> None:
        if self._link is not None:
            try:
                self._link.send(data)
            except ConnectionError:
                return

    async def _try_send(self, data: bytes) -> bool:
        try:
            await self._send(data).drained(_SEND_TIMEOUT)
        except (OSError, TimeoutError):
            return False
        return True

    def _visited(self, connection: socket.socket) -> None:
        if self._on_visitor is None:
            connection.close()
        else:
            self._on_visitor(connection)

    # what the guest says

    def _greet(self, connection: socket.socket, pid: int) -> None:
        self._drop_guest()
        self._peer = pid
        self._link = Link(connection, on_frame=self._handle, on_end=self._ended)

    def _ended(self, link: Link) -> None:
        if self._link is not link:
            return
        self._drop_guest()
        if self._released and not self._started.done():
            self._started.set_exception(ConnectionError("the guest left before it started the command"))
        self._on_lost()

    def _drop_guest(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
        # A guest without its daemon ends its execs.
        watchers, self._execs = self._execs, {}
        for watcher in watchers.values():
            watcher.on_gone()

    def _handle(self, frame: Frame) -> None:
        match frame.kind:
            case kind if kind == HELLO:
                self._greeted(frame)
            case kind if kind == STARTED and not self._started.done():
                self._started.set_result(frame.number(0))
            case kind if kind == FAILED and not self._started.done():
                self._started.set_result(StartFailure(frame.number(0, MAX_ERRNO), folder=len(frame.fields) > 2))
            case kind if kind == EXITED:
                self._on_exit(frame.number(0, MAX_CODE), frame.number(1, MAX_SIGNAL))
            case kind if kind in (EXEC_STARTED, EXEC_FAILED, EXEC_EXITED, EXEC_GONE):
                self._handle_exec(frame)

    def _greeted(self, frame: Frame) -> None:
        phase = frame.field(0).decode(errors="replace")
        if phase not in ("waiting", "running", "ended"):
            raise ProtocolError("unknown phase")
        hello = Hello(self._peer, phase, frame.number(2, MAX_CODE), frame.number(3, MAX_SIGNAL))  # type: ignore[arg-type]
        if not self._hello.done():
            self._hello.set_result(hello)
        if self._on_hello is not None:
            self._on_hello(hello)
        if phase == "ended":
            self._on_exit(hello.code, hello.signal)

    def _handle_exec(self, frame: Frame) -> None:
        watcher = self._execs.get(frame.field(0))
        if watcher is None:
            return
        match frame.kind:
            case kind if kind == EXEC_STARTED:
                watcher.on_started(frame.number(1))
            case kind if kind == EXEC_FAILED:
                watcher.on_failed(frame.number(1, MAX_ERRNO), frame.field(2).decode(errors="replace"))
            case kind if kind == EXEC_EXITED:
                watcher.on_exited(frame.number(1, MAX_CODE), frame.number(2, MAX_SIGNAL))
            case _:
                self._execs.pop(frame.field(0), None)
                watcher.on_gone()
