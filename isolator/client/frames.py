"""WebSocket frames, RFC 6455: a client's heads out, a server's bytes in. Pure, no extensions.

What no server may send is refused at once; nothing is held beyond the bound of one message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from isolator.client.errors import AnswerInvalid

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
_KNOWN: Final = frozenset({CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG})
_FIRST_CONTROL: Final = 8
_SHORT: Final = 125
_FINAL, _MASKED = 0x80, 0x80
# Masking keeps scripts of web pages from writing a proxy's words. No proxy reads a Unix socket, and with this key,
# which any server must take, nothing has to be rewritten.
_KEY: Final = bytes(4)


@dataclass(frozen=True, slots=True)
class Message:
    """A whole message: its opcode (TEXT, BINARY, or a control frame's) and its bytes."""

    opcode: int
    data: bytes


def encode_head(opcode: int, length: int) -> bytes:
    """What stands before a client's unfragmented message of so many bytes."""
    if length <= _SHORT:
        head = struct.pack("!BB", _FINAL | opcode, _MASKED | length)
    elif length < 1 << 16:
        head = struct.pack("!BBH", _FINAL | opcode, _MASKED | 126, length)
    else:
        head = struct.pack("!BBQ", _FINAL | opcode, _MASKED | 127, length)
    return head + _KEY


class MessageDecoder:
    """Bytes of a server to messages. Pure: fed with whatever pieces the network made of them."""

    def __init__(self, largest: int) -> None:
        """`largest`: bytes of one message, all its fragments together."""
        self._largest = largest
        self._buffer = bytearray()
        self._opcode: int | None = None
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, piece: bytes) -> Iterator[Message]:
        """Whole messages that `piece` completed.

        Raises:
            AnswerInvalid: a frame no server may send, or a message that is too large.
        """
        self._buffer += piece
        while (frame := self._frame()) is not None:
            if message := self._join(*frame):
                yield message

    def _frame(self) -> tuple[bool, int, bytes] | None:
        """The next whole frame: whether it is its message's last, opcode, payload."""
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        opcode, length, start = buffer[0] & 0x0F, buffer[1], 2
        if buffer[0] & 0x70 or opcode not in _KNOWN:
            raise _invalid("uses what was not agreed on")
        if length & _MASKED:
            raise _invalid("is masked, which a server's never is")
        if opcode >= _FIRST_CONTROL and (length > _SHORT or not buffer[0] & _FINAL):
            raise _invalid("is a control frame that is too long or in pieces")
        if length > _SHORT:
            start = 4 if length == 126 else 10
            if len(buffer) < start:
                return None
            length = int.from_bytes(buffer[2:start], "big")
            if length <= (_SHORT if start == 4 else 0xFFFF):
                raise _invalid("tells its length in more bytes than it needs")
        if length + self._size > self._largest:
            raise _invalid(f"belongs to a message of over {self._largest} bytes")
        if len(buffer) < start + length:
            return None
        final, payload = bool(buffer[0] & _FINAL), bytes(memoryview(buffer)[start : start + length])
        del buffer[: start + length]
        return final, opcode, payload

    def _join(self, final: bool, opcode: int, payload: bytes) -> Message | None:
        if opcode >= _FIRST_CONTROL:
            return Message(opcode, payload)
        if (opcode == CONTINUATION) != (self._opcode is not None):
            raise _invalid("begins a message inside another, or goes on with none")
        if final and self._opcode is None:
            return Message(opcode, payload)
        self._opcode = self._opcode or opcode
        self._parts.append(payload)
        # An empty fragment counts too, so that endless ones reach the bound.
        self._size += len(payload) + 1
        if self._size > self._largest:
            raise _invalid(f"belongs to a message of over {self._largest} bytes")
        if not final:
            return None
        message = Message(self._opcode, b"".join(self._parts))
        self._opcode, self._parts, self._size = None, [], 0
        return message


def _invalid(what: str) -> AnswerInvalid:
    return AnswerInvalid(f"A frame of the daemon's WebSocket {what}: is something else listening there?")
