"""The guest as PID 1 of a PID namespace of its own, without an engine, and the other end of its socket."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from isolator.agents.frames import EXEC, EXEC_GONE, HELLO, Decoder, Frame, encode

# The guest ends everything it can reach when its command has ended: outside a namespace that would be the machine.
_GUARD = 'import posix\nassert posix.getpid() == 1, "not in a namespace of its own"\n'


class GuestBox:
    """One guest and the socket it knocks at."""

    def __init__(
        self, folder: Path, *command: str, release: float = 30.0, farewell: float = 5.0, files: int = 1024
    ) -> None:
        self.folder = folder
        (folder / "secrets").mkdir()
        source = resources.files("isolator.guest").joinpath("guest.py").read_text()
        for old, new in (
            ('"/run/isolator/agent.sock"', repr(str(folder / "agent.sock"))),
            ('"/run/secrets/"', repr(f"{folder}/secrets/")),
            ("RELEASE_SECONDS = 90.0", f"RELEASE_SECONDS = {release}"),
            ("FAREWELL_SECONDS = 10.0", f"FAREWELL_SECONDS = {farewell}"),
        ):
            assert source.count(old) == 1, f"the guest no longer holds {old}"
            source = source.replace(old, new)
        limit = f"import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))\n"
        (folder / "guest.py").write_text(_GUARD + (limit if files != 1024 else "") + source)
        self.listener: socket.socket | None = None
        self._links: list[GuestLink] = []
        self.listen()
        self.process = subprocess.Popen(
            [
                "unshare",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                sys.executable,
                "-I",
                "-S",
                str(folder / "guest.py"),
                *command,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def listen(self, backlog: int = 8) -> None:
        """Serve the socket, a new one if it was given up."""
        (self.folder / "agent.sock").unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.settimeout(10)
        self.listener.bind(str(self.folder / "agent.sock"))
        self.listener.listen(backlog)

    def give_up(self) -> None:
        """As a daemon that was killed: nobody serves the socket."""
        assert self.listener is not None
        self.listener.close()

    def hang_up(self) -> None:
        """Close every link there was."""
        for link in self._links:
            link.connection.close()

    def accept(self) -> GuestLink:
        """The guest's next connection."""
        assert self.listener is not None
        connection, _ = self.listener.accept()
        connection.settimeout(10)
        self._links.append(GuestLink(connection))
        return self._links[-1]

    def released(self, *fields: bytes) -> GuestLink:
        """A link on which the command has been released."""
        link = self.accept()
        link.frame(HELLO)
        link.send(65, *fields)
        return link

    def ended(self, seconds: float = 10) -> int:
        """The guest's exit code, once it has left."""
        return self.process.wait(seconds)

    def output(self) -> bytes:
        """What the command wrote; call it once, after the end."""
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def host_pid(self) -> int:
        """The guest's pid outside its namespace."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])


class Streams:
    """Our ends of an exec's pipes."""

    def __init__(self, stdin: int, stdout: int, stderr: int) -> None:
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr

    def end_input(self) -> None:
        os.close(self.stdin)
        self.stdin = -1

    def read(self) -> tuple[bytes, bytes]:
        """Output and errors, until nobody can write there any more."""
        found = []
        for end in (self.stdout, self.stderr):
            with open(end, "rb", closefd=False) as file:
                found.append(file.read())
        return found[0], found[1]

    def line(self) -> bytes:
        """The next line of output."""
        line = b""
        while not line.endswith(b"\n"):
            data = os.read(self.stdout, 1)
            assert data, line
            line += data
        return line[:-1]

    def close(self) -> None:
        for end in (self.stdin, self.stdout, self.stderr):
            if end >= 0:
                os.close(end)


class GuestLink:
    """The daemon's end of one connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._decoder = Decoder()
        self._frames: list[Frame] = []

    def frame(self, kind: int) -> Frame:
        """The next frame, which must be of this kind."""
        frame = self.any_frame()
        assert frame.kind == kind, frame
        return frame

    def any_frame(self) -> Frame:
        """The next frame."""
        while not self._frames:
            data = self.connection.recv(65536)
            assert data, "the guest hung up"
            self._frames += self._decoder.feed(data)
        return self._frames.pop(0)

    def send(self, kind: int, *fields: bytes) -> None:
        self.connection.sendall(encode(kind, fields))

    def execute(self, number: bytes, *command: str, cwd: str = "/", env: dict[str, str] | None = None) -> Streams:
        """Send an EXEC with three pipes beside it; our ends of them."""
        ends = [os.pipe() for _ in range(3)]
        theirs = [ends[0][0], ends[1][1], ends[2][1]]
        variables = [b"e" + f"{name}\x00{value}".encode() for name, value in (env or {}).items()]
        words = [b"a" + os.fsencode(word) for word in command]
        data = encode(EXEC, (number, b"", cwd.encode(), *variables, *words))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", theirs))]
        sent = self.connection.sendmsg([data], rights)
        self.connection.sendall(data[sent:])
        for end in theirs:
            os.close(end)
        return Streams(ends[0][1], ends[1][0], ends[2][0])

    def until_gone(self, number: bytes) -> list[Frame]:
        """Frames up to this exec's EXEC_GONE, those of others left out."""
        found: list[Frame] = []
        while not found or found[-1].kind != EXEC_GONE:
            frame = self.any_frame()
            if frame.fields[:1] == (number,):
                found.append(frame)
        return found

    def hung_up(self) -> bool:
        """Whether the guest ends the connection, saying nothing more."""
        with contextlib.suppress(ConnectionError):
            return self.connection.recv(65536) == b""
        return True


@contextlib.contextmanager
def guest(
    folder: Path, *command: str, release: float = 30.0, farewell: float = 5.0, files: int = 1024
) -> Iterator[GuestBox]:
    """A guest with this command, ended afterwards with all it started; `files`: how many it may have open."""
    box = GuestBox(folder, *command, release=release, farewell=farewell, files=files)
    try:
        yield box
    finally:
        box.process.kill()
        box.process.communicate(timeout=10)
        box.give_up()
        box.hang_up()
