"""Letting opened folders appear in a box that runs already.

A mount is cloned from the open descriptor, as when a box is built, and attached from within the box's mount
namespace, on a thread kept for that: the kernel lets in no thread whose root and working folder are shared. The
thread does nothing else and comes home before anybody hears that it has been away; one that can't is given up.

Accepted miss: the box's root is read-only, so a folder appears only where the image has a place for it.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.thread import BrokenThreadPool

from isolator.cancellation import uninterrupted
from isolator.host import syscalls
from isolator.host.folders import HeldFolder
from isolator.host.processes import is_init_of
from isolator.model.box import BoxSpec

_AT_FDCWD = -100
_RESOLVE = syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
_GONE = errno.ESRCH
# What the kernel or the service's unit forbids, it forbids the next time too.
_NEVER = frozenset({errno.EPERM, errno.ENOSYS})


class _Stranded(OSError):
    """The thread did not come home from a box."""


class Placer:
    """Places folders in boxes, one after the other."""

    def __init__(self) -> None:
        """No thread yet: a daemon without a pool needs none."""
        self._thread: ThreadPoolExecutor | None = None
        # Why this daemon can't place folders in boxes, as far as it has tried.
        self.trouble: str | None = None

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread = None

    async def probe(self) -> None:
        """Try whether this daemon may; `trouble` tells."""
        try:
            await self._run(_try)
        except OSError as error:
            self.trouble = _told(error)

    async def place(self, spec: BoxSpec, held: Sequence[HeldFolder], pid: int, container_id: str) -> None:
        """Let the spec's mounts appear in the box of this PID 1.

        Raises:
            OSError: the box is gone, or has no such place; some of the mounts may be there.
        """
        if not spec.mounts:
            return
        try:
            # To its end: the descriptors are closed by whoever waits.
            await uninterrupted(self._run(lambda: _place(spec, held, pid, container_id)))
        except OSError as error:
            if error.errno in _NEVER:
                self.trouble = _told(error)
            raise

    async def _run(self, work: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "isolator-placing", syscalls.unshare_folders)
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except BrokenThreadPool as error:
            self.close()
            raise OSError(errno.EPERM, "the kernel gives no thread a root of its own", "unshare") from error
        except _Stranded:
            self.close()
            raise


def _told(error: OSError) -> str:
    return f"{error.filename or 'setns'}: {error.strerror}"


def _try() -> None:
    """All that `_place` will ask of the kernel, with a mount that is attached nowhere."""
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.close(syscalls.clone_mount(root, read_only=True))
    finally:
        os.close(root)
    _inside("/proc/self/ns/mnt", lambda: True, lambda: None)


def _place(spec: BoxSpec, held: Sequence[HeldFolder], pid: int, container_id: str) -> None:
    trees: list[int] = []

    def attach() -> None:
        for mount, tree in zip(spec.mounts, trees, strict=True):
            place = syscalls.openat2(_AT_FDCWD, mount.target, os.O_PATH, _RESOLVE)
            try:
                syscalls.attach_mount(tree, place)
            finally:
                os.close(place)

    try:
        for mount, folder in zip(spec.mounts, held, strict=True):
            # One after the other: what was cloned before a failure is closed.
            trees.append(syscalls.clone_mount(folder.descriptor, read_only=mount.read_only))
        _inside(f"/proc/{pid}/ns/mnt", lambda: is_init_of(pid, container_id), attach)
    finally:
        for tree in trees:
            os.close(tree)


def _inside(namespace: str, is_right: Callable[[], bool], work: Callable[[], None]) -> None:
    """Do `work` in that mount namespace; `is_right` says, once it is open, whether it is the one that is meant."""
    home = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Asked after it was opened: by now a pid may be another process's, but not what is open.
            if not is_right():
                raise OSError(_GONE, "the box is gone")
            syscalls.enter_mounts(there)
            try:
                work()
            finally:
                _come_home(home)
        finally:
            os.close(there)
    finally:
        os.close(home)


def _come_home(home: int) -> None:
    try:
        syscalls.enter_mounts(home)
    except OSError as error:
        raise _Stranded(error.errno, "the thread did not come home from a box") from error
