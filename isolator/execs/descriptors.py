"""Reading and writing pipes and terminals on the event loop, with nothing between the program and the reader.

A descriptor is watched only while somebody waits for it. Whoever does not read slows the program down, as a full
pipe does anywhere.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable

CHUNK = 256 * 1024
_ENDED = (errno.EIO,)  # what the controlling end of a terminal says when the other is closed


# What a pipe of ours may hold: so much is still read after the end, however much a child that stays writes on.
HELD = 1024 * 1024
# How often a terminal is looked at again that nobody in the box has open just now.
_LOOK = 0.05


async def _readable(descriptor: int, ended: asyncio.Future[tuple[int, int]]) -> None:
    """Wait until something can be read, or `ended` is done."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def wake(_: object = None) -> None:
        if not future.done():
            future.set_result(None)

    loop.add_reader(descriptor, wake)
    ended.add_done_callback(wake)
    try:
        await future
    finally:
        loop.remove_reader(descriptor)
        ended.remove_done_callback(wake)


async def _writable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    loop.add_writer(descriptor, lambda: None if future.done() else future.set_result(None))
    try:
        await future
    finally:
        loop.remove_writer(descriptor)


async def pump(
    descriptor: int, sink: Callable[[bytes], Awaitable[None]], ended: asyncio.Future[tuple[int, int]]
) -> None:
    """Pass on what is written, until the other side closes it, or `ended` is done and what was there then is read."""
    waited = True
    left = HELD
    while left > 0:
        try:
            data = os.read(descriptor, CHUNK)
        except BlockingIOError:
            if ended.done():
                return
            await _readable(descriptor, ended)
            waited = True
            continue
        except OSError as error:
            if error.errno not in _ENDED:
                raise
            if ended.done():
                return
            await asyncio.wait({ended}, timeout=_LOOK)  # it may be opened again
            continue
        if not data:
            return
        if ended.done():
            left -= len(data)
        if not waited:
            await asyncio.sleep(0)  # a program that never pauses must not keep the loop to itself
        waited = False
        await sink(data)


async def write_all(descriptor: int, data: bytes) -> None:
    """Write all of it, waiting while the program does not read.

    Raises:
        BrokenPipeError: nobody will read it any more.
    """
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            await _writable(descriptor)
        except OSError as error:
            if error.errno in _ENDED:
                raise BrokenPipeError(error.errno, "the terminal is closed") from error
            raise
