"""WebSocket servers on a Unix socket: aiohttp's for the truth, and one that sends whatever bytes a test wants."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from aiohttp import web

PROTOCOL = "v5.channel.k8s.io"
Talk = Callable[[web.WebSocketResponse], Awaitable[None]]


@contextlib.contextmanager
def speaking(path: Path, talk: Talk, **options: object) -> Iterator[None]:
    """A server whose every WebSocket is handed to `talk`; asked for anything else, it tells of an agent."""
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    stop = asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        if "Upgrade" not in request.headers:
            return web.json_response({"id": request.path.rpartition("/")[2], "state": "running"})
        answer = web.WebSocketResponse(protocols=(PROTOCOL,), max_msg_size=4 << 20, **options)  # type: ignore[arg-type]
        await answer.prepare(request)
        await talk(answer)
        return answer

    async def serve() -> None:
        application = web.Application()
        application.router.add_get("/{path:.*}", handle)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        await web.UnixSite(runner, str(path)).start()
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


@contextlib.contextmanager
def saying(path: Path, words: bytes, *, accept: str | None = None, protocol: str = PROTOCOL) -> Iterator[list[bytes]]:
    """A server that upgrades one connection and at once says `words`, then hangs up. Gives what it was told."""
    told: list[bytes] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            with connection:
                asked = b""
                while b"\r\n\r\n" not in asked:
                    asked += connection.recv(65536)
                told.append(asked)
                key = asked.partition(b"Sec-WebSocket-Key: ")[2].partition(b"\r\n")[0]
                proof = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
                shown = accept if accept is not None else base64.b64encode(proof).decode()
                head = (
                    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                    f"Sec-WebSocket-Accept: {shown}\r\nSec-WebSocket-Protocol: {protocol}\r\n\r\n"
                )
                connection.sendall(head.encode() + words)
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(5)
                while piece := connection.recv(65536):
                    told.append(piece)

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield told
        thread.join(10)
