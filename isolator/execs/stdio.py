"""What a command in a box reads from and writes to: three pipes, or a terminal of the box's own.

Both are made here and only their far ends go into the box. So nothing in the box can put words into another exec's
output, and output takes no way through the guest.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat
import struct
import termios

from isolator.host import syscalls
from isolator.model.errors import Unavailable

_PIPE_BYTES = 1024 * 1024
_PTMX = os.makedev(5, 2)
_TIOCSPTLCK, _TIOCGPTN, _TIOCGPTPEER, _TIOCSIG = 0x40045431, 0x80045430, 0x5441, 0x40045436
# What the kernel lets the controlling end send to the terminal's foreground group.
_KEYS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP)
_RESOLVE = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS


class Stdio:
    """Our ends: `stdin`, `stdout`, `stderr` (-1: there is none), and the box's: `theirs`, for the guest.

    `terminal` is the terminal's path in the box, empty for pipes.
    """

    terminal = ""

    def __init__(self) -> None:
        """Nothing is open yet."""
        self.stdin = self.stdout = self.stderr = -1
        self.theirs: list[int] = []

    def close_stdin(self) -> None:
        """End of file for the program."""
        if self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1

    def close_output(self, stream: int) -> None:
        """Close 1 or 2: who writes there from now on is told that nobody reads."""
        name = "stdout" if stream == 1 else "stderr"
        if getattr(self, name) >= 0:
            os.close(getattr(self, name))
            setattr(self, name, -1)

    def close(self) -> None:
        """Close what is open; `theirs` too, unless they were given away."""
        self.close_stdin()
        for descriptor in self.theirs:
            os.close(descriptor)
        self.theirs = []
        for descriptor in {self.stdout, self.stderr} - {-1}:
            os.close(descriptor)
        self.stdout = self.stderr = -1

    def resize(self, columns: int, rows: int) -> None:
        """Set the terminal's size; pipes have none."""

    def press(self, number: int) -> bool:
        """Send a signal as a key of the terminal does; False if it must be sent otherwise."""
        del number
        return False


class Pipes(Stdio):
    """Three pipes, owned by the box's user: programs open /dev/stdout and the like again."""

    def __init__(self, uid: int, gid: int) -> None:
        """Make them.

        Raises:
            OSError: the daemon has no descriptors left.
        """
        super().__init__()
        try:
            for number in range(3):
                read_end, write_end = os.pipe2(os.O_CLOEXEC)
                ours, theirs = (write_end, read_end) if number == 0 else (read_end, write_end)
                self.theirs.append(theirs)
                setattr(self, ("stdin", "stdout", "stderr")[number], ours)
                os.set_blocking(ours, False)
                with contextlib.suppress(PermissionError):  # of a daemon that is not root they can't be opened again
                    os.fchown(theirs, uid, gid)
                if number == 1:
                    with contextlib.suppress(OSError):  # smaller is slower, not wrong
                        fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        except BaseException:
            self.close()
            raise


class Terminal(Stdio):
    """A terminal of the box's own /dev/pts."""

    def __init__(self, pid: int, uid: int, gid: int, size: tuple[int, int] | None) -> None:
        """Make one in the box of this PID 1.

        Raises:
            Unavailable: `terminal_unavailable`: the box has none to give.
        """
        super().__init__()
        try:
            self.stdin = self.stdout = _open_ptmx(pid)
            self.terminal = self._unlock(uid, gid)
            if size is not None:
                self.resize(*size)
        except OSError as error:
            self.close()
            raise Unavailable(
                "terminal_unavailable", f"The box gives no terminal ({error.strerror}). Try without one."
            ) from error

    def _unlock(self, uid: int, gid: int) -> str:
        fcntl.ioctl(self.stdout, _TIOCSPTLCK, struct.pack("i", 0))
        (number,) = struct.unpack("i", fcntl.ioctl(self.stdout, _TIOCGPTN, b"\0" * 4))
        peer = fcntl.ioctl(self.stdout, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            os.fchmod(peer, 0o600)
            os.fchown(peer, uid, gid)
        finally:
            os.close(peer)
        return f"/dev/pts/{number}"

    def close_stdin(self) -> None:
        """A terminal has no half to close; what ends a line-wise reader is its end-of-file key."""

    def close_output(self, stream: int) -> None:
        """Its two directions are one descriptor: neither is closed alone."""

    def close(self) -> None:
        """Close it: whoever still uses it is hung up on."""
        if self.stdout >= 0:
            os.close(self.stdout)
        self.stdin = self.stdout = -1

    def resize(self, columns: int, rows: int) -> None:
        """Set its size; the foreground group is told by SIGWINCH."""
        if self.stdout >= 0:
            fcntl.ioctl(self.stdout, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, number: int) -> bool:
        """As the key does: to the foreground group."""
        if number not in _KEYS or self.stdout < 0:
            return False
        with contextlib.suppress(OSError):
            fcntl.ioctl(self.stdout, _TIOCSIG, number)
        return True


def _open_ptmx(pid: int) -> int:
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        ptmx = syscalls.openat2(root, "dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK, _RESOLVE)
    finally:
        os.close(root)
    facts = os.fstat(ptmx)
    if not stat.S_ISCHR(facts.st_mode) or facts.st_rdev != _PTMX:
        os.close(ptmx)
        raise OSError(19, "its /dev/pts/ptmx is none")
    return ptmx
