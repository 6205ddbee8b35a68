"""Bytes to log chunks and to events. Pure: fed with whatever pieces the network made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from isolator.client.errors import AnswerInvalid

STDOUT: Final = 1
STDERR: Final = 2
_HEADER: Final = 8
_LARGEST_FRAME: Final = 16 << 20
_LARGEST_EVENT: Final = 4 << 20


class FrameDecoder:
    """Log frames: u8 stream, three zero bytes, u32 length (big-endian), payload."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Whole frames that `data` completed, as (stream, payload).

        Streams other than 1 and 2, and empty payloads, are passed over: a daemon may keep a line alive so.

        Raises:
            AnswerInvalid: this is not a stream of frames.
        """
        self._buffer += data
        while len(self._buffer) >= _HEADER:
            if any(self._buffer[1:4]):
                raise AnswerInvalid("The log stream is out of step: it is not made of frames.")
            length = int.from_bytes(self._buffer[4:_HEADER], "big")
            if length > _LARGEST_FRAME:
                raise AnswerInvalid(f"The log stream announces a frame of {length} bytes, which is not meant.")
            if len(self._buffer) < _HEADER + length:
                return
            stream = self._buffer[0]
            payload = bytes(self._buffer[_HEADER : _HEADER + length])
            del self._buffer[: _HEADER + length]
            if payload and stream in (STDOUT, STDERR):
                yield stream, payload

    @property
    def incomplete(self) -> bool:
        """Whether the stream stopped inside a frame."""
        return bool(self._buffer)


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One server-sent event: its id (None if it had none), its name, its data.

    Without data it only says where the stream stands, so that one may resume from there.
    """

    id: str | None
    name: str
    data: str


class EventDecoder:
    """The text/event-stream format, as the HTML standard words it, less `retry`."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._id: str | None = None
        self._name = ""
        self._data: list[str] = []
        self._size = 0

    def feed(self, piece: bytes) -> Iterator[ServerEvent]:
        """Whole events that `piece` completed.

        Raises:
            AnswerInvalid: a line or an event longer than any of ours.
        """
        self._buffer += piece
        while (end := self._buffer.find(b"\n")) >= 0:
            line = bytes(self._buffer[:end]).removesuffix(b"\r")
            del self._buffer[: end + 1]
            if event := self._take(line.decode("utf-8", "replace")):
                yield event
        if len(self._buffer) + self._size > _LARGEST_EVENT:
            raise AnswerInvalid("The event stream holds an event that is too long.")

    def _take(self, line: str) -> ServerEvent | None:
        if not line:
            return self._finish()
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "id":
            self._id = value
        elif field == "event":
            self._name = value
        elif field == "data":
            self._data.append(value)
            self._size += len(value)
        return None

    def _finish(self) -> ServerEvent | None:
        told = self._data or self._id is not None
        event = ServerEvent(self._id, self._name or "message", "\n".join(self._data)) if told else None
        self._id, self._name, self._data, self._size = None, "", [], 0
        return event
