"""An engine that does not do what it is asked: a Unix socket in front of the real one that edits create calls.

Engines ignore what they do not know, some without a word. `forget` names HostConfig or Config fields that are taken
out of create calls; with `pretend`, inspect answers claim that they were honoured, as a lying engine's would.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

_INSPECT = re.compile(r"/containers/[^/?]+/json(\?|$)")


@dataclass
class Forgetful:
    """What to forget, and what was asked, field by field."""

    socket: Path
    forget: tuple[str, ...] = ()
    pretend: bool = False
    asked: dict[str, Any] = field(default_factory=dict)

    def edit_create(self, body: dict[str, Any]) -> dict[str, Any]:
        """The create call without what is forgotten."""
        for name in self.forget:
            for part in (body, body["HostConfig"]):
                if name in part:
                    self.asked[name] = part.pop(name)
        return body

    def edit_inspect(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The inspect answer as if nothing had been forgotten."""
        for name, value in self.asked.items():
            part = answer["Config"] if name in answer["Config"] else answer["HostConfig"]
            part[name] = value
        return answer


class _Upstream(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect("/var/run/docker.sock")


def _handler(engine: Forgetful) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def address_string(self) -> str:
            return "unix"

        def relay(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if "/containers/create" in self.path and engine.forget:
                body = json.dumps(engine.edit_create(json.loads(body))).encode()
            upstream = _Upstream("localhost", timeout=120)
            try:
                headers = {"Content-Type": "application/json"} if body else {}
                upstream.request(self.command, self.path, body or None, headers)
                self.answer(upstream.getresponse())
            finally:
                upstream.close()

        def answer(self, response: http.client.HTTPResponse) -> None:
            self.close_connection = True
            self.send_response_only(response.status)
            for name, value in response.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            if engine.pretend and engine.asked and _INSPECT.search(self.path) and response.status == 200:
                self.wfile.write(json.dumps(engine.edit_inspect(json.loads(response.read()))).encode())
                return
            with contextlib.suppress(OSError):
                while piece := response.read1(65536):
                    self.wfile.write(piece)
                    self.wfile.flush()

        do_GET = do_POST = do_DELETE = do_HEAD = relay  # noqa: N815

    return Handler


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@contextlib.contextmanager
def forgetful_engine(folder: Path) -> Iterator[Forgetful]:
    """A forgetful engine on a socket in `folder`; it forgets nothing until told to."""
    engine = Forgetful(folder / "engine.sock")
    server = _Server(str(engine.socket), _handler(engine))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield engine
    finally:
        server.shutdown()
        server.server_close()
        engine.socket.unlink()
