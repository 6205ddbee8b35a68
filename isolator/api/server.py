"""The HTTP server on its Unix socket: the route table made real, with every refusal a problem+json.

Connections are counted before they are served, a request must arrive whole within its time, and a caller who
hangs up cancels what was done for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
from pathlib import Path

from aiohttp import http_exceptions, web
from aiohttp.typedefs import Handler

from isolator.api import openapi
from isolator.api.access import caller_of
from isolator.api.parts import PARTS, Parts
from isolator.api.route import Route
from isolator.api.routes import ROUTES
from isolator.api.wire import check_query, problem_answer
from isolator.model.errors import Forbidden, Internal, IsolatorError, NotFound, Unavailable

_log = logging.getLogger(__name__)
HTTP_LOG = logging.getLogger("isolator.http")
_BACKLOG = 256
# The HTTP layer waits so long twice: for answers, then for those it has broken off.
_SHUTDOWN = 2.5
# How long the rest of a refused request is still read, so that its sender gets to read the answer.
_LINGER = 1.0


def _is_ours(record: logging.LogRecord) -> bool:
    """Whether a failure in the HTTP layer may be a defect.

    What is no HTTP at all is its sender's, who was told; a connection that broke is whoever's left it.
    """
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or not issubclass(kind, (http_exceptions.HttpProcessingError, ConnectionError))


# Any peer could fill the log otherwise, a traceback for each line of rubbish.
HTTP_LOG.addFilter(_is_ours)


def build_application(parts: Parts) -> web.Application:
    """The application with every route of the table."""
    application = web.Application(client_max_size=parts.settings.max_body, middlewares=[_answer_problems])
    application[PARTS] = parts
    application[openapi.ROUTES] = ROUTES
    for route in ROUTES:
        application.router.add_route(route.method, route.pattern, _guarded(route))
    return application


def _guarded(route: Route) -> Handler:
    known = frozenset(route.query)

    async def handle(request: web.Request) -> web.StreamResponse:
        caller = caller_of(request)
        await route.access.check(request, caller)
        check_query(request, known)
        return await route.handler(request)

    return handle


@web.middleware
async def _answer_problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        response = await handler(request)
    except IsolatorError as error:
        if isinstance(error, Forbidden):
            await _note_refusal(request, error)
        response = problem_answer(error)
    except web.HTTPException as error:
        response = problem_answer(of_http(error, request))
    except ConnectionError:
        raise
    except Exception:  # noqa: BLE001 - whatever it is, the caller gets an answer and the log the truth
        _log.exception("%s %r failed", request.method, request.path)
        response = problem_answer(
            Internal("internal_error", "isolator made a mistake; its log says more. Nothing was acknowledged.")
        )
    resource = request.match_info.route.resource
    pattern = resource.canonical if resource is not None else "none"
    request.app[PARTS].metrics.requests.labels(request.method, pattern, str(response.status)).inc()
    return response


async def _note_refusal(request: web.Request, error: Forbidden) -> None:
    """Refusals by policy are security-relevant: they are in the audit log, where it can be written."""
    with contextlib.suppress(IsolatorError):
        await request.app[PARTS].audit.note(
            "request.refused", caller_of(request), code=error.code, route=f"{request.method} {request.path}"
        )


class _MethodRefused(IsolatorError):
    status = 405
    title = "Method not allowed"


def of_http(error: web.HTTPException, request: web.Request) -> IsolatorError:
    """A refusal of aiohttp's own as one of ours."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = sorted(error.allowed_methods)
        return _MethodRefused(
            "method_not_allowed", f"{request.method} is not for this path; {', '.join(allowed)} are.", allowed=allowed
        )
    if isinstance(error, web.HTTPNotFound):
        return NotFound("route_not_found", "There is no such path. GET /v1/openapi.json lists them.")
    problem = IsolatorError("http_error", error.reason)
    problem.status = error.status
    return problem


class _Busy(asyncio.Protocol):
    """A connection too many: closed at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


class ApiServer:
    """Serves an application on one or more listening Unix sockets."""

    def __init__(self, parts: Parts) -> None:
        """Nothing listens yet."""
        self._parts = parts
        self._runner = web.AppRunner(
            build_application(parts),
            access_log=None,
            logger=HTTP_LOG,
            handle_signals=False,
            handler_cancellation=True,
            keepalive_timeout=parts.settings.request_timeout,
            shutdown_timeout=_SHUTDOWN,
            lingering_time=_LINGER,
            auto_decompress=False,
        )
        self._servers: list[asyncio.Server] = []

    async def start(self, listeners: list[socket.socket]) -> None:
        """Serve on these sockets."""
        await self._runner.setup()
        server = self._runner.server
        assert server is not None
        most = self._parts.settings.max_connections

        def protocol() -> asyncio.Protocol:
            return _Busy() if len(server.connections) >= most else server()

        loop = asyncio.get_running_loop()
        for listener in listeners:
            self._servers.append(await loop.create_unix_server(protocol, sock=listener, backlog=_BACKLOG))

    async def stop(self) -> None:
        """Stop accepting, end what is under way."""
        for server in self._servers:
            server.close()
        await self._runner.cleanup()


def open_socket(path: Path, group: int | None) -> socket.socket:
    """A listening socket at `path`, mode 0660, of that group.

    A socket file of a daemon that is gone is replaced; one that answers is not.

    Raises:
        Unavailable: `socket_in_use`, `socket_unsafe`.
    """
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    _refuse_foreign_folder(path.parent)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise Unavailable("socket_unsafe", f"{path} is there and is no socket. Move it away.")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knocking:
            knocking.settimeout(1.0)
            try:
                knocking.connect(str(path))
            except (ConnectionRefusedError, FileNotFoundError):
                path.unlink(missing_ok=True)
            except OSError as error:
                raise Unavailable("socket_in_use", f"Another daemon is behind {path}, and busy.") from error
            else:
                raise Unavailable("socket_in_use", f"Another daemon answers at {path}.")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Nobody may connect between bind and chmod: the file is born closed.
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise Unavailable("socket_unsafe", f"Can't listen at {path}: {error.strerror}.") from error
    finally:
        os.umask(mask)
    if group is not None:
        with contextlib.suppress(PermissionError):
            os.chown(path, -1, group)
    path.chmod(0o660)
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


def _refuse_foreign_folder(folder: Path) -> None:
    facts = folder.stat()
    foreign = facts.st_uid not in (0, os.geteuid())
    writable = facts.st_mode & 0o022 and not facts.st_mode & stat.S_ISVTX
    if foreign or writable:
        raise Unavailable(
            "socket_unsafe",
            f"Others could replace a socket in {folder}. Use a folder of root's or your own, mode 0755.",
        )
