"""The guest's protocol, the daemon's side: frames as bytes and back. Pure. docs/guest-protocol.md states it.

A frame is u32 length, u8 kind, fields; a field is u32 length and bytes; all big-endian. What the other side sends
is hostile: a frame is bounded before it is kept, and one that does not add up ends the connection.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

HELLO, STARTED, FAILED, EXITED = 1, 2, 3, 4
EXEC_STARTED, EXEC_FAILED, EXEC_EXITED, EXEC_GONE = 5, 6, 7, 8
GO, SIGNAL, BYE = 65, 66, 67
EXEC, EXEC_SIGNAL, EXEC_KILL = 68, 69, 70
STAY = 71

# Nothing the guest says in this version is longer than a path.
MAX_INCOMING = 16 * 1024
MAX_NUMBER_DIGITS = 10
MAX_CODE, MAX_SIGNAL, MAX_ERRNO = 255, 64, 4095


class ProtocolError(Exception):
    """The other side broke the protocol; its connection is closed."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame."""

    kind: int
    fields: tuple[bytes, ...]

    def field(self, index: int) -> bytes:
        """Field `index`.

        Raises:
            ProtocolError: absent.
        """
        try:
            return self.fields[index]
        except IndexError:
            raise ProtocolError(f"frame {self.kind} lacks field {index}") from None

    def number(self, index: int, most: int | None = None) -> int:
        """Field `index` as a non-negative decimal number.

        Raises:
            ProtocolError: absent, no such number, or above `most`.
        """
        text = self.field(index)
        if not text.isdigit() or len(text) > MAX_NUMBER_DIGITS or (most is not None and int(text) > most):
            raise ProtocolError(f"field {index} of frame {self.kind} is no number")
        return int(text)


def encode(kind: int, fields: Iterable[bytes] = ()) -> bytes:
    """One frame as bytes."""
    body = bytes((kind,)) + b"".join(len(field).to_bytes(4, "big") + field for field in fields)
    return len(body).to_bytes(4, "big") + body


class Decoder:
    """Frames from a stream of bytes; holds at most one incomplete frame."""

    def __init__(self, limit: int = MAX_INCOMING) -> None:
        """`limit`: the longest frame accepted, bytes."""
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Whole frames that `data` completed.

        Raises:
            ProtocolError: too long, empty, or its lengths do not add up.
        """
        self._buffer += data
        frames: list[Frame] = []
        while len(self._buffer) >= 4:
            length = int.from_bytes(self._buffer[:4], "big")
            if not 0 < length <= self._limit:
                raise ProtocolError(f"a frame of {length} bytes")
            if len(self._buffer) < 4 + length:
                break
            frames.append(_parse(bytes(self._buffer[4 : 4 + length])))
            del self._buffer[: 4 + length]
        return frames


def _parse(body: bytes) -> Frame:
    fields: list[bytes] = []
    position = 1
    while position < len(body):
        end = position + 4 + int.from_bytes(body[position : position + 4], "big")
        if position + 4 > len(body) or end > len(body):
            raise ProtocolError("a field goes beyond its frame")
        fields.append(body[position + 4 : end])
        position = end
    return Frame(body[0], tuple(fields))
