"""A file's content as an answer: small ones whole, large ones passed to the connection inside the kernel.

The server's own transport is asked for its socket's twin. While a handler runs nobody else writes to a connection,
so what the twin sends comes behind the headers, if all of these have left. A thread sends as long as the reader keeps
up; while it does not, the loop waits, and no thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Iterator

from aiohttp import hdrs, web

from isolator.files.reading import PIECE, OpenFile
from isolator.files.service import Files
from isolator.model.errors import IsolatorError, RangeRefused

READER_PATIENCE = 60.0
_ON_ITS_WAY = 1 << 20
_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})\Z", re.ASCII)


def wanted_range(header: str | None, size: int) -> tuple[int, int] | None:
    """First byte and number of bytes of a Range header; None for all of it.

    What is no single range of bytes is passed over, as HTTP allows.

    Raises:
        RangeRefused: `range_refused`.
    """
    found = _RANGE.match(header or "")
    if found is None or not any(found.groups()):
        return None
    first, last = found.groups()
    if not first:
        count = min(int(last), size)
        start = size - count
    else:
        start = int(first)
        end = min(int(last) + 1, size) if last else size
        if last and int(last) < start:
            return None
        count = end - start
    if count <= 0:
        raise RangeRefused("range_refused", f"The file has {size} bytes; that part of it is not there.", size=size)
    return start, count


async def answer_content(
    request: web.Request, files: Files, file: OpenFile, headers: dict[str, str]
) -> web.StreamResponse:
    """Answer an open file, or the part that Range asks for.

    Raises:
        RangeRefused: `range_refused`. ConnectionError: the reader is gone, or the file became shorter meanwhile.
    """
    size = file.facts.size
    condition = request.headers.get(hdrs.IF_RANGE)
    part = wanted_range(request.headers.get(hdrs.RANGE), size) if condition in (None, file.facts.etag) else None
    offset, count = part or (0, size)
    status = 200 if part is None else 206
    if part is not None:
        headers[hdrs.CONTENT_RANGE] = f"bytes {offset}-{offset + count - 1}/{size}"
    if file.content is not None:
        body = file.content[offset : offset + count]
        return web.Response(body=body, status=status, headers=headers, content_type="application/octet-stream")
    response = web.StreamResponse(status=status, headers=headers)
    response.content_type = "application/octet-stream"
    response.content_length = count
    await response.prepare(request)
    try:
        await _send(request, response, files, file, offset, count)
    except (EOFError, OSError, IsolatorError) as error:
        # The rest is not there: the connection ends before the length that was told, which no reader takes for whole.
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the file could not be sent to its end") from error
    await response.write_eof()
    return response


async def _send(
    request: web.Request, response: web.StreamResponse, files: Files, file: OpenFile, offset: int, count: int
) -> None:
    transport = request.transport
    shared = None if transport is None else transport.get_extra_info("socket")
    if transport is None or shared is None:
        raise ConnectionResetError
    sent = 0
    if transport.get_write_buffer_size() == 0:
        with shared.dup() as twin, _roomy(twin):
            sent = await _send_directly(files, file, twin, offset, count)
    while sent < count:
        piece = await files.read(file, offset + sent, min(PIECE, count - sent))
        if not piece:
            raise EOFError
        async with asyncio.timeout(READER_PATIENCE):
            await response.write(piece)
        sent += len(piece)


@contextlib.contextmanager
def _roomy(connection: socket.socket) -> Iterator[None]:
    """Let more be on its way while a file is sent: sender and reader then wait for each other a tenth as often.

    What is on its way are the file's own pages, not copies. The kernel's wmem_max is the most it gives.
    """
    before = connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ON_ITS_WAY)
    try:
        yield
    finally:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, before // 2)  # the kernel tells twice what was set


async def _send_directly(files: Files, file: OpenFile, twin: socket.socket, offset: int, count: int) -> int:
    """Send by the kernel; how many bytes: fewer than `count` where it can't do that for this file."""
    sent = 0
    while sent < count:
        try:
            done = await files.send(file, twin, offset + sent, count - sent)
        except ConnectionError:
            raise
        except OSError:
            return sent
        if done == 0 or sent + done < count:
            await _until_writable(twin)
        sent += done
    return sent


async def _until_writable(twin: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(twin.fileno(), ready.set)
    try:
        await asyncio.wait_for(ready.wait(), READER_PATIENCE)
    finally:
        loop.remove_writer(twin.fileno())
