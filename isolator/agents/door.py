"""An agent's socket on the host: who knocks, by the kernel's word, and how often.

The socket is the identity. It lies in a folder of the agent's own, mounted at /run/isolator in its box and nowhere
else, so whoever connects is in that box. PID 1 of it is the guest; every other process is a visitor, who may send
and receive messages. Nothing that is said on a connection changes who speaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from isolator.host.processes import is_in, is_init_of
from isolator.host.sockets import without_descriptors

_BACKLOG = 64
# Whoever knocks more often waits in the queue until the second is over.
KNOCKS_ALLOWED = 200
_PAUSE = 1.0
_CREDENTIALS = struct.Struct("3i")


class Door:
    """One agent's listening socket. Runs on the event loop."""

    def __init__(
        self,
        folder: Path,
        *,
        on_guest: Callable[[socket.socket, int], None],
        on_visitor: Callable[[socket.socket], None],
    ) -> None:
        """`on_guest(connection, pid)` and `on_visitor(connection)` own the connection."""
        self._folder = folder
        self._loop = asyncio.get_running_loop()
        self._on_guest = on_guest
        self._on_visitor = on_visitor
        self._container_id: str | None = None
        self._listener: socket.socket | None = None
        self._knocks = 0

    def listen(self) -> None:
        """Bind the socket. Until `expect`, whoever knocks waits.

        Raises:
            OSError: the folder is gone or the socket can't be made.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        # By descriptor: a path of a deep folder would be longer than a Unix address may be.
        folder = os.open(self._folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            address = Path(f"/proc/self/fd/{folder}/agent.sock")
            with contextlib.suppress(FileNotFoundError):
                address.unlink()
            listener.bind(str(address))
            # The folder above is closed to everybody on the host; inside the box any uid may knock.
            address.chmod(0o666)
        except BaseException:
            listener.close()
            raise
        finally:
            os.close(folder)
        listener.listen(_BACKLOG)
        self._listener = without_descriptors(listener)

    def expect(self, container_id: str) -> None:
        """Open to the processes of this container."""
        self._container_id = container_id
        if self._listener is not None:
            self._loop.add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Stop listening; connections already handed on go on."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def _accept(self) -> None:
        if self._listener is None or self._container_id is None:
            return
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:
            self._count(KNOCKS_ALLOWED)  # no descriptor is left: whoever knocks waits, and so does the loop
            return
        self._count()
        connection.setblocking(False)
        pid, _, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if is_init_of(pid, self._container_id):
            self._on_guest(connection, pid)
            return
        if is_in(pid, self._container_id):
            self._on_visitor(connection)
        else:
            connection.close()

    def _count(self, knocks: int = 1) -> None:
        if self._knocks == 0:
            self._loop.call_later(_PAUSE, self._forget)
        self._knocks += knocks
        if self._knocks >= KNOCKS_ALLOWED and self._listener is not None:
            self._loop.remove_reader(self._listener)

    def _forget(self) -> None:
        paused = self._knocks >= KNOCKS_ALLOWED
        self._knocks = 0
        if paused and self._listener is not None:
            self._loop.add_reader(self._listener, self._accept)
