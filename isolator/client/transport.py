"""HTTP over a Unix socket with the standard library: one connection a call, every wait bounded.

A connection costs about 0.1 ms here, so none is kept: a client then has no state that threads could quarrel
over, and no call can fail because a kept connection had gone stale.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Self
from urllib.parse import urlencode

from isolator.client.errors import (
    AnswerInvalid,
    AnswerTimeout,
    ConnectionLost,
    IsolatorClientError,
    ProblemError,
    SocketDenied,
    SocketNotFound,
    SocketUntrusted,
)
from isolator.client.location import Location

CONNECT_TIMEOUT: Final = 5.0
_QUEUE_FULL_PAUSE: Final = 0.02
_PIECE: Final = 65536
_SENT_AT_ONCE: Final = 1 << 20
_LARGEST_ANSWER: Final = 64 << 20
_OK: Final = 200
_ERROR: Final = 300


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer: HTTP status and decoded JSON (None for an empty body)."""

    status: int
    body: Any


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, location: Location, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout, blocksize=_SENT_AT_ONCE)
        self._location = location
        # http.client forgets its own socket early, when the answer says that the connection closes.
        self.raw: socket.socket | None = None

    def connect(self) -> None:
        self.raw = self.sock = connect(self._location)
        self.sock.settimeout(self.timeout)


def connect(location: Location) -> socket.socket:
    """A connected socket.

    Raises:
        SocketNotFound, SocketDenied, SocketUntrusted, AnswerTimeout.
    """
    path = location.path
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        client.settimeout(CONNECT_TIMEOUT)
        _connect_when_taken(client, os.fspath(path))
        if not location.named:
            _refuse_stranger(client, path)
    except BaseException as error:
        client.close()
        if isinstance(error, OSError):
            raise _connect_error(error, path) from error
        raise
    return client


def _connect_when_taken(client: socket.socket, path: str) -> None:
    """Connect; a Unix socket whose queue is full refuses at once instead of waiting, so we wait here."""
    deadline = time.monotonic() + CONNECT_TIMEOUT
    while True:
        try:
            return client.connect(path)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_QUEUE_FULL_PAUSE)


def _refuse_stranger(client: socket.socket, path: Path) -> None:
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if uid not in (0, os.geteuid()):
        raise SocketUntrusted(path, uid)


def _connect_error(error: OSError, path: Path) -> IsolatorClientError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return SocketNotFound(path)
    if isinstance(error, ConnectionRefusedError):
        return SocketNotFound(path, "a socket is there, but nobody listens")
    if isinstance(error, PermissionError):
        return SocketDenied(path)
    if isinstance(error, TimeoutError | BlockingIOError):
        return AnswerTimeout(f"The daemon at {path} took no connection within {CONNECT_TIMEOUT:g} s.")
    if error.errno in (None, errno.ENAMETOOLONG):
        return SocketNotFound(path, "the path is too long for a socket (107 bytes at most)")
    return SocketNotFound(path, f"it can't be connected to ({error.strerror or error})")


class Stream:
    """The body of an answer that comes bit by bit. Close it, or use it as a context manager."""

    def __init__(self, connection: _UnixConnection, response: http.client.HTTPResponse) -> None:
        self._connection = connection
        self._response = response
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        """Pieces as they come.

        Raises:
            ConnectionLost: the body ended before its end. AnswerTimeout: silence for longer than allowed.
        """
        while not self._closed:
            try:
                piece = self._response.read1(_PIECE)
            except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
                # Closed by another thread: http.client then trips over its own closed file in several ways.
                if self._closed:
                    return
                raise _lost(error) from error
            if piece:
                yield piece
                continue
            if self._response.length:
                raise ConnectionLost("The daemon hung up before the end of its answer.")
            return

    @property
    def closed(self) -> bool:
        """Whether `close` was called, by whomever."""
        return self._closed

    def close(self) -> None:
        """End the stream; a thread that is reading it sees its end."""
        if self._closed:
            return
        self._closed = True
        if self._connection.raw is not None:
            with contextlib.suppress(OSError):
                self._connection.raw.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def take_over(self) -> tuple[socket.socket, Stream, bytes]:
        """After an upgrade: the connection, this to be closed with it, and what was read of it already."""
        assert self._connection.raw is not None
        # Without waiting, a look into what is buffered reads no more than there is.
        self._connection.raw.settimeout(0)
        early: bytes = self._response.fp.peek()
        self._response.close()
        return self._connection.raw, self, early

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._response.close()


def request(
    location: Location,
    method: str,
    path: str,
    *,
    query: Mapping[str, Any] | None = None,
    body: Any = None,
    content: bytes | IO[bytes] | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float,
    decode: bool = True,
) -> Answer:
    """One call, whole answer.

    Args:
        location: where the daemon listens.
        method: GET, POST, PUT, DELETE.
        path: begins with a slash, already quoted.
        query: parameters; those that are None are left out, booleans become true and false.
        body: what to send as JSON, or None for no body.
        content: bytes to send as they are, or an open file to send to its end, instead of `body`.
        headers: more of them.
        timeout: seconds for the whole call, connecting and sending aside.
        decode: whether the body is JSON to be decoded.

    Raises:
        ProblemError: any status from 300 up.
        ConnectionLost, AnswerTimeout, AnswerInvalid, and those of `connect`.
    """
    if body is not None:
        content = json.dumps(body).encode()
    response, stream = open_stream(location, method, path, query=query, body=content, headers=headers, timeout=timeout)
    deadline = time.monotonic() + timeout
    with stream:
        text = bytearray()
        for piece in stream:
            text += piece
            if len(text) > _LARGEST_ANSWER:
                raise AnswerInvalid(f"The daemon's answer is over {_LARGEST_ANSWER} bytes.")
            if time.monotonic() > deadline:
                raise AnswerTimeout(f"The daemon's answer was not complete after {timeout:g} s.")
        if not decode and response.status < _ERROR:
            return Answer(response.status, None)
        return _decode(response, bytes(text))


def open_stream(
    location: Location,
    method: str,
    path: str,
    *,
    query: Mapping[str, Any] | None = None,
    body: bytes | IO[bytes] | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float | None,
) -> tuple[http.client.HTTPResponse, Stream]:
    """Send a call and read its status and headers; the caller closes the stream.

    `timeout`: seconds of silence allowed; None allows any silence once the answer has begun. A Unix socket
    has no half-open connections: the kernel tells at once when the other side is gone.
    """
    connection = _UnixConnection(location, timeout or CONNECT_TIMEOUT)
    sent = {"Accept": "application/json, application/problem+json, */*;q=0.1"}
    if body is not None:
        sent["Content-Type"] = "application/json"
    try:
        # A daemon that refuses a large body early does not read it to its end; its answer is there all the same.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(method, _address(path, query), body=body, headers={**sent, **(headers or {})})
        response = connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        raise _lost(error) from error
    except BaseException:
        connection.close()
        raise
    if timeout is None and connection.raw is not None:
        connection.raw.settimeout(None)
    return response, Stream(connection, response)


def refuse_problem(response: http.client.HTTPResponse, stream: Stream) -> None:
    """For streams: raise what a status of failure tells, reading its body first.

    Raises:
        ProblemError: the status is not one of success.
    """
    if _OK <= response.status < _ERROR:
        return
    with stream:
        text = bytearray()
        for piece in stream:
            text += piece
            if len(text) > _LARGEST_ANSWER:
                break
        _decode(response, bytes(text))


def _address(path: str, query: Mapping[str, Any] | None) -> str:
    kept = {}
    for key, value in (query or {}).items():
        if isinstance(value, bool):
            kept[key] = "true" if value else "false"
        elif value is not None:
            kept[key] = str(value)
    return f"{path}?{urlencode(kept)}" if kept else path


def _decode(response: http.client.HTTPResponse, text: bytes) -> Answer:
    try:
        body = json.loads(text) if text.strip() else None
    except ValueError as error:
        if response.status >= _ERROR:
            raise ProblemError.from_answer(response.status, None) from error
        raise AnswerInvalid("The daemon's answer is not JSON: is something else listening there?") from error
    if not _OK <= response.status < _ERROR:
        raise ProblemError.from_answer(response.status, body)
    return Answer(response.status, body)


def _lost(error: Exception) -> IsolatorClientError:
    if isinstance(error, TimeoutError):
        return AnswerTimeout("The daemon did not answer in time.")
    if isinstance(error, http.client.RemoteDisconnected | http.client.IncompleteRead | OSError):
        return ConnectionLost("The daemon hung up before the end of its answer.")
    if isinstance(error, http.client.HTTPException):
        return AnswerInvalid("What listens there does not speak HTTP as the daemon does.")
    return ConnectionLost("The connection broke in the middle of an answer.")
