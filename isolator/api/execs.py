"""Routes of commands in a running agent's box: run to the end, or exec with streams passed while it runs.

The WebSocket speaks the Kubernetes remote-command channels (`v5.channel.k8s.io`). The first text message is the
request; the last message is the status. Neither side is pinged: a hang-up on a Unix socket is seen at once, and
whoever does not read for an hour is no less there.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import select
import signal
import socket
from typing import Any

from aiohttp import WSMsgType, web

from isolator.api.access import caller_of
from isolator.api.parts import PARTS, Parts
from isolator.api.wire import json_answer, parse_model, read_model
from isolator.execs.descriptors import write_all
from isolator.execs.execution import Execution, Outcome
from isolator.execs.service import refuse_not_running
from isolator.model.errors import BadRequest, Internal, IsolatorError, UpgradeRequired
from isolator.model.identity import Principal
from isolator.model.request import ExecRequest, RunRequest, TerminalSize

_log = logging.getLogger(__name__)

STDIN, STDOUT, STDERR, STATUS, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255
PROTOCOLS = ("v5.channel.k8s.io",)
MAX_MESSAGE = 1024 * 1024 + 1
# Bytes of standard input that are held while the program does not read; each message counts for more than its own.
_HELD = 1024 * 1024
_MESSAGE_COST = 256
_LOOK = 0.5


async def run(request: web.Request) -> web.StreamResponse:
    """POST /v1/agents/{agent}/run."""
    parts, caller = request.app[PARTS], caller_of(request)
    body = await read_model(request, RunRequest, parts.settings.request_timeout)
    live = refuse_not_running(parts.lifecycle.find(request.match_info["agent"]))
    ended, stdout, stderr = await parts.execs.run(live, body, _decoded(body.stdin), caller)
    return json_answer(
        {
            **_figures(ended),
            "stdout": base64.b64encode(stdout).decode(),
            "stderr": base64.b64encode(stderr).decode(),
            "duration": round(ended.duration, 6),
        }
    )


def _decoded(text: str | None) -> bytes:
    try:
        return base64.b64decode(text or "", validate=True)
    except ValueError:  # binascii.Error is one; text that is not ASCII is another
        raise BadRequest("invalid_request", "stdin: it is not base64.") from None


def _figures(ended: Outcome) -> dict[str, Any]:
    return {
        "exit_code": ended.exit_code,
        "signal": ended.signal,
        "timed_out": ended.timed_out,
        "oom_killed": ended.oom_killed,
        "truncated": ended.truncated,
    }


async def execute(request: web.Request) -> web.StreamResponse:
    """GET /v1/agents/{agent}/exec, a WebSocket."""
    parts, caller = request.app[PARTS], caller_of(request)
    agent = request.match_info["agent"]
    socket_ = web.WebSocketResponse(protocols=PROTOCOLS, max_msg_size=MAX_MESSAGE, compress=False, timeout=2.0)
    if not socket_.can_prepare(request).ok:
        raise UpgradeRequired("upgrade_required", "This address is a WebSocket; see docs/api.md, or POST …/run.")
    refuse_not_running(parts.lifecycle.find(agent))
    await socket_.prepare(request)
    conversation = _Conversation(parts, request, socket_)
    try:
        status = await conversation.hold(agent, caller)
    except IsolatorError as error:
        status = _refused(error)
    except (ConnectionError, _HungUp):
        return socket_  # nobody is there to be told
    except Exception:  # noqa: BLE001 - the answer has begun: nobody above can say it any more
        _log.exception("an exec in agent %s failed", agent)
        status = _refused(Internal("internal_error", "isolator made a mistake; its log says more."))
    with contextlib.suppress(ConnectionError):
        await socket_.send_bytes(bytes((STATUS,)) + json.dumps(status).encode())
        await socket_.close()
    return socket_


class _HungUp(Exception):
    """The caller is gone."""


class _Conversation:
    """One exec's WebSocket."""

    def __init__(self, parts: Parts, request: web.Request, channel: web.WebSocketResponse) -> None:
        self._parts = parts
        self._channel = channel
        transport = request.transport
        self._connection: socket.socket | None = None if transport is None else transport.get_extra_info("socket")
        self._input: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._held = 0
        self._closed = False
        self._room = asyncio.Event()
        self._room.set()

    async def hold(self, agent: str, caller: Principal) -> dict[str, Any]:
        """From the request to the status."""
        body = await self._request()
        live = refuse_not_running(self._parts.lifecycle.find(agent))
        async with self._parts.execs.open(live, body, caller) as execution:
            await self._channel.send_str(json.dumps({"started": {"pid": execution.pid}}))
            feeding = asyncio.create_task(self._feed(execution))
            listening = asyncio.create_task(self._listen(execution))
            passing = asyncio.create_task(
                self._parts.execs.until_ended(execution, execution.pass_output(self._say), body.timeout)
            )
            try:
                await asyncio.wait({listening, passing}, return_when=asyncio.FIRST_COMPLETED)
                if not passing.done():
                    listening.result()
                    raise _HungUp
                passing.result()
            finally:
                for task in (feeding, listening, passing):
                    task.cancel()
                await asyncio.gather(feeding, listening, passing, return_exceptions=True)
            return _status(execution.outcome())

    async def _request(self) -> ExecRequest:
        try:
            message = await self._channel.receive(self._parts.settings.request_timeout)
        except TimeoutError:
            raise BadRequest("invalid_request", "No exec request came: send it as the first, a text message.") from None
        if message.type in (WSMsgType.CLOSE, WSMsgType.CLOSING, WSMsgType.CLOSED, WSMsgType.ERROR):
            raise _HungUp
        if message.type != WSMsgType.TEXT:
            raise BadRequest("invalid_request", "The first message must be the exec request, as text.")
        return parse_model(message.data, ExecRequest)

    async def _say(self, stream: int, data: bytes) -> None:
        await self._channel.send_bytes(bytes((stream,)) + data)

    async def _feed(self, execution: Execution) -> None:
        """Hand on what is typed; a program that does not read holds up its own input only."""
        while True:
            data = await self._input.get()
            if data is None:
                execution.stdio.close_stdin()
                return
            try:
                if execution.stdio.stdin >= 0:
                    await write_all(execution.stdio.stdin, data)
            except BrokenPipeError:
                # Nobody will read it: whoever writes may know, as from any pipe.
                execution.stdio.close_stdin()
                with contextlib.suppress(ConnectionError):
                    await self._channel.send_bytes(bytes((CLOSE, STDIN)))
            self._held -= len(data) + _MESSAGE_COST
            if self._held <= _HELD:
                self._room.set()

    async def _listen(self, execution: Execution) -> None:
        """Take what the caller says until they hang up."""
        async for message in self._channel:
            if message.type == WSMsgType.TEXT:
                _control(execution, message.data)
            elif message.type == WSMsgType.BINARY and message.data:
                await self._take(execution, message.data[0], message.data[1:])

    async def _take(self, execution: Execution, stream: int, data: bytes) -> None:
        if stream == STDIN and data and not self._closed:
            self._held += len(data) + _MESSAGE_COST
            self._input.put_nowait(data)
            if self._held > _HELD:
                self._room.clear()
                await self._until_room()
        elif stream == RESIZE:
            size = parse_model(data, TerminalSize)
            execution.stdio.resize(size.width, size.height)
        elif stream == CLOSE and data[:1] == bytes((STDIN,)) and not self._closed:
            self._closed = True
            self._input.put_nowait(None)
        elif stream == CLOSE and data[:1] in (bytes((STDOUT,)), bytes((STDERR,))):
            execution.close_output(data[0])

    async def _until_room(self) -> None:
        """Read no further meanwhile; but somebody who hangs up while nothing is read is not noticed by itself."""
        while not self._room.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._room.wait(), _LOOK)
            if self._is_hung_up():
                raise _HungUp

    def _is_hung_up(self) -> bool:
        if self._connection is None or self._connection.fileno() < 0:
            return True
        looking = select.poll()
        looking.register(self._connection.fileno(), select.POLLRDHUP)
        return bool(looking.poll(0))


def _control(execution: Execution, text: str) -> None:
    """A text message: `{"signal": "SIGTERM"}` or a number."""
    try:
        wanted = json.loads(text)["signal"]
        if isinstance(wanted, bool):
            return
        number = signal.Signals(wanted) if isinstance(wanted, int) else signal.Signals[wanted]
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    execution.send_signal(int(number))


def _status(ended: Outcome) -> dict[str, Any]:
    """The status as Kubernetes writes it, and what it has no words for."""
    if ended.exit_code == 0 and ended.reason is None:
        return {"status": "Success", **_figures(ended)}
    reasons = {"timeout": "Timeout", "agent-ended": "AgentEnded"}
    return {
        "status": "Failure",
        "reason": reasons.get(ended.reason or "", "NonZeroExitCode"),
        "message": f"command terminated with exit code {ended.exit_code}",
        "details": {"causes": [{"reason": "ExitCode", "message": str(ended.exit_code)}]},
        **_figures(ended),
    }


def _refused(error: IsolatorError) -> dict[str, Any]:
    return {
        "reason": error.title.title().replace(" ", ""),
        "message": error.detail,
        "exit_code": None,
        "signal": None,
        "timed_out": False,
        "oom_killed": False,
        "truncated": False,
        **error.problem(),
        "http_status": error.status,
        "status": "Failure",
    }
