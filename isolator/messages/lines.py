"""The tongue of lines: one JSON object a line, both ways, on an agent's own socket.

A line is a message (it has `to`), `{"receive":true}`, or `{"received":"<id>"}`. Each message is answered once, when
its receiver has it or when it is kept, so answers may come in another order: `ref` tells which is which.

Pace: a visitor that sends more than its agent may is told `rate_limited` and not read for a while; one that does not
read its answers is not read either. A visitor's lines are worked off in small turns, so that others have theirs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pydantic

from isolator.messages.envelope import Address, encode, explain, read_object, too_large
from isolator.messages.mailbox import Subscription
from isolator.messages.rate import Bucket
from isolator.messages.router import Router
from isolator.messages.talk import Talk, unknown_acknowledgement
from isolator.model.errors import BadRequest, IsolatorError, TooMany
from isolator.model.message import LARGEST_TAG, LONGEST_TAG, AgentMessage

_LINES_A_TURN = 64
_UNREAD_ANSWERS = 64 * 1024
_AROUND = 1024
_RECEIVE = {"receive"}
_RECEIVED = {"received"}


class Lines(asyncio.Protocol):
    """One visitor's conversation."""

    def __init__(self, agent: str, bucket: Bucket, router: Router, hang_up: Callable[[], None]) -> None:
        """`agent` is who speaks, by the kernel's word; `hang_up()` ends the connection once its answers are read."""
        self._agent = agent
        self._bucket = bucket
        self._router = router
        self._hang_up = hang_up
        self._loop = asyncio.get_running_loop()
        self._longest = router.bounds.message + _AROUND
        self._buffer = bytearray()
        self._searched = 0
        self._transport: asyncio.Transport | None = None
        self._subscription: Subscription | None = None
        # Why it is not read now.
        self._rest: asyncio.Handle | None = None
        self._is_full = False
        self._has_ended = False
        self._talk = Talk(self._answer)
        self._late: asyncio.TimerHandle | None = None

    # the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Bytes, cut anywhere."""
        self._buffer += data
        self._work()

    def eof_received(self) -> bool:
        """It says nothing more, but may still read what it asked for; whoever receives must be able to acknowledge."""
        self._has_ended = True
        self._stop_receiving()
        self._work()
        return True

    def resume_writing(self) -> None:
        """It has read what was written."""
        if self._is_full:
            self._is_full = False
            self._go_on()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end; nobody is there for the answers that are still to come."""
        del exc
        self._transport = None
        self._stop_receiving()
        self._talk.close()
        for handle in (self._rest, self._late):
            if handle is not None:
                handle.cancel()

    def _stop_receiving(self) -> None:
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            subscription.close()

    # lines

    def _work(self) -> None:
        finished = 0
        while self._transport is not None and self._rest is None and not self._is_full:
            if finished == _LINES_A_TURN:
                self._pause(self._loop.call_soon(self._rested))
                return
            end = self._buffer.find(b"\n", self._searched)
            if end < 0 or end > self._longest:
                self._wait_for_rest(anew=finished > 0)
                return
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._searched = 0
            finished += 1
            self._handle(line)
        if self._late is not None and finished:
            self._late.cancel()
            self._late = None

    def _wait_for_rest(self, *, anew: bool) -> None:
        """There is no whole line: there must be one within its bounds of size and time."""
        self._searched = len(self._buffer)
        if self._late is not None and (anew or not self._buffer):
            self._late.cancel()
            self._late = None
        if len(self._buffer) > self._longest:
            self._talk.refuse(too_large(self._router.bounds), None)
            self._end()
        elif self._has_ended:
            self._end_if_answered()
        elif self._buffer and self._late is None:
            self._late = self._loop.call_later(self._router.bounds.patience, self._is_late)

    def _is_late(self) -> None:
        detail = "The rest of the line did not come in time."
        self._answer(encode({"error": "request_timeout", "detail": detail, "ref": None}))
        self._end()

    def _handle(self, line: bytes) -> None:
        ref = None
        try:
            members = self._read(line)
            ref = _tag(members)
            keys = members.keys()
            if keys == _RECEIVED and self._is_held(members["received"]):
                return  # as many as there were messages, so they need no pace
            self._keep_pace(line)
            if keys == _RECEIVED:
                raise unknown_acknowledgement()
            if keys == _RECEIVE:
                self._receive(members["receive"])
            else:
                message = AgentMessage.model_validate(members)
                self._talk.send(ref, lambda watch: self._router.from_agent(self._agent, message, watch))
        except pydantic.ValidationError as error:
            self._talk.refuse(explain(error), ref)
        except IsolatorError as error:
            self._talk.refuse(error, ref)

    def _keep_pace(self, line: bytes) -> None:
        wait = self._bucket.take(len(line))
        if wait:
            self._pause(self._loop.call_later(wait, self._rested))
            raise TooMany("rate_limited", "That is too much at once: this one was not sent.", retry_after=wait)

    def _read(self, line: bytes) -> dict[str, Any]:
        try:
            return read_object(line)
        except BadRequest:
            self._keep_pace(line)  # nonsense has its price as well
            raise

    def _is_held(self, number: object) -> bool:
        return self._subscription is not None and self._subscription.acknowledge(number)

    def _receive(self, wanted: object) -> None:
        if wanted is not True:
            raise BadRequest("invalid_request", "receive: only true is meant.")
        if self._subscription is None and not self._has_ended:
            self._subscription = self._router.subscribe(Address(self._agent, "agent"), self._push, lambda: None)

    # what is written

    def _push(self, line: bytes) -> None:
        if self._transport is not None:
            self._transport.write(line + b"\n")

    def _answer(self, line: bytes) -> None:
        if self._transport is None:
            return
        self._transport.write(line + b"\n")
        # What it is sent as a receiver is bounded by its window, and does not count.
        received = 0 if self._subscription is None else self._subscription.held_bytes
        if self._transport.get_write_buffer_size() > _UNREAD_ANSWERS + received and not self._is_full:
            self._is_full = True
            self._transport.pause_reading()
        if self._has_ended:
            self._loop.call_soon(self._end_if_answered)

    # pace

    def _pause(self, rest: asyncio.Handle) -> None:
        self._rest = rest
        if self._transport is not None:
            self._transport.pause_reading()

    def _rested(self) -> None:
        self._rest = None
        self._go_on()

    def _go_on(self) -> None:
        self._work()
        if self._transport is not None and self._rest is None and not self._is_full and not self._has_ended:
            self._transport.resume_reading()

    def _end_if_answered(self) -> None:
        is_worked_off = self._rest is None and not self._is_full and b"\n" not in self._buffer
        if self._has_ended and self._talk.is_answered and is_worked_off:
            self._end()

    def _end(self) -> None:
        self._stop_receiving()
        self._buffer.clear()
        self._hang_up()


def _tag(members: dict[str, Any]) -> object:
    """`ref` if it is one that may come back."""
    ref = members.get("ref")
    if isinstance(ref, str) and len(ref) <= LONGEST_TAG and ref.isprintable():
        return ref
    return ref if type(ref) is int and 0 <= ref <= LARGEST_TAG else None
