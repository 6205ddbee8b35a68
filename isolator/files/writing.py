"""Writing on a thread: a file comes into being without a name, and gets it in one step when all of it is there.

The folder is pinned by a descriptor first; names are given, exchanged and taken away in that folder only, one name
at a time, which the kernel follows nowhere. Where a file system has no files without a name, a hidden one is used.
Nothing is flushed to the disk: after a loss of power the file system decides what is there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from isolator.files.facts import FileFacts
from isolator.files.refusals import exists, refusing, wrong_kind
from isolator.files.removing import MOST_DEPTH
from isolator.files.roots import (
    BENEATH,
    Target,
    acting_as,
    inside,
    kind_of,
    open_beneath,
    open_content,
    open_folder,
    open_place,
)
from isolator.host import syscalls
from isolator.model.errors import Conflict, PreconditionFailed, TooMany

NEW_FILE = 0o644
NEW_FOLDER = 0o755
PERMISSIONS = 0o777
COPY_PIECE = 16 << 20
_NO_NAMELESS = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT})
_NO_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
_LOCK_PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """How a file is written. mode: permission bits, or None to keep those there are; match: the ETag that must be."""

    mode: int | None = None
    exclusive: bool = False
    parents: bool = False
    match: str | None = None


class Commits:
    """Names are exchanged one at a time, so that a condition and the act it was for are one step to other callers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Raises TooMany: `files_busy`: a file system hangs."""
        if not self._lock.acquire(timeout=_LOCK_PATIENCE):
            raise TooMany("files_busy", "Another file is being put in its place, and its disk is slow.", retry_after=1)
        try:
            yield
        finally:
            self._lock.release()


class Upload:
    """A new file on its way to its name. Its methods are steps for threads, each whole before `abort` has its turn."""

    def __init__(self, target: Target, options: WriteOptions, commits: Commits) -> None:
        """Pin the folder and begin a file that nobody sees.

        Raises:
            Forbidden, NotFound, Conflict, TooLarge, PreconditionFailed: as `refusals` has it; `file_is_mount`,
                `file_exists`, `file_changed`.
        """
        target.refuse_root()
        target.refuse_read_only()
        self._target, self._options, self._commits = target, options, commits
        self._text, self._name = target.place.text, target.place.name
        self._lock = threading.Lock()
        self._folder = self._descriptor = -1
        self._hidden: bytes | None = None
        try:
            with inside(target) as root:
                self._folder = _folder_of(root, target, parents=options.parents)
                self._check(self._present())
                self._begin()
        except BaseException:
            self.abort()
            raise

    def write(self, data: bytes | memoryview) -> None:
        """Add bytes at the end."""
        with self._step():
            left = memoryview(data)
            while left:
                left = left[os.write(self._descriptor, left) :]

    def copy(self, source: int, most: int) -> int:
        """Add a piece of another open file, from where that stands; how many bytes, 0 at its end."""
        most = min(most, COPY_PIECE)
        with self._step():
            try:
                return os.copy_file_range(source, self._descriptor, most)
            except OSError as error:
                if error.errno not in _NO_COPY:
                    raise
            left = memoryview(data := os.read(source, most))
            while left:
                left = left[os.write(self._descriptor, left) :]
            return len(data)

    def commit(self) -> tuple[FileFacts, bool]:
        """Give it its name, in one step for whoever looks; its facts, and whether nothing was there before."""
        with self._step(), self._commits.one():
            present = self._present()
            self._check(present)
            kept = stat.S_IMODE(present.st_mode) if present and stat.S_ISREG(present.st_mode) else NEW_FILE
            os.fchmod(self._descriptor, PERMISSIONS & (kept if self._options.mode is None else self._options.mode))
            is_new = present is None and self._name_new()
            if not is_new:
                if self._options.exclusive:
                    raise exists(self._text)
                self._replace()
            return FileFacts.of(os.fstat(self._descriptor)), is_new

    def abort(self) -> None:
        """Let go of it; what has no name yet is gone. Again, or after `commit`, is fine."""
        with self._lock:
            if self._hidden is not None:
                spec = self._target.agent.spec
                with acting_as(spec.uid, spec.gid), contextlib.suppress(OSError):
                    os.unlink(self._hidden, dir_fd=self._folder)
                self._hidden = None
            for descriptor in (self._descriptor, self._folder):
                if descriptor >= 0:
                    os.close(descriptor)
            self._folder = self._descriptor = -1

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        spec = self._target.agent.spec
        with self._lock, refusing(self._text), acting_as(spec.uid, spec.gid):
            yield

    def _present(self) -> os.stat_result | None:
        try:
            return os.stat(self._name, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def _check(self, present: os.stat_result | None) -> None:
        if present is not None and self._options.exclusive:
            raise exists(self._text)
        if present is not None and not (stat.S_ISREG(present.st_mode) or stat.S_ISLNK(present.st_mode)):
            raise wrong_kind(self._text, kind_of(present.st_mode), "plain file")
        if self._options.match is not None:
            etag = None if present is None else FileFacts.of(present).etag
            if etag is None or self._options.match not in ("*", etag):
                raise PreconditionFailed("file_changed", f"{self._text[:256]} is not as If-Match says.", etag=etag)

    def _begin(self) -> None:
        try:
            self._descriptor = os.open(b".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=self._folder)
        except OSError as error:
            if error.errno not in _NO_NAMELESS:
                raise
            hidden = _hidden_name()
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._descriptor = os.open(hidden, flags, 0o600, dir_fd=self._folder)
            self._hidden = hidden

    def _name_new(self) -> bool:
        """Give it its name if that is free; whether it was."""
        try:
            self._link(self._name)
        except FileExistsError:
            return False
        return True

    def _replace(self) -> None:
        if self._hidden is None:
            hidden = _hidden_name()
            self._link(hidden)
            self._hidden = hidden
        os.rename(self._hidden, self._name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._hidden = None

    def _link(self, name: bytes) -> None:
        if self._hidden is None:
            os.link(f"/proc/self/fd/{self._descriptor}", name, dst_dir_fd=self._folder, follow_symlinks=True)
        else:  # not renamed: where there are no files without a name, there is often no such rename either
            os.link(self._hidden, name, src_dir_fd=self._folder, dst_dir_fd=self._folder, follow_symlinks=False)
            os.unlink(self._hidden, dir_fd=self._folder)
            self._hidden = None


class Copy:
    """A plain file of the agent, copied to another name in its mounts. Steps for threads, as `Upload`."""

    def __init__(self, source: Target, target: Target, options: WriteOptions, commits: Commits) -> None:
        """Open the one and begin the other; the copy has the source's permissions."""
        self._lock = threading.Lock()
        with inside(source) as root:
            handle = open_place(root, source.place, follow=True)
            try:
                self._source, facts = open_content(handle, source.place.text)
            finally:
                os.close(handle)
        try:
            self._left = facts.st_size
            mode = stat.S_IMODE(facts.st_mode)
            copied = WriteOptions(mode, options.exclusive, options.parents, options.match)
            self._upload = Upload(target, copied, commits)
        except BaseException:
            os.close(self._source)
            raise

    def step(self) -> int:
        """One piece more; 0 when all is there that was there at first: the agent may let it grow without end."""
        with self._lock:
            done = self._upload.copy(self._source, self._left) if self._left else 0
            self._left -= done
        return done

    def commit(self) -> tuple[FileFacts, bool]:
        """As `Upload.commit`."""
        return self._upload.commit()

    def abort(self) -> None:
        """As `Upload.abort`."""
        self._upload.abort()
        with self._lock:
            if self._source >= 0:
                os.close(self._source)
            self._source = -1


def make_folder(target: Target, *, parents: bool) -> tuple[FileFacts, bool]:
    """Make a folder; with `parents` those above it too, and one that is there is fine. Its facts, and if it is new.

    Raises:
        Conflict: `file_exists`. And as `Upload`.
    """
    target.refuse_root()
    target.refuse_read_only()
    with inside(target) as root:
        folder = _folder_of(root, target, parents=parents)
        try:
            is_new = _make(root, folder, target.place.relative, target.place.name)
            if not is_new and not parents:
                raise exists(target.place.text)
        finally:
            os.close(folder)
        made = open_folder(root, target.place.relative)
        try:
            return FileFacts.of(os.fstat(made)), is_new
        finally:
            os.close(made)


def rename(source: Target, target: Target, *, replace: bool) -> FileFacts:
    """Move a file, link or folder to another name in the same mount; its facts.

    Raises:
        Conflict: `file_other_mount`, `file_exists`, `folder_not_empty`. And as `Upload`.
    """
    for place in (source, target):
        place.refuse_root()
        place.refuse_read_only()
    if source.place.mount != target.place.mount:
        raise Conflict("file_other_mount", "A file can't be renamed from one mount into another: copy, then remove.")
    with inside(source) as root:
        old = open_folder(root, source.place.folder)
        try:
            with refusing(target.place.text):
                new = open_folder(root, target.place.folder)
            try:
                if replace:
                    os.rename(source.place.name, target.place.name, src_dir_fd=old, dst_dir_fd=new)
                else:
                    syscalls.rename_new(old, source.place.name, new, target.place.name)
                return FileFacts.of(os.stat(target.place.name, dir_fd=new, follow_symlinks=False))
            finally:
                os.close(new)
        finally:
            os.close(old)


def _folder_of(root: int, target: Target, *, parents: bool) -> int:
    """A descriptor of the folder that a place lies in; with `parents`, made where it is missing."""
    place = target.place
    if parents:
        if len(place.within) > MOST_DEPTH:
            # What is made here can be removed here.
            raise Conflict("folder_too_deep", f"Folders are made at most {MOST_DEPTH} deep.")
        for depth in range(1, len(place.within)):
            path = b"/".join(place.within[:depth])
            try:
                os.close(open_folder(root, path))
            except FileNotFoundError:
                above = open_folder(root, b"/".join(place.within[: depth - 1]) or b".")
                try:
                    _make(root, above, path, place.within[depth - 1])
                finally:
                    os.close(above)
    return open_folder(root, place.folder)


def _make(root: int, folder: int, path: bytes, name: bytes) -> bool:
    """Make a folder with the mode new ones have, whatever the daemon's umask; whether it was absent."""
    try:
        os.mkdir(name, NEW_FOLDER, dir_fd=folder)
    except FileExistsError:
        return False
    made = open_beneath(root, path, os.O_RDONLY | os.O_DIRECTORY, BENEATH)
    try:
        inherited = os.fstat(made).st_mode & stat.S_ISGID
        os.fchmod(made, NEW_FOLDER | inherited)
    finally:
        os.close(made)
    return True


def _hidden_name() -> bytes:
    return f".isolator-{secrets.token_hex(8)}".encode()
