"""Everything that must happen at a time, in one heap and one task: no timer per agent.

Times are Unix seconds, because deadlines survive a restart; a clock that jumps moves them with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import time
from collections.abc import Awaitable, Callable

Action = Callable[[], Awaitable[None]]
_log = logging.getLogger(__name__)
_LONGEST_SLEEP = 60.0


class Deadlines:
    """The heap. `run` is the task; `at` may be called before it runs."""

    def __init__(self) -> None:
        """Nothing is due."""
        self._heap: list[tuple[float, int, Action]] = []
        self._numbers = itertools.count()
        self._changed = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()

    def at(self, moment: float, action: Action) -> None:
        """Run `action` once, at `moment` or as soon after as the loop is free. It must bear being outdated."""
        heapq.heappush(self._heap, (moment, next(self._numbers), action))
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._changed.clear()
            now = time.time()
            while self._heap and self._heap[0][0] <= now:
                _, _, action = heapq.heappop(self._heap)
                task = asyncio.create_task(self._guarded(action))
                self._running.add(task)
                task.add_done_callback(self._running.discard)
            wait = min(_LONGEST_SLEEP, self._heap[0][0] - now) if self._heap else _LONGEST_SLEEP
            # Not wait_for: before Python 3.12 it can lose a cancellation that comes with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(wait, 0.001)):
                    await self._changed.wait()

    @staticmethod
    async def _guarded(action: Action) -> None:
        try:
            await action()
        except Exception:  # noqa: BLE001 - one deadline's defect must not stop the others
            _log.exception("a deadline's action failed")
