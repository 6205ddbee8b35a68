"""Removing on a thread: one name, or a tree from its leaves up, never through a link."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import time

from isolator.files.roots import BENEATH, Target, inside, open_beneath, open_folder
from isolator.host import syscalls
from isolator.model.errors import Conflict

MOST_DEPTH = 128
# How long one step holds its thread.
_TURN = 0.25
_BATCH = 1000
_STAY = BENEATH | syscalls.RESOLVE_NO_SYMLINKS


def remove(target: Target, *, recursive: bool) -> bool:
    """Remove a file, a link or a folder; whether all of it is gone. If not, it was long enough: call again.

    Raises:
        Forbidden: `file_is_mount`, `file_read_only`. Conflict: `folder_not_empty`, `folder_too_deep`.
        And what the kernel refuses.
    """
    target.refuse_root()
    target.refuse_read_only()
    name = target.place.name
    with inside(target) as root:
        folder = open_folder(root, target.place.folder)
        try:
            if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=folder)
                return True
            if not recursive:
                os.rmdir(name, dir_fd=folder)
                return True
            return _remove_tree(folder, name, 1, time.monotonic() + _TURN)
        finally:
            os.close(folder)


def _remove_tree(above: int, name: bytes, depth: int, end: float) -> bool:
    """Each folder is opened from the one above it: one that is exchanged meanwhile leads nowhere else."""
    if depth > MOST_DEPTH:
        raise Conflict("folder_too_deep", f"Folders lie more than {MOST_DEPTH} deep there; remove the deepest first.")
    here = open_beneath(above, name, os.O_RDONLY | os.O_DIRECTORY, _STAY)
    try:
        while entries := _some_of(here):
            for entry, is_folder in entries:
                if time.monotonic() > end:
                    return False
                # Gone by now, or another kind than a moment ago: the next look tells.
                with contextlib.suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError):
                    if not is_folder:
                        os.unlink(entry, dir_fd=here)
                    elif not _remove_tree(here, entry, depth + 1, end):
                        return False
    finally:
        os.close(here)
    os.rmdir(name, dir_fd=above)
    return True


def _some_of(folder: int) -> list[tuple[bytes, bool]]:
    """Names of what is in it, and whether each is a folder; not all, where they are many."""
    os.lseek(folder, 0, os.SEEK_SET)
    with os.scandir(folder) as entries:
        return [
            (os.fsencode(entry.name), entry.is_dir(follow_symlinks=False))
            for entry in itertools.islice(entries, _BATCH)
        ]
