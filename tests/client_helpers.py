"""A server on a Unix socket that speaks the API's words as a test tells it to, cut off and odd ones included."""

from __future__ import annotations

import contextlib
import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

AGENT_ID = "abcdefghjkmnpqrs"


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


class Talk(BaseHTTPRequestHandler):
    """What a route gets: helpers to answer whole, in pieces, or not to the end."""

    protocol_version = "HTTP/1.1"
    server: StandIn

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *args: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, BrokenPipeError):
            super().handle()

    def _serve(self) -> None:
        address = urlsplit(self.path)
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = Asked(
            self.command,
            address.path,
            {key: values[0] for key, values in parse_qs(address.query, keep_blank_values=True).items()},
            {key.lower(): value for key, value in self.headers.items()},
            json.loads(text) if text else None,
        )
        self.server.asked.append(asked)
        route = self.server.routes.get((self.command, address.path))
        if route is None:
            self.problem(404, "not_found", f"no route {self.command} {address.path}")
        else:
            route(self, asked)

    do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 - http.server's names

    def answer(self, body: Any, status: int = 200) -> None:
        self.raw(json.dumps(body).encode(), status)

    def raw(self, body: bytes, status: int = 200, kind: str = "application/json", length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def problem(self, status: int, code: str, detail: str, **fields: Any) -> None:
        body = {"type": f"urn:isolator:error:{code}", "title": "T", "status": status, "detail": detail, "code": code}
        self.raw(json.dumps({**body, **fields}).encode(), status, "application/problem+json")

    def chunks(self, pieces: list[bytes], kind: str = "application/octet-stream", *, whole: bool = True) -> None:
        """A chunked body; `whole` False hangs up before its end."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in pieces:
            self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            self.wfile.flush()
        if whole:
            self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True


Route = Callable[[Talk, Asked], None]


@dataclass
class _State:
    routes: dict[tuple[str, str], Route] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)


class StandIn(socketserver.ThreadingUnixStreamServer):
    """The server. `routes` maps (method, path) to what answers; `asked` is what came, in order."""

    daemon_threads = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = _State()
        super().__init__(str(path), Talk)

    @property
    def routes(self) -> dict[tuple[str, str], Route]:
        return self._state.routes

    @property
    def asked(self) -> list[Asked]:
        return self._state.asked

    def on(self, method: str, path: str, body: Any, status: int = 200) -> None:
        """A route that always gives this JSON."""
        self.routes[method, path] = lambda talk, _: talk.answer(body, status)


@contextlib.contextmanager
def serving(path: Path) -> Iterator[StandIn]:
    path.unlink(missing_ok=True)
    server = StandIn(path)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


def agent(**changes: Any) -> dict[str, Any]:
    """An agent as the daemon tells it."""
    return {
        "id": AGENT_ID,
        "name": "worker",
        "team": "red",
        "owner": "uid:0",
        "session": None,
        "parent": None,
        "backend": "docker",
        "image": "isolator/agent-python",
        "image_digest": "sha256:" + "0" * 64,
        "command": ["python3", "-V"],
        "state": "running",
        "network": "team",
        "uid": 10001,
        "gid": 10001,
        "limits": {"cpus": 1.0, "memory": 536870912, "pids": 256, "disk": 67108864, "nofile": 4096, "wall": None},
        "mounts": [{"source": "/srv/x", "target": "/workspace", "mode": "rw"}],
        "secrets": [{"name": "key", "as": "file"}],
        "created_at": "2026-01-01T00:00:00.000000Z",
        "started_at": None,
        "finished_at": None,
        "expires_at": None,
        "exit": None,
        "container_id": "c" * 64,
        "pid": 1234,
        "warm": False,
        "warnings": [],
        "receipt": {"seccomp": {"held": True, "how": "our own list"}, "lsm": {"held": False, "how": "none here"}},
        **changes,
    }


def ended(reason: str = "exited", code: int | None = 0, signal: int | None = None, **changes: Any) -> dict[str, Any]:
    """The same agent when it has ended."""
    exit_ = {"code": code, "signal": signal, "reason": reason, "detail": None}
    return agent(state="exited", exit=exit_, **changes)


def frame(stream: int, payload: bytes) -> bytes:
    return bytes((stream, 0, 0, 0)) + len(payload).to_bytes(4, "big") + payload


def event(number: int, kind: str = "agent.started") -> bytes:
    data = {"id": number, "time": "2026-01-01T00:00:00Z", "type": kind, "team": "red", "agent": "a", "data": {"n": 1}}
    return f"id: {number}\nevent: {kind}\ndata: {json.dumps(data)}\n\n".encode()
