"""The threads that touch agents' files. They are their own, so that a slow disk holds up nobody else's work."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from isolator.model.errors import TooMany, Unavailable

Result = TypeVar("Result")

WORKERS = 4
MOST_WAITING = 64
PATIENCE = 30.0


class FileThreads:
    """Runs steps, a few at a time; a bounded number waits."""

    def __init__(self) -> None:
        """The threads start when they are needed."""
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="isolator-files")
        self._under_way = 0

    async def run(self, step: Callable[[], Result], discard: Callable[[Result], None] | None = None) -> Result:
        """The result of one step. If nobody waits for it any more when it comes, `discard` gets it.

        Raises:
            TooMany: `files_busy`. Unavailable: `files_unavailable`: it took too long; it may still happen.
            And what the step raises.
        """
        if self._under_way >= WORKERS + MOST_WAITING:
            raise TooMany("files_busy", "Too many calls for files wait already.", retry_after=1)
        self._under_way += 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, step)
        future.add_done_callback(self._ended)
        try:
            await asyncio.wait({future}, timeout=PATIENCE)
        except asyncio.CancelledError:
            self._abandon(future, discard)
            raise
        if not future.done():
            self._abandon(future, discard)
            raise Unavailable("files_unavailable", f"The file system did not answer within {PATIENCE:.0f} s.")
        return future.result()

    def later(self, step: Callable[[], object]) -> None:
        """Run a step that lets go of something; nobody waits for it."""
        with contextlib.suppress(RuntimeError):  # closed: the process ends, and lets go of all
            self._pool.submit(step)

    def close(self) -> None:
        """Take no more; what runs is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ended(self, _: asyncio.Future[Result]) -> None:
        self._under_way -= 1

    def _abandon(self, future: asyncio.Future[Result], discard: Callable[[Result], None] | None) -> None:
        def look(ended: asyncio.Future[Result]) -> None:
            if not ended.cancelled() and ended.exception() is None and discard is not None:
                result = ended.result()
                self.later(lambda: discard(result))

        future.add_done_callback(look)
