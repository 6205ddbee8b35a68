"""The few system calls Python's standard library does not offer, by ctypes, each raising OSError.

Numbers are from the kernel's tables for x86_64 and aarch64; elsewhere the import of this module fails, which is
better than calling something else.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Sequence

_MACHINE = platform.machine()
_NUMBERS = {
    "x86_64": {"setgroups": 116, "setfsuid": 122, "setfsgid": 123, "renameat2": 316},
    "aarch64": {"setgroups": 159, "setfsuid": 151, "setfsgid": 152, "renameat2": 276},
}
if _MACHINE not in _NUMBERS:
    raise ImportError(f"isolator runs on x86_64 and aarch64, not on {_MACHINE}")
_SETGROUPS = _NUMBERS[_MACHINE]["setgroups"]
_SETFSUID = _NUMBERS[_MACHINE]["setfsuid"]
_SETFSGID = _NUMBERS[_MACHINE]["setfsgid"]
_RENAMEAT2 = _NUMBERS[_MACHINE]["renameat2"]
_OPEN_TREE = 428
_MOVE_MOUNT = 429
_OPENAT2 = 437
_FACCESSAT2 = 439
_MOUNT_SETATTR = 442

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

_AT_FDCWD = -100
_AT_EACCESS = 0x200
_AT_EMPTY_PATH = 0x1000
_MS_BIND = 0x1000
_MNT_DETACH = 2
_RENAME_NOREPLACE = 1
_UMOUNT_NOFOLLOW = 8
_MS_PRIVATE = 1 << 18
_CLONE_FS = 0x200
_CLONE_NEWNS = 0x20000
_OPEN_TREE_CLONE = 1
_MOUNT_ATTR_RDONLY = 1
_MOVE_MOUNT_FROM_TO_DESCRIPTORS = 0x04 | 0x40

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str | bytes) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def openat2(folder: int, path: str | bytes, flags: int, resolve: int) -> int:
    """A descriptor of `path` below the open folder, close-on-exec.

    Args:
        folder: descriptor of a folder, or AT_FDCWD (-100).
        path: relative for RESOLVE_BENEATH.
        flags: as for open(2).
        resolve: RESOLVE_* bits.
    """
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)
    return _check(_libc.syscall(_OPENAT2, folder, os.fsencode(path), how, len(how)), path)


def rename_new(folder: int, name: bytes, to_folder: int, to_name: bytes) -> None:
    """Rename, unless something of the new name is there: then FileExistsError."""
    _check(_libc.syscall(_RENAMEAT2, folder, name, to_folder, to_name, _RENAME_NOREPLACE), to_name)


def may_access(descriptor: int, mode: int) -> bool:
    """Whether this thread's filesystem identity may access the open file: os.R_OK, W_OK, X_OK bits."""
    result = _libc.syscall(_FACCESSAT2, descriptor, b"", mode, _AT_EMPTY_PATH | _AT_EACCESS)
    return bool(result == 0)


def bind_mount(descriptor: int, target: str) -> None:
    """Bind what the descriptor holds, and nothing mounted below it, onto `target`."""
    source = f"/proc/self/fd/{descriptor}".encode()
    _check(_libc.mount(source, os.fsencode(target), None, ctypes.c_ulong(_MS_BIND), None), target)


def unmount(target: str) -> None:
    """Detach whatever is mounted at `target`, without following a link."""
    _check(_libc.umount2(os.fsencode(target), _MNT_DETACH | _UMOUNT_NOFOLLOW), target)


def clone_mount(descriptor: int, *, read_only: bool) -> int:
    """A descriptor of a mount of what `descriptor` holds, attached nowhere yet, that shares no later change.

    What is mounted below it is not part of it. Close it when it has been attached.
    """
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH
    tree = _check(_libc.syscall(_OPEN_TREE, descriptor, b"", flags), "open_tree")
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_RDONLY if read_only else 0, 0, _MS_PRIVATE, 0)
    try:
        _check(_libc.syscall(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, attributes, len(attributes)), "mount_setattr")
    except OSError:
        os.close(tree)
        raise
    return tree


def attach_mount(tree: int, place: int) -> None:
    """Attach a cloned mount at the open folder `place`, which is of this thread's mount namespace."""
    _check(_libc.syscall(_MOVE_MOUNT, tree, b"", place, b"", _MOVE_MOUNT_FROM_TO_DESCRIPTORS), "move_mount")


def unshare_folders() -> None:
    """Give this thread a root and working folder of its own: only such a thread may enter mount namespaces."""
    _check(_libc.unshare(_CLONE_FS), "unshare")


def enter_mounts(namespace: int) -> None:
    """Move this thread into the mount namespace of the descriptor; its root and working folder become that one's."""
    _check(_libc.setns(namespace, _CLONE_NEWNS), "setns")


def set_thread_identity(uid: int, gid: int, groups: Sequence[int]) -> None:
    """Set this thread's filesystem uid, gid and supplementary groups, and no other thread's.

    The C library's setgroups would change every thread of the process, so the bare call is made. With a uid other
    than 0 the kernel takes the capabilities that override file permissions away from this thread; with 0 it gives
    them back.

    Raises:
        OSError: the kernel did not change it.
    """
    array = (ctypes.c_uint32 * len(groups))(*groups)
    _check(_libc.syscall(_SETGROUPS, len(groups), array), "setgroups")
    # These two return the previous id whether they worked or not: asking for an impossible one tells the present.
    for number, wanted in ((_SETFSGID, gid), (_SETFSUID, uid)):
        _libc.syscall(number, wanted)
        if _libc.syscall(number, ctypes.c_uint32(0xFFFFFFFF)) != wanted:
            raise OSError(1, "the filesystem identity did not change")
