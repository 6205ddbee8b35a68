"""HTTP on the agents' own sockets: what a program inside a box may ask, with curl or any HTTP client.

Who asks is the agent behind whose socket the connection came in; no header or field changes that. One request a
connection: this is the tongue for the odd message, lines of JSON are the one for many (isolator/messages/lines.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler

from isolator.api.messages import Outcome
from isolator.api.server import HTTP_LOG, of_http
from isolator.api.wire import check_query, json_answer, problem_answer, query_number, read_model
from isolator.messages.envelope import Address, too_large
from isolator.messages.progress import Peer
from isolator.messages.rate import Bucket
from isolator.messages.router import Router
from isolator.model.errors import Internal, IsolatorError, NotFound, TooLarge, TooMany
from isolator.model.message import AgentMessage

LONGEST_WAIT = 60.0
_LOOK = 1.0
_QUERIES = {"/v1/messages": frozenset({"wait"})}


class InsideServer:
    """Serves the HTTP visitors of all agents."""

    def __init__(self, router: Router, find: Callable[[str], Peer | None]) -> None:
        """Call `start` before `protocol`."""
        self._router = router
        self._find = find
        self._agents: dict[asyncio.Protocol, tuple[str, Bucket]] = {}
        application = web.Application(client_max_size=router.bounds.message + 1024, middlewares=[self._answer_problems])
        application.router.add_post("/v1/messages", self._send)
        application.router.add_get("/v1/messages", self._receive, allow_head=False)
        application.router.add_get("/v1/me", self._me, allow_head=False)
        self._runner = web.AppRunner(
            application,
            access_log=None,
            logger=HTTP_LOG,
            handle_signals=False,
            handler_cancellation=True,
            keepalive_timeout=router.bounds.patience,
            shutdown_timeout=1.0,
            lingering_time=1.0,
            auto_decompress=False,
        )

    async def start(self) -> None:
        """Ready for visitors."""
        await self._runner.setup()

    async def stop(self) -> None:
        """End what is under way."""
        await self._runner.cleanup()

    def protocol(self, agent: str, bucket: Bucket) -> asyncio.Protocol:
        """What speaks HTTP with one visitor of this agent."""
        server = self._runner.server
        assert server is not None
        protocol = server()
        self._agents[protocol] = (agent, bucket)
        return protocol

    def forget(self, protocol: asyncio.Protocol) -> None:
        """The visitor is gone."""
        self._agents.pop(protocol, None)

    @web.middleware
    async def _answer_problems(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            wait = self._agents[request.protocol][1].take(self._size(request))
            if wait:
                # The refusal comes when asking again makes sense: whoever asks without pause is slowed down.
                await asyncio.sleep(wait)
                raise TooMany("rate_limited", "That was too much at once: this was not done.", retry_after=wait)  # noqa: TRY301
            check_query(request, _QUERIES.get(request.path, frozenset()))
            response = await handler(request)
        except IsolatorError as error:
            response = problem_answer(error)
        except web.HTTPException as error:
            response = problem_answer(of_http(error, request))
        except ConnectionError:
            raise
        except Exception:  # noqa: BLE001 - whatever it is, the agent gets an answer and the log the truth
            HTTP_LOG.exception("%s %r of an agent failed", request.method, request.path)
            response = problem_answer(Internal("internal_error", "isolator made a mistake; its log says more."))
        response.force_close()
        return response

    def _size(self, request: web.Request) -> int:
        """How much its body will be; of one that does not tell (in chunks), the most it may be."""
        if request.content_length is not None:
            return request.content_length
        return self._router.bounds.message if request.body_exists else 0

    def _agent(self, request: web.Request) -> str:
        return self._agents[request.protocol][0]

    async def _send(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/messages."""
        wait = query_number(request, "wait", 0, LONGEST_WAIT) or 0
        bounds = self._router.bounds
        try:
            message = await read_model(request, AgentMessage, bounds.patience)
        except TooLarge:
            raise too_large(bounds) from None
        outcome = Outcome()
        outcome.ticket = self._router.from_agent(self._agent(request), message, outcome.watch)
        return await outcome.answer(wait)

    async def _receive(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/messages: one batch, as soon as there is any. What was written whole counts as received."""
        wait = query_number(request, "wait", 0, LONGEST_WAIT) or 0
        lines: list[bytes] = []
        arrived = asyncio.Event()

        def hand(line: bytes) -> None:
            lines.append(line)
            arrived.set()

        address = Address(self._agent(request), "agent")
        subscription = self._router.subscribe(address, hand, arrived.set)
        try:
            # Even who does not wait gets what is kept: that takes a look at the disk.
            await _within(max(wait, _LOOK) if self._router.kept(address) else wait, arrived)
            subscription.leave()
            body = b'{"items":[' + b",".join(lines) + b'],"next":null}'
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            response.content_length = len(body)
            response.force_close()
            await self._write(request, response, body)
            subscription.acknowledge_all()
            return response
        finally:
            subscription.close()

    async def _write(self, request: web.Request, response: web.StreamResponse, body: bytes) -> None:
        """Until all of it is on its way. Raises ConnectionError: it is not read, or nobody is there."""
        transport = request.transport
        assert isinstance(transport, asyncio.Transport)
        try:
            async with asyncio.timeout(self._router.bounds.patience):
                await response.prepare(request)
                await response.write(body)
                pause = 0.001
                while transport.get_write_buffer_size():
                    await asyncio.sleep(pause)
                    pause = min(0.1, pause * 2)
        except TimeoutError:
            transport.abort()
            raise ConnectionError("the visitor does not read") from None
        if transport.is_closing():
            raise ConnectionError("the visitor left")

    async def _me(self, request: web.Request) -> web.StreamResponse:
        """GET /v1/me."""
        peer = self._find(self._agent(request))
        if peer is None:
            raise NotFound("agent_not_found", "You are not there any more.")
        return json_answer({"id": peer.id, "name": peer.name, "team": peer.team})


async def _within(seconds: float, event: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return
