"""What must be finished once it is begun."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

Result = TypeVar("Result")


async def uninterrupted(work: Awaitable[Result]) -> Result:
    """Wait for `work` to its end, however often the waiting is cancelled; then the cancellation goes on.

    A shield alone protects the work but not the order: whoever is cancelled a second time would go on while the
    work still runs, and would find what it was about to clear away.

    Raises:
        Whatever `work` raises; CancelledError if the waiting was cancelled, whatever became of the work.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # seen: the loop need not tell of it
    raise cancelled
