"""Reading on a thread: facts, lists, content. Each function is one step that may block."""

from __future__ import annotations

import json
import os
import select
import socket
import stat
import threading
import time
from dataclasses import replace

from isolator.files.facts import FileFacts
from isolator.files.paths import Place, mount_names
from isolator.files.refusals import refusing
from isolator.files.roots import Target, inside, open_beneath, open_content, open_place
from isolator.model.agent import Agent

MOST_ENTRIES = 10_000
MOST_LIST = 4 << 20
# Content that is read in the very step that opens it: one wait for a thread instead of two.
SMALL = 256 << 10
PIECE = 1 << 20
_ONCE = 8 << 20
# A thread is lent to one reader for so long, and only while that reader keeps up.
_TURN = 0.25
_PATIENCE_MS = 2


def look(target: Target, *, follow: bool) -> FileFacts:
    """The facts of a place."""
    with inside(target) as root:
        handle = open_place(root, target.place, follow=follow)
        try:
            facts = os.fstat(handle)
            link = os.readlink(b"", dir_fd=handle) if stat.S_ISLNK(facts.st_mode) else None
        finally:
            os.close(handle)
    return FileFacts.of(facts, link)


def list_mounts(agent: Agent) -> bytes:
    """The mounts of a box as a list in JSON: what its root holds for this API."""
    items = []
    for mount in agent.spec.mounts:
        names = mount_names(mount)
        facts = look(Target(agent, Place(names, mount, ())), follow=False)
        items.append({**facts.answer(names), "name": mount.target})
    return _list([json.dumps(item) for item in items], truncated=False)


def list_folder(target: Target) -> bytes:
    """What a folder holds, as a list in JSON, in the order of the file system."""
    found: list[str] = []
    size, truncated = 0, False
    with inside(target) as root:
        folder = open_beneath(root, target.place.relative, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    text = _entry(folder, target.place, os.fsencode(entry.name))
                    if text is None:
                        continue
                    size += len(text)
                    if len(found) >= MOST_ENTRIES or size > MOST_LIST:
                        truncated = True
                        break
                    found.append(text)
        finally:
            os.close(folder)
    return _list(found, truncated=truncated)


def _entry(folder: int, place: Place, name: bytes) -> str | None:
    """One entry in JSON, None if it is gone by now."""
    try:
        facts = os.stat(name, dir_fd=folder, follow_symlinks=False)
        link = os.readlink(name, dir_fd=folder) if stat.S_ISLNK(facts.st_mode) else None
    except OSError:  # removed, or another kind than a moment ago
        return None
    return json.dumps(FileFacts.of(facts, link).answer((*place.names, name)))


def _list(items: list[str], *, truncated: bool) -> bytes:
    return f'{{"items":[{",".join(items)}],"next":null,"truncated":{json.dumps(truncated)}}}'.encode()


class OpenFile:
    """A plain file that is open for reading. `content` is all of it where it is small, else None.

    Its methods are steps for threads; `close` waits for one that is under way, so that no number is used after it.
    """

    def __init__(self, target: Target) -> None:
        """Open it.

        Raises:
            NotFound, Forbidden, Conflict: `file_kind_refused` and what the kernel says.
        """
        self._text = target.place.text
        self._lock = threading.Lock()
        self._descriptor = -1
        self.content: bytes | None = None
        with inside(target) as root:
            handle = open_place(root, target.place, follow=True)
            try:
                self._descriptor, facts = open_content(handle, self._text)
            finally:
                os.close(handle)
        self.facts = FileFacts.of(facts)
        if self.facts.size <= SMALL:
            try:
                with refusing(self._text):
                    self.content = os.pread(self._descriptor, SMALL, 0)
            finally:
                self.close()
            self.facts = replace(self.facts, size=len(self.content))

    def read(self, offset: int, size: int) -> bytes:
        """At most so many bytes; none at the end of the file."""
        with self._lock, refusing(self._text):
            return os.pread(self._descriptor, min(size, PIECE), offset)

    def send(self, connection: socket.socket, offset: int, size: int) -> int:
        """Pass bytes to the connection inside the kernel while its reader keeps up, for a moment; how many.

        Raises:
            EOFError: the file has become shorter. OSError: the kernel can't, or the reader is gone.
        """
        writable = select.poll()
        writable.register(connection, select.POLLOUT)
        end, sent = time.monotonic() + _TURN, 0
        with self._lock:
            while sent < size and time.monotonic() < end:
                try:
                    count = os.sendfile(connection.fileno(), self._descriptor, offset + sent, min(size - sent, _ONCE))
                except BlockingIOError:
                    if not writable.poll(_PATIENCE_MS):
                        break
                    continue
                if count == 0:
                    raise EOFError
                sent += count
        return sent

    def close(self) -> None:
        """Let go of it; again is fine."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor = -1
