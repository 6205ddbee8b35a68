"""Files in agents' mounts, for the loop: each call is made of steps on threads, and holds nothing when it is left."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

from isolator.cancellation import uninterrupted
from isolator.files import reading, removing, writing
from isolator.files.facts import FileFacts
from isolator.files.paths import Names, locate
from isolator.files.reading import OpenFile
from isolator.files.roots import Target
from isolator.files.threads import FileThreads
from isolator.files.writing import Commits, Copy, Upload, WriteOptions
from isolator.model.agent import Agent
from isolator.model.errors import Conflict, TooMany

MOST_UPLOADS = 32
MOST_DOWNLOADS = 64
REMOVE_TIME = 60.0

Finish = Callable[[Awaitable[tuple[FileFacts, bool]]], Awaitable[tuple[FileFacts, bool]]]


class Files:
    """All calls for files. `target` says which; it is made anew for each call."""

    def __init__(self) -> None:
        """Nothing is open."""
        self._threads = FileThreads()
        self._commits = Commits()
        self._uploads = asyncio.Semaphore(MOST_UPLOADS)
        self._downloads = asyncio.Semaphore(MOST_DOWNLOADS)

    def close(self) -> None:
        """End the threads."""
        self._threads.close()

    @staticmethod
    def target(agent: Agent, names: Names) -> Target:
        """The place of a path in a running agent.

        Raises:
            Forbidden: `file_outside_mounts`.
        """
        return Target(agent, locate(names, agent.spec.mounts))

    # reading

    async def look(self, target: Target, *, follow: bool) -> FileFacts:
        """The facts of a place; with `follow`, of what a link leads to."""
        return await self._threads.run(functools.partial(reading.look, target, follow=follow))

    async def list_mounts(self, agent: Agent) -> bytes:
        """The mounts, as a list in JSON."""
        return await self._threads.run(functools.partial(reading.list_mounts, agent))

    async def list_folder(self, target: Target) -> bytes:
        """A folder's entries, as a list in JSON."""
        return await self._threads.run(functools.partial(reading.list_folder, target))

    @contextlib.asynccontextmanager
    async def open(self, target: Target) -> AsyncIterator[OpenFile]:
        """A plain file, open until the end of the block. One that is not small counts as a download."""
        file = await self._threads.run(functools.partial(OpenFile, target), OpenFile.close)
        if file.content is not None:
            yield file
            return
        try:
            async with _counted(self._downloads, "downloads"):
                yield file
        finally:
            self._threads.later(file.close)

    async def read(self, file: OpenFile, offset: int, size: int) -> bytes:
        """A piece of an open file."""
        return await self._threads.run(functools.partial(file.read, offset, size))

    async def send(self, file: OpenFile, connection: socket.socket, offset: int, size: int) -> int:
        """Pass bytes to a connection while its reader keeps up; how many. The connection is not used after it."""
        step = functools.partial(file.send, connection, offset, size)
        return await uninterrupted(self._threads.run(step))

    # changing

    def uploading(self) -> contextlib.AbstractAsyncContextManager[None]:
        """A place among those who may send at the same time. Raises TooMany: `files_busy`."""
        return _counted(self._uploads, "uploads")

    async def write_small(self, target: Target, options: WriteOptions, content: bytes) -> tuple[FileFacts, bool]:
        """A whole file in one step; its facts and whether it is new."""

        def step() -> tuple[FileFacts, bool]:
            upload = Upload(target, options, self._commits)
            try:
                upload.write(content)
                return upload.commit()
            finally:
                upload.abort()

        return await self._threads.run(step)

    @contextlib.asynccontextmanager
    async def upload(self, target: Target, options: WriteOptions) -> AsyncIterator[Upload]:
        """A file on its way, until the end of the block; what was not committed by then leaves no trace."""
        upload = await self._threads.run(functools.partial(Upload, target, options, self._commits), Upload.abort)
        try:
            yield upload
        finally:
            self._threads.later(upload.abort)

    async def add(self, upload: Upload, data: bytes) -> None:
        """Write bytes at its end."""
        await self._threads.run(functools.partial(upload.write, data))

    async def commit(self, upload: Upload | Copy) -> tuple[FileFacts, bool]:
        """Give it its name."""
        return await self._threads.run(upload.commit)

    async def copy(
        self, source: Target, target: Target, options: WriteOptions, finish: Finish
    ) -> tuple[FileFacts, bool]:
        """Copy a plain file; `finish` is handed the last step, the one that shows."""
        begin = functools.partial(Copy, source, target, options, self._commits)
        async with _counted(self._uploads, "uploads"):
            copying = await self._threads.run(begin, Copy.abort)
            try:
                while await self._threads.run(copying.step):
                    pass
                return await finish(self.commit(copying))
            finally:
                self._threads.later(copying.abort)

    async def make_folder(self, target: Target, *, parents: bool) -> tuple[FileFacts, bool]:
        """Make a folder; its facts and whether it is new."""
        return await self._threads.run(functools.partial(writing.make_folder, target, parents=parents))

    async def rename(self, source: Target, target: Target, *, replace: bool) -> FileFacts:
        """Rename within one mount."""
        return await self._threads.run(functools.partial(writing.rename, source, target, replace=replace))

    async def remove(self, target: Target, *, recursive: bool) -> None:
        """Remove; a tree in steps, between which whoever hangs up ends it."""
        try:
            async with asyncio.timeout(REMOVE_TIME):
                while not await self._threads.run(functools.partial(removing.remove, target, recursive=recursive)):
                    pass
        except TimeoutError:
            raise Conflict(
                "folder_not_empty", f"{target.place.text[:256]} is large, or being filled; a part of it is left."
            ) from None


@contextlib.asynccontextmanager
async def _counted(places: asyncio.Semaphore, what: str) -> AsyncIterator[None]:
    if places.locked():
        raise TooMany("files_busy", f"Too many {what} are under way.", retry_after=1)
    async with places:
        yield
