"""PID 1 of every box: waits to be released, runs the agent's command and every exec, reports how each ended.

Runs as `python3 -I -S guest.py COMMAND…` inside a container, from a file isolator mounts read-only. It imports
nothing from its siblings, and of the standard library only modules that are part of the interpreter or a small
extension: a spawn waits for this start, and `socket`, `signal`, `json` or `ctypes` would each cost milliseconds.

Its life: hide from the agent (not dumpable) -> connect to the daemon's socket -> HELLO -> wait for GO, no command
runs before -> place secrets, start the command in its own session -> reap everything, pass signals on, run execs ->
report EXITED -> leave, and with PID 1 the kernel ends everything that is left. When the daemon goes away it ends the
execs, keeps the command running and knocks again until a daemon answers. docs/guest-protocol.md states the frames.

Each exec has a runner of its own: a fork of this process that is the reaper of all that the exec starts, however
often it forks and whatever session it makes. So an exec's processes are the runner's descendants, and can be found
and ended. What an exec reads and writes goes through pipes of the daemon's, never through here.
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
VERSION = 2

HELLO, STARTED, FAILED, EXITED = 1, 2, 3, 4
EXEC_STARTED, EXEC_FAILED, EXEC_EXITED, EXEC_GONE = 5, 6, 7, 8
GO, SIGNAL, BYE = 65, 66, 67
EXEC, EXEC_SIGNAL, EXEC_KILL = 68, 69, 70
STAY = 71

WAITING, RUNNING, ENDED = b"waiting", b"running", b"ended"

MAX_FRAME = 64 * 1024 * 1024
MAX_DESCRIPTORS = 16
MAX_RUNS = 256
RELEASE_SECONDS = 90.0
FAREWELL_SECONDS = 10.0
KNOCK_SECONDS = 0.1
KNOCK_SECONDS_MOST = 1.0
SWEEP_SECONDS = 0.002
SWEEP_SECONDS_MOST = 0.05
# A process that forks and ends, again and again, is caught by looking at its reaper's children so often in a row.
CHASES = 200
# A runner ends by itself when it has no child left. One that is stopped does not; after so many looks that find
# nothing alive below it, it is ended.
QUIET_SWEEPS = 40
# A hunt for orphans ends when so many looks in a row found none.
QUIET_HUNTS = 5

O_WRONLY, O_CREAT, O_EXCL, O_CLOEXEC = posix.O_WRONLY, posix.O_CREAT, posix.O_EXCL, posix.O_CLOEXEC
FORWARDED = (
    _signal.SIGTERM,
    _signal.SIGINT,
    _signal.SIGHUP,
    _signal.SIGQUIT,
    _signal.SIGUSR1,
    _signal.SIGUSR2,
)
TO_DEFAULT = (*FORWARDED, _signal.SIGCHLD, _signal.SIGPIPE, _signal.SIGXFSZ)
FAILED_CODE = 125
PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 4, 15, 36


def prctl(option: int, argument: int | bytes) -> None:
    """The kernel's prctl; OSError if it refuses."""
    call = _ctypes.dlsym(_ctypes.dlopen(None, 0), "prctl")  # type: ignore[arg-type]
    if _ctypes.call_function(call, (option, argument, 0, 0, 0)) != 0:
        raise OSError("prctl refused")


def hide() -> None:
    """Make /proc/1/{mem,environ,fd} closed to the agent, which runs under the same uid; forks inherit it."""
    # Nobody who ends every `python3` in the box means this one.
    prctl(PR_SET_NAME, b"isolator-guest")
    prctl(PR_SET_DUMPABLE, 0)


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


class Wire:
    """Frames over a connected socket that is polled, descriptors beside them."""

    def __init__(self, poll: select.poll, connection: _socket.socket | None = None) -> None:
        self.poll = poll
        self.socket: _socket.socket | None = None
        self.buffer = b""
        self.descriptors: list[int] = []
        if connection is not None:
            self.join(connection)

    def join(self, connection: _socket.socket) -> None:
        """Talk over this one from now on."""
        self.socket, self.buffer = connection, b""
        self.poll.register(connection.fileno(), select.POLLIN)

    def send(self, data: bytes, descriptors: list[int] | None = None) -> None:
        """Send if connected; what can't be sent is lost, and the connection with it."""
        if self.socket is None:
            return
        try:
            if descriptors:
                rights = b"".join(number.to_bytes(4, sys.byteorder) for number in descriptors)
                sent = self.socket.sendmsg([data], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
                data = data[sent:]
            if data:
                self.socket.sendall(data)
        except OSError:
            self.close()

    def receive(self) -> list[tuple[int, list[bytes]]]:
        """Whole frames that have arrived; when the other side has hung up or talks nonsense, `socket` is None."""
        data = self.read()
        self.buffer += data
        if not data or len(self.descriptors) > MAX_DESCRIPTORS:
            self.close()
            return []
        frames: list[tuple[int, list[bytes]]] = []
        while len(self.buffer) >= 4:
            end = 4 + int.from_bytes(self.buffer[:4], "big")
            if not 4 < end <= MAX_FRAME:
                self.close()
                break
            if len(self.buffer) < end:
                break
            try:
                frames.append(parse(self.buffer[4:end]))
            except ValueError:
                self.close()
                break
            self.buffer = self.buffer[end:]
        return frames

    def read(self) -> bytes:
        """What is there, descriptors put aside; nothing at the end."""
        if self.socket is None:
            return b""
        try:
            data, ancillary, _, _ = self.socket.recvmsg(262144, 256, _socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return b""
        for level, kind, rights in ancillary:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                for start in range(0, len(rights) - 3, 4):
                    self.descriptors.append(int.from_bytes(rights[start : start + 4], sys.byteorder))
        return data

    def take(self, number: int) -> list[int]:
        """The next descriptors that came beside the frames."""
        taken, self.descriptors = self.descriptors[:number], self.descriptors[number:]
        return taken

    def close(self) -> None:
        """Hang up."""
        if self.socket is not None:
            self.poll.unregister(self.socket.fileno())
            self.socket.close()
            self.socket = None
        close_all(self.take(len(self.descriptors)))


class Link(Wire):
    """The connection to the daemon, made again whenever it breaks."""

    def __init__(self, poll: select.poll) -> None:
        super().__init__(poll)
        self.pause = KNOCK_SECONDS
        self.knock_at = 0.0
        self.lost = False

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
        self.pause = KNOCK_SECONDS
        self.join(link)

    def close(self) -> None:
        """Hang up; the next knock comes after a pause."""
        if self.socket is not None:
            self.knock_at = time.monotonic() + self.pause
            self.lost = True
        super().close()


def close_all(descriptors: list[int]) -> None:
    """Close them."""
    for descriptor in descriptors:
        posix.close(descriptor)


def wake_on_signals(numbers: tuple[int, ...]) -> tuple[int, int]:
    """Ends of a pipe into which the kernel's news of these signals are written."""
    read_end, write_end = posix.pipe()
    for end in (read_end, write_end):
        posix.set_blocking(end, False)
    _signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in numbers:
        _signal.signal(number, lambda *_: None)
    return read_end, write_end


def spawn(command: list[bytes], environment: dict[bytes, bytes], files: list[tuple[int, ...]]) -> int:
    """Start a program in a session of its own, as execvpe would find it; its pid.

    Raises OSError with the errno that tells most.
    """
    program = command[0]
    if b"/" in program:
        places = [program]
    else:
        path = environment.get(b"PATH", b"/usr/bin:/bin")
        places = [folder + b"/" + program for folder in path.split(b":") if folder]
    told = 2
    for place in places:
        try:
            posix.stat(place)  # a fork for each folder that does not hold it would take longer than all else
            return posix.posix_spawn(
                place,
                command,
                environment,
                file_actions=files,
                setsid=True,
                setsigdef=TO_DEFAULT,
                setsigmask=(),
            )
        except OSError as failure:
            if failure.errno not in (2, 20):
                told = failure.errno or 5
        except ValueError:
            told = 22
    raise OSError(told, "can't be executed")


def outcome(status: int) -> tuple[bytes, bytes]:
    """Exit code and signal of a wait status, as fields."""
    if posix.WIFSIGNALED(status):
        return b"0", str(posix.WTERMSIG(status)).encode()
    return str(posix.WEXITSTATUS(status)).encode(), b"0"


class Runner:
    """The process behind an exec: starts it, reaps all that comes of it, and is free again when nothing is left."""

    def __init__(self, connection: _socket.socket, environment: dict[bytes, bytes]) -> None:
        self.poll = select.poll()
        self.wire = Wire(self.poll, connection)
        self.environment = environment
        self.number = b""
        self.root = 0

    def serve(self) -> None:
        """One order after the other, each to the last process's end."""
        for number in FORWARDED:
            _signal.signal(number, _signal.SIG_IGN)
        wake, _ = wake_on_signals((_signal.SIGCHLD,))
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        self.poll.register(wake, select.POLLIN)
        while True:
            for descriptor, _ in self.poll.poll():
                if descriptor == wake:
                    posix.read(wake, 512)
                    self.reap()
                else:
                    for kind, fields in self.wire.receive():
                        self.on_frame(kind, fields)
                    if self.wire.socket is None:
                        return  # PID 1 does not end before us: it talks no more to us

    def on_frame(self, kind: int, fields: list[bytes]) -> None:
        """The order comes first, signals for what it started after it."""
        if kind == EXEC:
            try:
                self.start(fields)
            except OSError as failure:
                where = str(failure.strerror).encode()
                failed = frame(EXEC_FAILED, fields[0], str(failure.errno or 5).encode(), where)
                self.wire.send(failed + self.rest())
        elif kind == EXEC_SIGNAL and self.root:
            try:
                posix.killpg(self.root, int(fields[1]))
            except OSError:
                pass

    def start(self, fields: list[bytes]) -> None:
        """EXEC: number, terminal's name or nothing, working folder, then `a`rguments and `e`nvironment."""
        self.number, terminal, folder = fields[:3]
        command = [field[1:] for field in fields[3:] if field[:1] == b"a"]
        environment = dict(self.environment)
        for field in fields[3:]:
            if field[:1] == b"e":
                name, _, value = field[1:].partition(b"\x00")
                environment[name] = value
        given = self.wire.take(3)
        try:
            self.root = self.begin(command, environment, terminal, folder, given)
        finally:
            close_all(given)
        self.wire.send(frame(EXEC_STARTED, self.number, str(self.root).encode()))

    @staticmethod
    def begin(
        command: list[bytes], environment: dict[bytes, bytes], terminal: bytes, folder: bytes, given: list[int]
    ) -> int:
        """Start it; its pid. Raises OSError."""
        try:
            posix.chdir(folder)
        except OSError as failure:
            raise OSError(failure.errno, "cwd") from None
        files: list[tuple[int, ...]]
        if terminal:
            # The leader of a session gets the first terminal it opens as its own.
            files = [(posix.POSIX_SPAWN_OPEN, 0, terminal, posix.O_RDWR, 0)]  # type: ignore[list-item]
            files += [(posix.POSIX_SPAWN_DUP2, 0, number) for number in (1, 2)]
        else:
            files = [(posix.POSIX_SPAWN_DUP2, descriptor, number) for number, descriptor in enumerate(given)]
        return spawn(command, environment, files)

    def reap(self) -> None:
        """Take note of every ended process; tell of the first one's end, and when none is left."""
        told = b""
        pid = -1
        while pid != 0:
            try:
                pid, status = posix.waitpid(-1, posix.WNOHANG)
            except ChildProcessError:
                if self.number:
                    told += self.rest()
                break
            if pid and pid == self.root:
                self.root = 0
                told += frame(EXEC_EXITED, self.number, *outcome(status))
        if told:
            self.wire.send(told)

    def rest(self) -> bytes:
        """Nothing is left of the exec: stand by for the next. What is said of it."""
        gone = frame(EXEC_GONE, self.number)
        self.number, self.root = b"", 0
        posix.chdir("/")  # its working folder is not held longer than it
        return gone


class Run:
    """What PID 1 knows of a runner: its exec's number once it has one, and how far its end has come."""

    def __init__(self, pid: int, wire: Wire) -> None:
        self.pid = pid
        self.wire = wire
        self.number = b""
        self.ended = self.killing = False
        self.quiet = self.since = 0

    def begin(self, number: bytes) -> None:
        """It is an exec's from now on."""
        self.number = number
        self.ended = self.killing = False
        self.quiet = 0
        # Ticks since the machine started, as /proc/<pid>/stat counts them.
        self.since = int(time.clock_gettime(time.CLOCK_BOOTTIME) * posix.sysconf("SC_CLK_TCK"))


def look(pid: int) -> tuple[int, int, bytes] | None:
    """(parent, start in ticks, session) of a process; None for one that is gone or only waits to be reaped."""
    try:
        file = posix.open(f"/proc/{pid}/stat", posix.O_RDONLY | O_CLOEXEC)
    except OSError:
        return None
    try:
        words = posix.read(file, 1024).rpartition(b")")[2].split()
    except OSError:
        return None
    finally:
        posix.close(file)
    if not words or words[0] in (b"Z", b"X"):
        return None
    return int(words[1]), int(words[19]), words[3]


def processes() -> dict[int, tuple[int, int, bytes]]:
    """Every process of the box but those that only wait to be reaped."""
    found = {int(name): look(int(name)) for name in posix.listdir("/proc") if name.isdigit()}
    return {pid: facts for pid, facts in found.items() if facts is not None}


def children(pid: int) -> list[int]:
    """A process's children, those that wait to be reaped too."""
    try:
        file = posix.open(f"/proc/{pid}/task/{pid}/children", posix.O_RDONLY | O_CLOEXEC)
    except OSError:
        return []
    try:
        return [int(word) for word in posix.read(file, 65536).split()]
    except OSError:
        return []
    finally:
        posix.close(file)


def below(roots: set[int], everyone: dict[int, tuple[int, int, bytes]]) -> set[int]:
    """Descendants of these processes."""
    children: dict[int, list[int]] = {}
    for pid, (parent, _, _) in everyone.items():
        children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        for pid in children.get(waiting.pop(), ()):
            if pid not in found:
                found.add(pid)
                waiting.append(pid)
    return found


def kill(pid: int, number: int = _signal.SIGKILL) -> None:
    """Send a signal; a process that is gone is fine."""
    try:
        posix.kill(pid, number)
    except OSError:
        pass


class Guest:
    """The box's one command, its execs, and the daemon's view of them."""

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
        self.wake, self.wake_end = wake_on_signals((*FORWARDED, _signal.SIGCHLD))
        self.poll.register(self.wake, select.POLLIN)
        self.runs: dict[bytes, Run] = {}
        self.runners: dict[int, Run] = {}  # by pid, the spare one too
        self.spare: Run | None = None
        self.hunted = 0  # ticks: whatever orphan started since belonged to a runner that somebody ended
        self.hunt_quiet = 0
        self.hunted_of: list[bytes] = []  # the execs whose processes they are
        self.pause = SWEEP_SECONDS

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
            ready = [descriptor for descriptor, _ in self.poll.poll(self.patience(now))]
            # Signals last: a runner's end frees its descriptor, whose number a new one may get.
            for descriptor in sorted(ready, key=lambda ready: ready == self.wake):
                self.on_ready(descriptor)
            if self.link.lost:
                # Whoever asked for the execs is gone, and so are they.
                self.link.lost = False
                if self.phase is WAITING and not self.leave_at:
                    self.leave_at = time.monotonic() + RELEASE_SECONDS
                for run in self.runs.values():
                    run.killing = run.killing or not run.ended
            if self.hunted or self.runs:
                self.sweep()
        if self.phase is WAITING:
            return FAILED_CODE
        return 128 + self.signal if self.signal else self.code

    def patience(self, now: float) -> int | None:
        """Milliseconds until something is due; None if nothing is."""
        waits = [] if self.link.socket is not None else [self.link.knock_at]
        if self.leave_at:
            waits.append(self.leave_at)
        if self.hunted or any(run.killing for run in self.runs.values()):
            waits.append(now + self.pause)
        return max(1, int((min(waits) - now) * 1000) + 1) if waits else None

    def on_ready(self, descriptor: int) -> None:
        """Something can be read."""
        if descriptor == self.wake:
            self.on_signals()
        elif self.link.socket is not None and descriptor == self.link.socket.fileno():
            for kind, fields in self.link.receive():
                self.on_frame(kind, fields)
        else:
            for run in list(self.runners.values()):
                if run.wire.socket is not None and run.wire.socket.fileno() == descriptor:
                    self.hear(run)
                    break

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
            elif pid in self.runners:
                self.on_runner_end(self.runners.pop(pid), status)

    def on_exit(self, status: int) -> None:
        """The command ended: end the rest, tell the daemon, wait a little for its word."""
        code, number = outcome(status)
        self.code, self.signal = int(code), int(number)
        self.child = 0
        self.phase = ENDED
        self.leave_at = time.monotonic() + FAREWELL_SECONDS
        # What the command left behind must not outlive it, nor write on while the daemon is told.
        kill(-1)
        self.link.send(frame(EXITED, code, number))

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
        elif kind == STAY and self.phase is WAITING:
            self.leave_at = 0.0  # it waits for an agent of its own, as long as this daemon is there
        elif kind == SIGNAL and fields and fields[0].isdigit() and len(fields[0]) < 4:
            self.deliver(int(fields[0]))
        elif kind == BYE and self.phase is not RUNNING:
            self.leave = True
        elif kind == EXEC and len(fields) > 3:
            self.execute(fields)
        elif kind == EXEC_SIGNAL and len(fields) == 2 and fields[1].isdigit() and len(fields[1]) < 4:
            run = self.runs.get(fields[0])
            if run is not None:
                run.wire.send(frame(EXEC_SIGNAL, *fields))
        elif kind == EXEC_KILL and fields:
            run = self.runs.get(fields[0])
            if run is None:
                self.link.send(frame(EXEC_GONE, fields[0]))
            else:
                run.killing = True

    def start(self, fields: list[bytes]) -> None:
        """GO: each field is a letter and its value.

        `s` a secret file (name, NUL, bytes), `E` a secret variable; for a box that was made before its agent was
        known: `c` a word of the command, `v` a variable, `w` the working folder.
        """
        for field in fields:
            tag, value = field[:1], field[1:]
            name, _, content = value.partition(b"\x00")
            if tag == b"s":
                place = posix.open(SECRETS.encode() + name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0o400)
                while content:
                    content = content[posix.write(place, content) :]
                posix.close(place)
            elif tag in (b"E", b"v"):
                self.environment[name] = content
            elif tag == b"c":
                self.command.append(value)
            elif tag == b"w":
                try:
                    posix.chdir(value)
                except OSError as failure:
                    self.refuse(failure, value, b"folder")
                    return
        self.leave_at = 0.0
        self.phase = RUNNING
        if self.command:
            try:
                self.child = spawn(self.command, self.environment, [])
            except OSError as failure:
                self.refuse(failure, self.command[0])
                return
        self.link.send(frame(STARTED, str(self.child).encode()))

    def refuse(self, failure: OSError, *what: bytes) -> None:
        """FAILED, and leave."""
        self.phase = WAITING
        self.link.send(frame(FAILED, str(failure.errno).encode(), *what))
        self.leave_at = time.monotonic() + FAREWELL_SECONDS

    # execs

    def execute(self, fields: list[bytes]) -> None:
        """EXEC: hand it to a runner, with the descriptors that came beside it."""
        number, terminal = fields[:2]
        wanted = 0 if terminal else 3
        errno, where = 16, b"guest"
        run: Run | None = None
        if self.phase is not RUNNING:
            where = b"phase"
        elif number not in self.runs and len(self.runs) < MAX_RUNS:
            try:
                run = self.spare = self.spare or self.new_runner()
            except OSError as failure:
                errno, where = failure.errno or 11, b"fork"
        given = self.link.take(wanted)
        if len(given) < wanted:
            run, errno = None, 24  # the kernel drops what a process may not hold
        if run is None:
            close_all(given)
            self.link.send(frame(EXEC_FAILED, number, str(errno).encode(), where))
            return
        self.spare = None
        run.begin(number)
        self.runs[number] = run
        run.wire.send(frame(EXEC, *fields), given)
        close_all(given)
        if run.wire.socket is None:
            kill(run.pid)  # somebody ended or stopped it: its end is told when it is reaped

    def new_runner(self) -> Run:
        """Fork one. Raises OSError: the box has all the processes it may have."""
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        try:
            pid = posix.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if pid == 0:
            try:
                ours.close()
                for other in (self.link, *(run.wire for run in self.runners.values())):
                    if other.socket is not None:
                        other.socket.close()
                close_all([self.wake, self.wake_end, *self.link.descriptors])
                Runner(theirs, self.environment).serve()
                posix._exit(0)
            finally:
                posix._exit(1)
        theirs.close()
        # A runner that somebody stopped must not stop us.
        ours.settimeout(1.0)
        run = self.runners[pid] = Run(pid, Wire(self.poll, ours))
        return run

    def hear(self, run: Run) -> None:
        """Pass a runner's news on. The next exec need not wait for a fork: it finds a runner that stands by."""
        news = b""
        for kind, fields in run.wire.receive():
            news += frame(kind, *fields)
            if kind in (EXEC_FAILED, EXEC_EXITED):
                run.ended = True
            elif kind == EXEC_GONE:
                self.runs.pop(run.number, None)
                run.number = b""
                if self.spare is None:
                    self.spare = run
                else:
                    run.wire.close()  # which ends it
        if news:
            self.link.send(news)

    def on_runner_end(self, run: Run, status: int) -> None:
        """Nothing is left of an exec; or somebody ended its runner, and what it would have waited for is hunted."""
        if run.wire.socket is not None:
            self.hear(run)
            run.wire.close()
        if run is self.spare:
            self.spare = None
        if not run.number:
            return
        self.runs.pop(run.number, None)
        if status != 0 and (run.killing or not run.ended):
            self.hunted = min(self.hunted or run.since, run.since)
            self.hunt_quiet = 0
            self.hunted_of.append(run.number)
        else:
            self.link.send(frame(EXEC_GONE, run.number))
        if not run.ended and self.phase is RUNNING:
            self.link.send(frame(EXEC_EXITED, run.number, b"0", b"9"))

    def sweep(self) -> None:
        """End what must end: the descendants of killed execs, and orphans of runners that were ended."""
        dying = [run for run in self.runs.values() if run.killing]
        if not (dying or self.hunted) or posix.readlink("/proc/self") != str(posix.getpid()):
            self.pause = SWEEP_SECONDS
            return
        self.pause = min(self.pause * 1.1, SWEEP_SECONDS_MOST)
        for run in dying:
            self.chase(run.pid)
        if self.hunted:
            self.chase(1)
        # What hangs in the kernel keeps its children; they are found all the same.
        everyone = processes()
        for run in dying:
            victims = below({run.pid}, everyone)
            for pid in victims:
                kill(pid)
            run.quiet = 0 if victims else run.quiet + 1
            if run.quiet >= QUIET_SWEEPS:
                kill(run.pid)
        if self.hunted:
            self.hunt(everyone)

    def hunt(self, everyone: dict[int, tuple[int, int, bytes]]) -> None:
        """End the orphans of runners that were ended; when none is left, their execs are gone."""
        orphans = {pid for pid in everyone if self.is_orphan(pid)}
        for pid in orphans | below(orphans, everyone):
            kill(pid)
        self.hunt_quiet = 0 if orphans else self.hunt_quiet + 1
        if self.hunt_quiet >= QUIET_HUNTS:
            self.hunted = 0
            for number in self.hunted_of:
                self.link.send(frame(EXEC_GONE, number))
            self.hunted_of = []

    def chase(self, reaper: int) -> None:
        """Kill a runner's children, or our own orphans, and with them whatever is theirs and so comes to it."""
        for _ in range(CHASES):
            found = [pid for pid in children(reaper) if reaper != 1 or self.is_orphan(pid)]
            if not found:
                return
            for pid in found:
                kill(pid)

    def is_orphan(self, pid: int) -> bool:
        """Whether a process came to us from a runner that was ended: not the command, nor of its session."""
        if pid in (1, self.child) or pid in self.runners:
            return False
        facts = look(pid)
        if facts is None:
            return False
        parent, since, session = facts
        return parent == 1 and since >= self.hunted and session != str(self.child).encode()


if __name__ == "__main__":
    hide()
    sys.exit(Guest(sys.argv[1:]).run())
