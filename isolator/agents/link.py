"""One connected socket as frames: bytes in order, open descriptors beside them, and never a wait.

What the other side does not read stays queued up to a bound; then the link counts as broken. So a guest that stops
reading holds up nobody, and costs no more than the bound.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence

from isolator.agents.frames import Decoder, Frame, ProtocolError

# What is taken at a time is handled at a time: so little that the loop is not held up by small frames.
_RECEIVE = 16384
# What a guest of ours says in a second is far less; one that says more is heard again when the second is over.
MAX_HEARD = 256 * 1024
# What handling a frame costs beside its bytes, as bytes.
FRAME_COST = 64
_HEARD_SECONDS = 1.0
# Room for the longest GO (all secrets, command, environment) and what may wait behind it.
MAX_QUEUED = 4 * 1024 * 1024
# Descriptors wait with their frames: a guest that takes nothing for so long may not hold more of them.
STALLED_SECONDS = 30.0


class Link:
    """A link over an accepted, non-blocking Unix stream socket. Runs on the event loop."""

    def __init__(
        self, connection: socket.socket, *, on_frame: Callable[[Frame], None], on_end: Callable[[Link], None]
    ) -> None:
        """`on_frame` for each frame, may raise ProtocolError; `on_end` once, when the other side is gone."""
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._on_frame = on_frame
        self._on_end = on_end
        self._decoder = Decoder()
        self._queue: deque[tuple[bytes, Sequence[int]]] = deque()
        self._queued = 0
        self._empty: asyncio.Future[None] | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._heard = 0
        self._heard_since = 0.0
        self.open = True
        self._loop.add_reader(connection, self._read)

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send a frame, now or when there is room; the descriptors are the link's from here on, which closes them.

        Raises:
            ConnectionError: the link has ended, or too much waits already; the descriptors are closed.
        """
        if not self.open or self._queued + len(data) > MAX_QUEUED:
            _close(descriptors)
            if self.open:
                self._end()
            raise ConnectionError("the guest is not connected")
        self._queue.append((data, descriptors))
        self._queued += len(data)
        if len(self._queue) == 1:
            self._flush()
        if not self.open:
            raise ConnectionError("the guest is not connected")

    async def drained(self, timeout: float) -> None:
        """Wait until everything sent has been taken by the kernel.

        Raises:
            ConnectionError: the link ended. TimeoutError.
        """
        if self._queue and self.open:
            self._empty = self._empty or self._loop.create_future()
            await asyncio.wait_for(asyncio.shield(self._empty), timeout)
        if not self.open:
            raise ConnectionError("the guest is not connected")

    def close(self) -> None:
        """Hang up, telling nobody."""
        if not self.open:
            return
        self.open = False
        self._loop.remove_reader(self._connection)
        self._loop.remove_writer(self._connection)
        self._connection.close()
        for _, descriptors in self._queue:
            _close(descriptors)
        self._queue.clear()
        self._rest()
        self._wake()

    def _end(self) -> None:
        if self.open:
            self.close()
            self._on_end(self)

    def _wake(self) -> None:
        if self._empty is not None and not self._empty.done():
            self._empty.set_result(None)
        self._empty = None

    def _rest(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _flush(self) -> None:
        while self._queue:
            data, descriptors = self._queue[0]
            try:
                if descriptors:
                    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
                    sent = self._connection.sendmsg([data], rights)
                else:
                    sent = self._connection.send(data)
            except BlockingIOError:
                self._loop.add_writer(self._connection, self._flush)
                if self._stalled is None:
                    self._stalled = self._loop.call_later(STALLED_SECONDS, self._end)
                return
            except OSError:
                self._end()
                return
            _close(descriptors)  # the kernel holds them now
            self._queued -= sent
            self._rest()
            if sent < len(data):
                self._queue[0] = (data[sent:], ())
            else:
                self._queue.popleft()
        self._loop.remove_writer(self._connection)
        self._wake()

    def _read(self) -> None:
        try:
            data = self._connection.recv(_RECEIVE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        frames: list[Frame] = []
        try:
            frames = self._decoder.feed(data)
            for frame in frames:
                self._on_frame(frame)
        except ProtocolError:
            data = b""
        if not data:
            self._end()
        elif self.open:
            self._count(len(data) + FRAME_COST * len(frames))

    def _count(self, size: int) -> None:
        now = self._loop.time()
        if now - self._heard_since > _HEARD_SECONDS:
            self._heard, self._heard_since = 0, now
        self._heard += size
        if self._heard > MAX_HEARD:
            self._loop.remove_reader(self._connection)
            self._loop.call_later(_HEARD_SECONDS, self._listen_again)

    def _listen_again(self) -> None:
        if self.open:
            self._loop.add_reader(self._connection, self._read)

    @staticmethod
    def close_all(descriptors: Sequence[int]) -> None:
        """Close descriptors that were to be sent and could not be."""
        _close(descriptors)


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
