"""From a running agent to an open descriptor in one of its mounts; everything else starts from that.

The daemon opens the mount's root through the box's own view (`/proc/<pid>/root`), so that a read-only mount is
read-only here too, and compares its device and inode with those that were checked when the box was built: a pid that
was given to somebody else meanwhile leads nowhere. Only then does the thread take the box's uid and gid as its
filesystem identity, so the kernel lets it do what the agent could do, and no more.

From the root on, every path is resolved by the kernel beneath that descriptor, however the agent moves folders
meanwhile. Links may be followed as long as they stay beneath.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from isolator.files.paths import Place
from isolator.files.refusals import read_only, refusing, wrong_kind
from isolator.host import syscalls
from isolator.model.agent import Agent
from isolator.model.errors import Conflict, Forbidden, Unavailable

_ROOT = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
BENEATH = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_NO_XDEV
# The kernel gives up on a path with `..` in a link when anything on the host is renamed meanwhile.
_TRIES = 64


@dataclass(frozen=True, slots=True)
class Target:
    """A place in a running agent."""

    agent: Agent
    place: Place

    def refuse_root(self) -> None:
        """The mount itself is not the caller's to replace, rename or remove. Raises Forbidden: `file_is_mount`."""
        if not self.place.within:
            raise Forbidden("file_is_mount", f"{self.place.text} is a mount itself; only what lies in it can change.")

    def refuse_read_only(self) -> None:
        """Raises Forbidden: `file_read_only`."""
        if self.place.mount.read_only:
            raise read_only(self.place.text)


def gone(agent: Agent) -> Conflict:
    """The refusal where the box is not there any more."""
    return Conflict("agent_not_running", f"The box of agent {agent.id} is not running any more.", state="exited")


@contextlib.contextmanager
def inside(target: Target) -> Iterator[int]:
    """A descriptor of the mount's root, and this thread with the box's rights, until the end of the block.

    Raises:
        Conflict: `agent_not_running`. And what the kernel refuses in the block, as `refusals` has it.
    """
    spec = target.agent.spec
    root = _open_root(target)
    try:
        with refusing(target.place.text), acting_as(spec.uid, spec.gid):
            yield root
    finally:
        os.close(root)


@contextlib.contextmanager
def acting_as(uid: int, gid: int) -> Iterator[None]:
    """Give the thread another filesystem identity for the block, and then root's again."""
    try:
        syscalls.set_thread_identity(uid, gid, ())
        yield
    finally:
        syscalls.set_thread_identity(0, 0, ())


def _open_root(target: Target) -> int:
    mount = target.place.mount
    try:
        box = os.open(f"/proc/{target.agent.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise gone(target.agent) from error
    except OSError as error:
        raise Unavailable(
            "files_unavailable", f"The daemon can't look into the box: {error.strerror}. It needs CAP_SYS_PTRACE."
        ) from error
    try:
        root = syscalls.openat2(box, mount.target.lstrip("/"), os.O_PATH, _ROOT)
    except OSError as error:
        raise gone(target.agent) from error
    finally:
        os.close(box)
    facts = os.fstat(root)
    if (facts.st_dev, facts.st_ino) != (mount.device, mount.inode):
        os.close(root)
        raise gone(target.agent)
    return root


def open_beneath(root: int, path: bytes, flags: int, resolve: int = BENEATH) -> int:
    """A descriptor of `path` beneath `root`; nothing here ever waits for the other end of a pipe, or for a lease.

    Raises:
        OSError: EXDEV or ELOOP where the path would leave; EAGAIN where it does not hold still.
    """
    # A descriptor that only names a file opens nothing that could wait, and openat2 refuses the flags there.
    waits_never = 0 if flags & os.O_PATH else os.O_NONBLOCK | os.O_NOCTTY
    for _ in range(_TRIES):
        with contextlib.suppress(BlockingIOError):
            return syscalls.openat2(root, path, flags | waits_never, resolve)
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)


def open_place(root: int, place: Place, *, follow: bool) -> int:
    """A descriptor that only names the place (O_PATH): pipes and devices are not touched by it."""
    if not place.within:
        return os.dup(root)
    return open_beneath(root, place.relative, os.O_PATH | (0 if follow else os.O_NOFOLLOW))


def open_folder(root: int, path: bytes) -> int:
    """A descriptor that names a folder."""
    return open_beneath(root, path, os.O_PATH | os.O_DIRECTORY)


def open_content(handle: int, text: str) -> tuple[int, os.stat_result]:
    """What `handle` names, open for reading, and its facts; whatever is no plain file is not even opened.

    Raises:
        Conflict: `file_kind_refused`. OSError.
    """
    facts = os.fstat(handle)
    if not stat.S_ISREG(facts.st_mode):
        raise wrong_kind(text, kind_of(facts.st_mode), "plain file")
    # Opened again through its descriptor: no name that could be exchanged in between.
    return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), facts


def kind_of(mode: int) -> str:
    """`file`, `folder`, `link` or `other`."""
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "folder"
    return "link" if stat.S_ISLNK(mode) else "other"
