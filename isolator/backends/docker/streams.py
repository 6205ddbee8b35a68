"""The engine's endless answers (logs, events) as async iterators.

The SDK takes the socket's timeout off a stream, so an idle one would block its thread for ever: each stream has a
thread of its own, and closing it shuts the socket down under that thread. The queue between is small, so a slow
reader slows the engine's side instead of filling memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Protocol, TypeVar

import docker
from docker.types import CancellableStream

from isolator.backends.base import LogChunk
from isolator.backends.docker.engine import translate
from isolator.model.errors import IsolatorError, Unavailable

Item = TypeVar("Item")
Item_co = TypeVar("Item_co", covariant=True)
_QUEUE = 16
_HEADER = 8
_MAX_FRAME = 16 * 1024 * 1024


class Closable(Protocol[Item_co]):
    """A blocking iterator that another thread may close."""

    def __iter__(self) -> Iterator[Item_co]: ...

    def close(self) -> None:
        """Make the iterator end."""


async def iterate(  # noqa: C901 - the two sides of one queue read best together
    open_stream: Callable[[], Closable[Item]],
) -> AsyncIterator[Item]:
    """Items of a blocking stream, opened and read on a thread of its own.

    Raises:
        IsolatorError: what the engine's failure translates to.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Item | IsolatorError | None] = asyncio.Queue(_QUEUE)
    opened: list[Closable[Item]] = []
    closing = threading.Event()

    def put(item: Item | IsolatorError | None) -> None:
        waiting = asyncio.run_coroutine_threadsafe(queue.put(item), loop)
        while not closing.is_set():
            with contextlib.suppress(TimeoutError):
                waiting.result(timeout=0.5)
                return
        waiting.cancel()

    def pump() -> None:
        try:
            opened.append(open_stream())
            if closing.is_set():
                opened[0].close()
                return
            for item in opened[0]:
                if closing.is_set():
                    return
                put(item)
            put(None)
        except Exception as error:  # noqa: BLE001 - whatever broke the stream, its reader is told once
            with contextlib.suppress(Exception):
                put(_told(error))

    thread = threading.Thread(target=pump, name="isolator-stream", daemon=True)
    thread.start()
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, IsolatorError):
                raise item
            yield item
    finally:
        closing.set()
        for stream in opened:
            with contextlib.suppress(Exception):
                stream.close()


def _told(error: Exception) -> IsolatorError:
    try:
        return translate(error)
    except Exception:  # noqa: BLE001 - urllib3 and http.client raise their own kinds when a stream is cut
        return Unavailable("engine_unavailable", "The engine's stream was cut.", reason=type(error).__name__)


class LogStream:
    """A container's log as frames with their stream kept apart."""

    def __init__(self, client: docker.APIClient, box_id: str, *, follow: bool, tail: int | None) -> None:
        """Opens the request. Raises docker.errors.NotFound if the container is gone."""
        # The SDK's own logs() merges the two streams; the session it is built on gives them as they come.
        answer = client.get(
            f"{client.base_url}/v{client._version}/containers/{box_id}/logs",  # noqa: SLF001
            params={
                "stdout": 1,
                "stderr": 1,
                "follow": int(follow),
                "tail": "all" if tail is None else str(tail),
            },
            stream=True,
            timeout=(5, None),
        )
        client._raise_for_status(answer)  # noqa: SLF001 - maps the engine's answer to the SDK's errors
        self._cancellable: Any = CancellableStream(answer.iter_content(chunk_size=None), answer)

    def __iter__(self) -> Iterator[LogChunk]:
        """Frames as they arrive: u8 stream, 3 zero bytes, u32 length, payload."""
        buffer = bytearray()
        for piece in self._cancellable:
            buffer += piece
            while len(buffer) >= _HEADER:
                length = int.from_bytes(buffer[4:8], "big")
                if length > _MAX_FRAME:
                    raise Unavailable("engine_unavailable", "The engine's log is not in the form it promised.")
                if len(buffer) < _HEADER + length:
                    break
                payload = bytes(buffer[_HEADER : _HEADER + length])
                stream = "stderr" if buffer[0] == 2 else "stdout"
                del buffer[: _HEADER + length]
                if payload:
                    yield LogChunk("stderr" if stream == "stderr" else "stdout", payload)

    def close(self) -> None:
        """Cut the connection."""
        self._cancellable.close()
