"""Routes of messages, the gateway's side: send one, or send and receive on a WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque

import pydantic
from aiohttp import WSCloseCode, WSMsgType, web

from isolator.api.parts import PARTS
from isolator.api.wire import json_answer, query_number, read_model
from isolator.messages.envelope import Address, explain, read_object
from isolator.messages.mailbox import Subscription, Ticket
from isolator.messages.router import Router
from isolator.messages.talk import Talk, unknown_acknowledgement
from isolator.model.errors import Conflict, IsolatorError, TooMany, UpgradeRequired
from isolator.model.message import MessageRequest, TaggedMessage

LONGEST_WAIT = 60.0
# Taken where a client offers it; none needs to.
PROTOCOL = "v1.messages.isolator"
_AROUND = 1024
_UNREAD_ANSWERS = 64


class Outcome:
    """What becomes of one message, for a sender who waits a while. Set `ticket` to what `from_…` returns."""

    def __init__(self) -> None:
        """Hand `watch` over with the message."""
        self.ticket: Ticket | None = None
        self._changed = asyncio.Event()

    def watch(self, ticket: Ticket) -> None:
        """Something became of it."""
        del ticket
        self._changed.set()

    async def answer(self, wait: float) -> web.Response:
        """200 when nothing more will become of it, within `wait` seconds; 202 and how far it came."""
        ticket = self.ticket
        assert ticket is not None
        while ticket.state is None and ticket.error is None:
            await self._next()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                while not ticket.settled:
                    await self._next()
        if ticket.error is not None:
            raise ticket.error
        return json_answer({"id": ticket.id, "state": ticket.state}, 200 if ticket.settled else 202)

    async def _next(self) -> None:
        self._changed.clear()
        await self._changed.wait()


async def send(request: web.Request) -> web.StreamResponse:
    """POST /v1/agents/{agent}/messages."""
    parts = request.app[PARTS]
    wait = query_number(request, "wait", 0, LONGEST_WAIT) or 0
    message = await read_model(request, MessageRequest, parts.settings.request_timeout)
    outcome = Outcome()
    outcome.ticket = parts.messages.from_gateway(request.match_info["agent"], message, outcome.watch)
    return await outcome.answer(wait)


async def connect(request: web.Request) -> web.StreamResponse:
    """GET /v1/agents/{agent}/messages: a WebSocket."""
    parts, agent = request.app[PARTS], request.match_info["agent"]
    largest = parts.messages.bounds.message + _AROUND
    socket = web.WebSocketResponse(max_msg_size=largest, compress=False, protocols=(PROTOCOL,))
    if not socket.can_prepare(request).ok:
        raise UpgradeRequired("upgrade_required", "This address is a WebSocket; to send one message, POST it.")
    if parts.lifecycle.find(agent) is None:
        raise Conflict("agent_not_running", "The agent is removed: there will be no messages.")
    if parts.followers.locked():
        raise TooMany("followers_exhausted", "Too many streams are open; close some.", retry_after=5)
    async with parts.followers:
        await socket.prepare(request)
        conversation = Conversation(socket, parts.messages, agent)
        stopping = asyncio.create_task(parts.stopping.wait())
        working = [asyncio.create_task(conversation.read()), asyncio.create_task(conversation.write())]
        try:
            await asyncio.wait({stopping, *working}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            conversation.close()
            for task in (stopping, *working):
                task.cancel()
            await asyncio.gather(stopping, *working, return_exceptions=True)
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(1):
                    await socket.close(code=WSCloseCode.GOING_AWAY if parts.stopping.is_set() else WSCloseCode.OK)
        return socket


class Conversation:
    """One gateway's connection to one agent: what it says is read here, what it is told goes out in order."""

    def __init__(self, socket: web.WebSocketResponse, router: Router, agent: str) -> None:
        """Subscribes at once. Raises NotFound: `agent_not_found`."""
        self._socket = socket
        self._router = router
        self._agent = agent
        self._outgoing: deque[bytes] = deque()
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._talk = Talk(self._push)
        self._is_over = False
        self._subscription: Subscription = router.subscribe(Address(agent, "gateway"), self._push, self._gone)

    def close(self) -> None:
        """Receive no more; what was not acknowledged stays so."""
        self._subscription.close()
        self._talk.close()

    async def write(self) -> None:
        """Until the agent is gone or the connection broke."""
        while self._outgoing or not self._is_over:
            if not self._outgoing:
                self._emptied.set()
                self._filled.clear()
                await self._filled.wait()
                continue
            await self._socket.send_frame(self._outgoing.popleft(), WSMsgType.TEXT)

    async def read(self) -> None:
        """Until the gateway closes, or says what is no text."""
        async for frame in self._socket:
            if frame.type is not WSMsgType.TEXT:
                await self._socket.close(code=WSCloseCode.UNSUPPORTED_DATA)
                return
            self._handle(frame.data.encode())
            if len(self._outgoing) > _UNREAD_ANSWERS:
                self._emptied.clear()
                await self._emptied.wait()

    def _handle(self, line: bytes) -> None:
        ref = None
        try:
            members = read_object(line)
            if members.keys() == {"received"}:
                if not self._subscription.acknowledge(members["received"]):
                    self._talk.refuse(unknown_acknowledgement(), None)
                return
            message = TaggedMessage.model_validate(members)
            ref = message.ref
            self._talk.send(ref, lambda watch: self._router.from_gateway(self._agent, message, watch))
        except pydantic.ValidationError as error:
            self._talk.refuse(explain(error), ref)
        except IsolatorError as error:
            self._talk.refuse(error, ref)

    def _push(self, line: bytes) -> None:
        self._outgoing.append(line)
        self._filled.set()

    def _gone(self) -> None:
        self._is_over = True
        self._filled.set()
