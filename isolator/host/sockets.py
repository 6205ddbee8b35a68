"""Listening sockets that no open files can be sent to.

Whoever connects could send a descriptor along. The kernel closes it for a receiver that did not ask for it, in the
receiver's own thread; and a TCP socket with SO_LINGER and a peer that reads nothing makes that wait for as long as
the sender likes. So one byte from a box would stop the whole daemon.

Linux 6.16 refuses such a message to its sender (SO_PASSRIGHTS). Before that, what comes along is taken, told not to
linger, and closed on a thread of its own; who sent it counts as gone.

Accepted miss before 6.16: two processes may set the option back in the microseconds before our close. Then that
thread waits, and what is sent later stays open behind it.
"""

from __future__ import annotations

import array
import contextlib
import os
import queue
import socket
import struct
import threading
from typing import Any, Self

_SO_PASSRIGHTS = 83
# The most that the kernel lets one message carry: what does not fit is closed at once, which is the trouble.
_MOST = 253
_ITEM = array.array("i").itemsize
_NO_LINGER = struct.pack("ii", 0, 0)


def without_descriptors(listener: socket.socket) -> socket.socket:
    """The same listening Unix socket, whose connections take no descriptors; `listener` may be used up by it."""
    try:
        listener.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError:
        blocks = listener.getblocking()
        listener = DeafSocket(fileno=listener.detach())
        listener.setblocking(blocks)
    return listener


class DeafSocket(socket.socket):
    """A Unix socket that gets rid of descriptors itself, and so do those it accepts."""

    def accept(self) -> tuple[Self, Any]:
        """As ever; the connection blocks or not as its user says."""
        connection, address = super().accept()
        return type(self)(fileno=connection.detach()), address

    def recv(self, size: int, flags: int = 0) -> bytes:
        """As ever; none, as at the end, where descriptors came along."""
        data, beside, _, _ = self.recvmsg(size, socket.CMSG_SPACE(_MOST * _ITEM), flags)
        found = array.array("i")
        for level, kind, content in beside:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                found.frombytes(content[: len(content) - len(content) % _ITEM])
        if not found:
            return data
        _closer.close(found.tolist())
        return b""


class _Closer:
    """Closes what may be slow to close."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def close(self, descriptors: list[int]) -> None:
        """Soon."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="isolator-closer", daemon=True)
            self._thread.start()
        for descriptor in descriptors:
            self._queue.put(descriptor)

    def _run(self) -> None:
        while True:
            descriptor = self._queue.get()
            try:
                file = socket.socket(fileno=descriptor)
            except OSError:  # no socket
                os.close(descriptor)
                continue
            with file, contextlib.suppress(OSError):
                file.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)


_closer = _Closer()
