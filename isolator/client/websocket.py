"""A WebSocket over a Unix socket: RFC 6455 as far as the daemon's exec speaks it, no extensions.

Own code, since it runs at every start of `isolator exec`: the well-kept packages load in 30 ms, a quarter of the
whole start, this in 1 ms; and they copy and mask every byte of standard input, which is not needed here.

One thread may receive while others send. Texts, pings' answers and the end are short and never wait behind a
binary message that the daemon does not take: those wait for room before they begin.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import select
import socket
import threading
from collections import deque
from typing import Final, Self

from isolator.client.errors import AnswerInvalid, AnswerTimeout, ConnectionLost
from isolator.client.frames import BINARY, CLOSE, PING, PONG, TEXT, Message, MessageDecoder, encode_head
from isolator.client.location import Location
from isolator.client.transport import Stream, open_stream, refuse_problem

_ACCEPT: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_PIECE: Final = 256 * 1024 + 64
_SWITCHING: Final = 101


class WebSocket:
    """A connection. Close it, or use it as a context manager."""

    def __init__(self, connection: socket.socket, stream: Stream | None, early: bytes, largest: int) -> None:
        """Take over a connection whose upgrade is done.

        Args:
            connection: blocking from now on.
            stream: what else holds it and is to be closed with it, or None.
            early: what was read of it already.
            largest: bytes of one message received.
        """
        connection.settimeout(None)
        self._connection = connection
        self._stream = stream
        self._decoder = MessageDecoder(largest)
        self._early = early
        self._messages: deque[Message] = deque()
        self._sending = threading.Lock()
        self._answer: bytes | None = None
        self._closed = False
        self.close_code: int | None = None

    # receiving

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next text or binary message; None after an orderly end. Pings are answered meanwhile.

        Raises:
            ConnectionLost: no orderly end. AnswerTimeout: silence for `timeout` seconds. AnswerInvalid: no WebSocket.
        """
        while True:
            while self._messages:
                message = self._messages.popleft()
                if message.opcode in (TEXT, BINARY):
                    return message
                if message.opcode == CLOSE:
                    self._end(message.data)
                    return None
                if message.opcode == PING:
                    self._answer = message.data  # only the newest needs an answer
                    self._pong()
            if self.close_code is not None:
                return None
            self._pong()
            self._messages.extend(self._decoder.feed(self._read(timeout)))

    def _read(self, timeout: float | None) -> bytes:
        if self._early:
            piece, self._early = self._early, b""
            return piece
        try:
            if timeout is not None and not _wait(self._connection, select.POLLIN, timeout):
                raise AnswerTimeout(f"The daemon said nothing for {timeout:g} s.")
            piece = self._connection.recv(_PIECE)
        except OSError as error:
            raise ConnectionLost("The connection to the daemon broke.") from error
        if not piece:
            raise ConnectionLost("The daemon hung up in the middle.")
        return piece

    def _end(self, reason: bytes) -> None:
        # 1005 stands for: no code was given.
        self.close_code = int.from_bytes(reason[:2], "big") if len(reason) > 1 else 1005
        with contextlib.suppress(ConnectionLost):
            self._send(CLOSE, reason[:2])

    # sending

    def send_text(self, text: str) -> None:
        """A text message. Raises ConnectionLost: nobody takes it any more."""
        self._send(TEXT, text.encode())

    def send_binary(self, *parts: bytes | memoryview, patient: bool = True) -> None:
        """A binary message of these bytes. Raises ConnectionLost: nobody takes it any more.

        `patient`: while the daemon takes nothing, wait before it begins, so that what is short can go before it.
        """
        try:
            if patient:
                _wait(self._connection, select.POLLOUT, None)
        except OSError as error:
            raise ConnectionLost("The connection to the daemon broke.") from error
        self._send(BINARY, *parts)

    def _send(self, opcode: int, *parts: bytes | memoryview) -> None:
        length = sum(len(part) for part in parts)
        rest = [memoryview(part) for part in (encode_head(opcode, length), *parts) if len(part)]
        try:
            with self._sending:
                while rest:
                    sent = self._connection.sendmsg(rest)
                    while rest and sent >= len(rest[0]):
                        sent -= len(rest.pop(0))
                    if rest:
                        rest[0] = rest[0][sent:]
        except OSError as error:
            raise ConnectionLost("The connection to the daemon broke.") from error
        self._pong()

    def _pong(self) -> None:
        """Answer the newest ping if nobody is sending; whoever is, comes here afterwards.

        Never waits: a receiver that waited here, for a daemon that waits to be read, would wait for ever.
        """
        while self._answer is not None and self._sending.acquire(blocking=False):
            try:
                if (answer := self._answer) is None:
                    return
                self._connection.sendmsg([encode_head(PONG, len(answer)), answer], [], socket.MSG_DONTWAIT)
                if self._answer is answer:
                    self._answer = None
            except OSError:
                return  # no room, or gone: the next reading or sending tells
            finally:
                self._sending.release()

    # ending

    def close(self) -> None:
        """Hang up; a thread that waits here sees ConnectionLost."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        if self._stream is not None:
            self._stream.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_websocket(location: Location, path: str, protocol: str, *, largest: int, timeout: float) -> WebSocket:
    """Connect and upgrade.

    Args:
        location: where the daemon listens.
        path: begins with a slash, already quoted.
        protocol: the subprotocol, which the daemon must take.
        largest: bytes of one message received.
        timeout: seconds for the daemon's answer.

    Raises:
        ProblemError: it refused. And what `transport.connect` raises, ConnectionLost, AnswerTimeout, AnswerInvalid.
    """
    key = base64.b64encode(os.urandom(16)).decode()
    asked = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": key,
        "Sec-WebSocket-Protocol": protocol,
    }
    response, stream = open_stream(location, "GET", path, headers=asked, timeout=timeout)
    if response.status != _SWITCHING:
        refuse_problem(response, stream)
        stream.close()
        raise AnswerInvalid("The daemon answered where it should have opened a WebSocket.")
    accept = base64.b64encode(hashlib.sha1(key.encode() + _ACCEPT, usedforsecurity=False).digest()).decode()
    told = (response.getheader("Sec-WebSocket-Accept"), response.getheader("Sec-WebSocket-Protocol"))
    if told != (accept, protocol) or response.getheader("Sec-WebSocket-Extensions"):
        stream.close()
        raise AnswerInvalid("What listens there does not upgrade to a WebSocket as the daemon does.")
    return WebSocket(*stream.take_over(), largest)


def _wait(connection: socket.socket, event: int, timeout: float | None) -> bool:
    """Whether the connection is ready, or broken, within `timeout` seconds. Raises OSError: it is closed."""
    if connection.fileno() < 0:
        raise OSError("closed")
    waiting = select.poll()
    waiting.register(connection.fileno(), event)
    return bool(waiting.poll(None if timeout is None else max(0.0, timeout) * 1000))
