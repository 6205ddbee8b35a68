"""The event stream that survives a broken connection, and the log stream that does not pretend to.

Events carry ids, so the stream goes on after the last one it has given out: none twice, none missed that the
daemon still keeps. Log output has no ids, so a broken log stream ends with ConnectionLost.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from typing import Final, Self

from isolator.client.answers import Event
from isolator.client.errors import (
    AnswerTimeout,
    ConnectionLost,
    IsolatorClientError,
    ProblemError,
    SocketDenied,
    SocketNotFound,
)
from isolator.client.streams import EventDecoder, FrameDecoder, ServerEvent
from isolator.client.transport import Stream, refuse_problem

Opened = tuple[HTTPResponse, Stream]
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 5.0
_TRY_AGAIN: Final = frozenset({429, 500, 502, 503, 504})


class LogStream:
    """An agent's output as (stream, bytes): 1 is stdout, 2 stderr. Iterate once; close to stop early."""

    def __init__(self, opened: Opened) -> None:
        response, self._stream = opened
        self._closed = False
        refuse_problem(response, self._stream)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Chunks as they come.

        Raises:
            ConnectionLost: the daemon went away before the end. AnswerInvalid: not a log stream.
        """
        decoder = FrameDecoder()
        with self._stream:
            for piece in self._stream:
                yield from decoder.feed(piece)
        if decoder.incomplete and not self._closed:
            raise ConnectionLost("The log stream ended inside a piece of output.")

    def close(self) -> None:
        """Stop; a thread that iterates sees the end."""
        self._closed = True
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EventStream:
    """Events in order, each once. Iterate once; close to stop early. `last_id`: where to go on later."""

    def __init__(
        self, connect: Callable[[int | None], Opened], after: int | None, *, follow: bool, patience: float
    ) -> None:
        """Open the stream; the first connection is not retried, so that a missing daemon is told at once.

        Args:
            connect: opens the stream after an event id.
            after: the id to go on after, or None.
            follow: go on when the backlog is through.
            patience: seconds to go on trying after the connection broke.
        """
        self._connect = connect
        self._follow = follow
        self._patience = patience
        self._closed = False
        self.last_id = after
        self._heard = time.monotonic()
        self._stream = self._open()

    def __iter__(self) -> Iterator[Event]:
        """Events as they come.

        Raises:
            ConnectionLost, AnswerTimeout, SocketNotFound: the daemon stayed away for longer than `patience`.
            ProblemError: it refused.
        """
        barren = 0
        broken_since: float | None = None
        while not self._closed:
            heard = self._heard
            lost: IsolatorClientError = ConnectionLost("The daemon takes connections only to drop them.")
            try:
                yield from self._read()
                if not self._follow:
                    return
            except (ConnectionLost, AnswerTimeout) as error:
                lost = error
            if self._closed:
                return
            # A daemon that drops every connection must not be asked in a tight circle, nor for ever.
            now = time.monotonic()
            barren, broken_since = (0, now) if self._heard != heard else (barren + 1, broken_since or now)
            if now - broken_since > self._patience:
                raise lost
            self._pause(min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(barren, 10)))
            self._open_again()

    def _read(self) -> Iterator[Event]:
        decoder = EventDecoder()
        with self._stream as stream:
            for piece in stream:
                self._heard = time.monotonic()
                for said in decoder.feed(piece):
                    event = _event(said)
                    if event is None and not said.data and self.last_id is None:
                        self.last_id = _number(said.id)
                    if event is None or (event.id and self.last_id is not None and event.id <= self.last_id):
                        continue
                    self.last_id = event.id or self.last_id
                    yield event

    def _open(self) -> Stream:
        response, stream = self._connect(self.last_id)
        refuse_problem(response, stream)
        if self.last_id is None:
            # The daemon says where the stream begins: what happens before a broken connection's first event counts.
            self.last_id = _number(response.getheader("Last-Event-ID"))
        return stream

    def _open_again(self) -> None:
        # Half of this client's start time, needed only when a connection broke.
        from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential  # noqa: PLC0415

        again = Retrying(
            retry=retry_if_exception(lambda error: _passes(error) and not self._closed),
            stop=stop_after_delay(self._patience),
            wait=wait_random_exponential(multiplier=_FIRST_PAUSE, max=_LONGEST_PAUSE),
            sleep=self._pause,
            reraise=True,
        )
        try:
            self._stream = again(self._open)
        except IsolatorClientError:
            if not self._closed:
                raise
        if self._closed:
            self._stream.close()

    def _pause(self, seconds: float) -> None:
        """Sleep, in pieces, so that `close` cuts it short."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._closed:
            time.sleep(min(left, _FIRST_PAUSE))

    def close(self) -> None:
        """Stop; a thread that iterates sees the end."""
        self._closed = True
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _passes(error: BaseException) -> bool:
    """Whether trying again may help: the daemon restarts, or is busy."""
    if isinstance(error, ProblemError):
        return error.status in _TRY_AGAIN
    # A socket that is being set up again may for a moment have no group yet.
    return isinstance(error, ConnectionLost | AnswerTimeout | SocketNotFound | SocketDenied)


def _event(said: ServerEvent) -> Event | None:
    try:
        data = json.loads(said.data)
    except ValueError:
        return None
    if not isinstance(data, dict):
        return None
    return Event.from_answer(data, _number(said.id) or 0, said.name)


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None
