"""The client's calls for messages: send one to an agent, receive what an agent sends to its gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self
from urllib.parse import quote

from isolator.client.errors import AnswerInvalid, AnswerTimeout, ConnectionLost
from isolator.client.location import Location
from isolator.client.transport import request
from isolator.client.websocket import WebSocket, open_websocket

_PROTOCOL: Final = "v1.messages.isolator"
# The daemon's own bound is far below, unless the operator raised it.
_LARGEST: Final = 64 << 20
_SPARE: Final = 15.0


@dataclass(frozen=True, slots=True)
class Message:
    """One message: `sender` and `receiver` are agents' ids or `gateway`; `sequence` grows with each of one sender."""

    id: str
    sender: str
    receiver: str
    type: str
    body: Any
    sent_at: str
    sequence: int
    raw: Mapping[str, Any]

    @classmethod
    def from_answer(cls, answer: Mapping[str, Any]) -> Message:
        """The message a JSON object tells."""
        return cls(
            id=str(answer.get("id")),
            sender=str(answer.get("from")),
            receiver=str(answer.get("to")),
            type=str(answer.get("type")),
            body=answer.get("body"),
            sent_at=str(answer.get("sent_at")),
            sequence=int(answer.get("seq") or 0),
            raw=answer,
        )


class MessageStream:
    """What an agent sends to its gateway. Iterate once; close to stop early."""

    def __init__(self, socket: WebSocket) -> None:
        """On an open connection, which is closed with it."""
        self._socket = socket
        self._closed = False

    def __iter__(self) -> Iterator[Message]:
        """Messages as they come, each acknowledged right before it is given out; ends when the agent is removed.

        Raises:
            ConnectionLost: the daemon went away. AnswerInvalid.
        """
        while (message := self.receive()) is not None:
            yield message

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next message, acknowledged; None: there will be none.

        Raises:
            AnswerTimeout: none for `timeout` seconds. ConnectionLost, AnswerInvalid.
        """
        while True:
            try:
                frame = self._socket.receive(timeout)
                if frame is None:
                    return None
                told = _decoded(frame.data)
                if "from" in told:
                    self._socket.send_text(json.dumps({"received": told.get("id")}))
                    return Message.from_answer(told)
            except AnswerTimeout:
                raise
            except ConnectionLost:
                if self._closed:
                    return None
                raise

    def close(self) -> None:
        """Stop; a thread that iterates sees the end."""
        self._closed = True
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MessageCalls:
    """`send_message` and `messages` of the client."""

    location: Location
    timeout: float

    def send_message(
        self, agent: str, kind: str, body: Any = None, *, ttl: float | None = None, wait: float = 0
    ) -> str:
        """Send a message to an agent; what became of it: `delivered`, `queued`, `sent` and so on (docs/messages.md).

        Args:
            agent: its id.
            kind: what kind of message it is, its `type`.
            body: any JSON.
            ttl: seconds it is kept for an agent that does not receive now.
            wait: seconds to wait until nothing more will become of it (0 to 60).

        Raises:
            ProblemError: `mailbox_full`, `agent_not_running`, `message_too_large` and the like.
        """
        wanted = {"type": kind, "body": body, **({} if ttl is None else {"ttl": ttl})}
        query = {"wait": f"{wait:g}"} if wait else None
        limit = self.timeout + wait + _SPARE
        answer = request(self.location, "POST", _path(agent), query=query, body=wanted, timeout=limit)
        if not isinstance(answer.body, dict):
            raise AnswerInvalid("The daemon's answer is not an object: is something else listening there?")
        return str(answer.body.get("state"))

    def messages(self, agent: str) -> MessageStream:
        """Receive what an agent sends to its gateway, from what is kept on. Of several who do, the oldest gets all."""
        socket = open_websocket(self.location, _path(agent), _PROTOCOL, largest=_LARGEST, timeout=self.timeout)
        stream = MessageStream(socket)
        self._keep(stream)
        return stream

    def _keep(self, stream: MessageStream) -> None:
        """Have it closed with the client."""
        raise NotImplementedError


def _decoded(text: bytes) -> dict[str, Any]:
    try:
        told = json.loads(text)
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise AnswerInvalid("The daemon sent a message that is no JSON object: is something else listening there?")
    return told


def _path(agent: str) -> str:
    if agent in ("", ".", ".."):
        raise AnswerInvalid(f"{agent!r} names nothing.")
    return f"/v1/agents/{quote(agent, safe='')}/messages"
