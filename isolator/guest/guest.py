"""PID 1 of every box: waits to be released, runs the agent's command, reports how it ended.

Runs as `python3 -I -S guest.py COMMAND…` inside a container, from a file isolator mounts read-only. It imports
nothing from its siblings, and of the standard library only modules that are part of the interpreter or a small
extension: a spawn waits for this start, and `socket`, `signal`, `json` or `ctypes` would each cost milliseconds.

Its life: hide from the agent (not dumpable) -> connect to the daemon's socket -> HELLO -> wait for GO, no command
runs before -> place secrets, start the command in its own session -> reap everything, pass signals on -> report
EXITED -> leave, and with PID 1 the kernel ends everything that is left. When the daemon goes away it keeps running
and knocks again until a daemon answers. docs/guest-protocol.md states the frames.
"""

import _ctypes
import _signal  # type: ignore[import-not-found]
import _socket
import posix
import select
import sys
import time

SOCKET = "/run/isolator/agent.sock"
SECRETS = "/run/secrets/"
VERSION = 1

HELLO, STARTED, FAILED, EXITED = 1, 2, 3, 4
GO, SIGNAL, BYE = 65, 66, 67

WAITING, RUNNING, ENDED = b"waiting", b"running", b"ended"

MAX_FRAME = 64 * 1024 * 1024
RELEASE_SECONDS = 90.0
FAREWELL_SECONDS = 10.0
KNOCK_SECONDS = 0.1
KNOCK_SECONDS_MOST = 1.0

O_WRONLY, O_CREAT, O_EXCL, O_CLOEXEC = posix.O_WRONLY, posix.O_CREAT, posix.O_EXCL, posix.O_CLOEXEC
FORWARDED = (
    _signal.SIGTERM,
    _signal.SIGINT,
    _signal.SIGHUP,
    _signal.SIGQUIT,
    _signal.SIGUSR1,
    _signal.SIGUSR2,
)
FAILED_CODE = 125


def hide() -> None:
    """Make /proc/1/{mem,environ,fd} closed to the agent, which runs under the same uid."""
    library = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]
    prctl = _ctypes.dlsym(library, "prctl")
    if _ctypes.call_function(prctl, (4, 0, 0, 0, 0)) != 0:  # PR_SET_DUMPABLE = 4
        raise OSError("PR_SET_DUMPABLE refused")


def frame(kind: int, *fields: bytes) -> bytes:
    """One frame: u32 length, u8 kind, then each field as u32 length and bytes; big-endian."""
    body = bytes((kind,)) + b"".join(len(field).to_bytes(4, "big") + field for field in fields)
    return len(body).to_bytes(4, "big") + body


def parse(body: bytes) -> tuple[int, list[bytes]]:
    """(kind, fields) of a frame's body; ValueError if the lengths do not add up."""
    fields: list[bytes] = []
    position = 1
    while position < len(body):
        end = position + 4 + int.from_bytes(body[position : position + 4], "big")
        if end > len(body):
            raise ValueError("field beyond its frame")
        fields.append(body[position + 4 : end])
        position = end
    return body[0], fields


class Link:
    """The connection to the daemon, made again whenever it breaks."""

    def __init__(self, poll: select.poll) -> None:
        self.poll = poll
        self.socket: _socket.socket | None = None
        self.buffer = b""
        self.pause = KNOCK_SECONDS
        self.knock_at = 0.0

    def connect(self, hello: bytes) -> None:
        """Try once; on failure the next try comes after a growing pause."""
        link = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        try:
            # Before connect: where the agent has filled the queue of knockers, the guest must not wait in it.
            link.settimeout(10.0)
            link.connect(SOCKET)
            link.sendall(hello)
        except OSError:
            link.close()
            self.knock_at = time.monotonic() + self.pause
            self.pause = min(self.pause * 2, KNOCK_SECONDS_MOST)
            return
        self.socket, self.buffer, self.pause = link, b"", KNOCK_SECONDS
        self.poll.register(link.fileno(), select.POLLIN)

    def close(self) -> None:
        """Hang up; the next knock comes after a pause."""
        if self.socket is not None:
            self.poll.unregister(self.socket.fileno())
            self.socket.close()
            self.socket = None
            self.knock_at = time.monotonic() + self.pause

    def send(self, data: bytes) -> None:
        """Send if connected; what can't be sent now is told anew by the next HELLO."""
        if self.socket is not None:
            try:
                self.socket.sendall(data)
            except OSError:
                self.close()

    def receive(self) -> list[tuple[int, list[bytes]]]:
        """Whole frames that have arrived."""
        data = b""
        if self.socket is not None:
            try:
                data = self.socket.recv(262144)
            except OSError:
                data = b""
        if not data:
            self.close()
            return []
        self.buffer += data
        frames: list[tuple[int, list[bytes]]] = []
        while len(self.buffer) >= 4:
            end = 4 + int.from_bytes(self.buffer[:4], "big")
            if not 4 < end <= MAX_FRAME:
                self.close()
                return frames
            if len(self.buffer) < end:
                break
            try:
                frames.append(parse(self.buffer[4:end]))
            except ValueError:
                self.close()
                return frames
            self.buffer = self.buffer[end:]
        return frames


class Guest:
    """The box's one command and the daemon's view of it."""

    def __init__(self, command: list[str]) -> None:
        self.command = [word.encode("utf-8", "surrogateescape") for word in command]
        self.environment: dict[bytes, bytes] = dict(posix.environ)
        self.phase = WAITING
        self.child = 0
        self.code = self.signal = 0
        self.leave = False
        self.leave_at = time.monotonic() + RELEASE_SECONDS
        self.poll = select.poll()
        self.link = Link(self.poll)
        self.wake, write_end = posix.pipe()
        for end in (self.wake, write_end):
            posix.set_blocking(end, False)
        self.poll.register(self.wake, select.POLLIN)
        _signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in (*FORWARDED, _signal.SIGCHLD):
            _signal.signal(number, lambda *_: None)

    def hello(self) -> bytes:
        """HELLO: phase, version, exit code, signal, pid of the command."""
        fields = (str(VERSION), str(self.code), str(self.signal), str(self.child))
        return frame(HELLO, self.phase, *(field.encode() for field in fields))

    def run(self) -> int:
        """Until the command has ended and the daemon knows, or has stayed away too long."""
        while not self.leave:
            now = time.monotonic()
            if self.link.socket is None and now >= self.link.knock_at:
                self.link.connect(self.hello())
            if self.leave_at and now >= self.leave_at:
                break
            waits = [] if self.link.socket is not None else [self.link.knock_at]
            if self.leave_at:
                waits.append(self.leave_at)
            timeout = max(1, int((min(waits) - now) * 1000) + 1) if waits else None
            for descriptor, _ in self.poll.poll(timeout):
                if descriptor == self.wake:
                    self.on_signals()
                elif self.link.socket is not None:
                    for kind, fields in self.link.receive():
                        self.on_frame(kind, fields)
        if self.phase is WAITING:
            return FAILED_CODE
        return 128 + self.signal if self.signal else self.code

    def on_signals(self) -> None:
        """Reap every ended process, pass every other signal on."""
        for number in posix.read(self.wake, 512):
            if number != _signal.SIGCHLD:
                self.deliver(number)
        while True:
            try:
                pid, status = posix.waitpid(-1, posix.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.child:
                self.on_exit(status)

    def on_exit(self, status: int) -> None:
        """The command ended: end the rest, tell the daemon, wait a little for its word."""
        if posix.WIFSIGNALED(status):
            self.signal = posix.WTERMSIG(status)
        else:
            self.code = posix.WEXITSTATUS(status)
        self.child = 0
        self.phase = ENDED
        self.leave_at = time.monotonic() + FAREWELL_SECONDS
        # What the command left behind must not outlive it, nor write on while the daemon is told.
        try:
            posix.kill(-1, _signal.SIGKILL)
        except OSError:
            pass
        self.link.send(frame(EXITED, str(self.code).encode(), str(self.signal).encode()))

    def deliver(self, number: int) -> None:
        """Pass a signal on to the command's process group; without a command, leave."""
        if self.child:
            try:
                posix.killpg(self.child, number)
            except OSError:
                pass
        elif number in (_signal.SIGTERM, _signal.SIGINT, _signal.SIGKILL):
            if self.phase is RUNNING:
                self.phase, self.signal = ENDED, number
            self.leave = True

    def on_frame(self, kind: int, fields: list[bytes]) -> None:
        """Do what the daemon says, if it fits the phase."""
        if kind == GO and self.phase is WAITING:
            self.start(fields)
        elif kind == SIGNAL and fields and fields[0].isdigit() and len(fields[0]) < 4:
            self.deliver(int(fields[0]))
        elif kind == BYE and self.phase is not RUNNING:
            self.leave = True

    def start(self, fields: list[bytes]) -> None:
        """GO: each field is a letter and its value: `s` a secret file (name, NUL, bytes), `E` a secret variable."""
        for field in fields:
            tag, value = field[:1], field[1:]
            name, _, content = value.partition(b"\x00")
            if tag == b"s":
                place = posix.open(SECRETS.encode() + name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0o400)
                while content:
                    content = content[posix.write(place, content) :]
                posix.close(place)
            elif tag == b"E":
                self.environment[name] = content
        self.leave_at = 0.0
        self.phase = RUNNING
        if self.command:
            error = self.spawn()
            if error:
                self.phase = WAITING
                self.link.send(frame(FAILED, str(error).encode(), self.command[0]))
                self.leave_at = time.monotonic() + FAREWELL_SECONDS
                return
        self.link.send(frame(STARTED, str(self.child).encode()))

    def spawn(self) -> int:
        """Start the command in its own session; 0, or the errno of the exec that failed."""
        read_end, write_end = posix.pipe()
        self.child = posix.fork()
        if self.child == 0:
            try:
                posix.close(read_end)
                _signal.set_wakeup_fd(-1)
                for number in (*FORWARDED, _signal.SIGCHLD, _signal.SIGPIPE, _signal.SIGXFSZ):
                    _signal.signal(number, _signal.SIG_DFL)
                posix.setsid()
                error = self.execute()
            except OSError as failure:
                error = failure.errno or 5
            except BaseException:
                error = 5
            posix.write(write_end, str(error).encode())
            posix._exit(FAILED_CODE)
        posix.close(write_end)
        answer = posix.read(read_end, 16)
        posix.close(read_end)
        if answer:
            posix.waitpid(self.child, 0)
            self.child = 0
            return int(answer)
        return 0

    def execute(self) -> int:
        """As execvpe does; returns the errno that tells most."""
        program = self.command[0]
        if b"/" in program:
            places = [program]
        else:
            path = self.environment.get(b"PATH", b"/usr/bin:/bin")
            places = [folder + b"/" + program for folder in path.split(b":") if folder]
        told = 2
        for place in places:
            try:
                posix.execve(place, self.command, self.environment)
            except OSError as failure:
                if failure.errno not in (2, 20):
                    told = failure.errno or 5
        return told


if __name__ == "__main__":
    hide()
    sys.exit(Guest(sys.argv[1:]).run())
