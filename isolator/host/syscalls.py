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
    "x86_64": {"setgroups": 116, "setfsuid": 122, "setfsgid": 123},
    "aarch64": {"setgroups": 159, "setfsuid": 151, "setfsgid": 152},
}
if _MACHINE not in _NUMBERS:
    raise ImportError(f"isolator runs on x86_64 and aarch64, not on {_MACHINE}")
_SETGROUPS = _NUMBERS[_MACHINE]["setgroups"]
_SETFSUID = _NUMBERS[_MACHINE]["setfsuid"]
_SETFSGID = _NUMBERS[_MACHINE]["setfsgid"]
_OPENAT2 = 437
_FACCESSAT2 = 439

RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

_AT_FDCWD = -100
_AT_EACCESS = 0x200
_AT_EMPTY_PATH = 0x1000
_MS_BIND = 0x1000
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def openat2(folder: int, path: str, flags: int, resolve: int) -> int:
    """A descriptor of `path` below the open folder, close-on-exec.

    Args:
        folder: descriptor of a folder, or AT_FDCWD (-100).
        path: relative for RESOLVE_BENEATH.
        flags: as for open(2).
        resolve: RESOLVE_* bits.
    """
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)
    return _check(_libc.syscall(_OPENAT2, folder, os.fsencode(path), how, len(how)), path)


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
