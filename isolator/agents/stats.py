"""Use of agents against their limits, for whoever watches.

A reading is a good dozen of small files of the kernel, read on threads of its own. Callers share it: an agent is
read at most five times a second, however many ask. The share of CPU is what was used between two readings; where the
last one is too old to tell of now, two are made a moment apart.

The readings lie in the agent's own memory here, and go with it.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from isolator.agents.live import LiveAgent
from isolator.host.usage import Space, Usage, read_usage
from isolator.model.agent import Agent, timestamp
from isolator.model.errors import TooMany, Unavailable

Result = TypeVar("Result")
Figures = dict[str, Any]

WORKERS = 2
MOST_WAITING = 64
PATIENCE = 5.0
_PIECE = 16
# Between the two readings of a first call; a reading that is younger than _FRESH is given again, and one that is
# older than _OLDEST tells nothing of now.
_SAMPLE = 0.25
_FRESH = 0.2
_OLDEST = 30.0


class Stats:
    """Reads what agents use."""

    def __init__(self) -> None:
        """The threads start when they are needed."""
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="isolator-stats")
        self._under_way = 0

    def close(self) -> None:
        """Take no more; what runs is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def refresh(self, agents: Sequence[LiveAgent]) -> list[LiveAgent]:
        """Have figures that are fresh; those agents whose box is there.

        Raises:
            TooMany: `stats_busy`. Unavailable: `stats_unavailable`.
        """
        await self._read([live for live in agents if _age(live.usage) > _OLDEST])
        if any(live.usage is not None and live.usage_before is None for live in agents):
            await asyncio.sleep(_SAMPLE)
        await self._read([live for live in agents if live.usage is not None and _age(live.usage) > _FRESH])
        return [live for live in agents if live.usage is not None and live.running]

    async def _read(self, agents: Sequence[LiveAgent]) -> None:
        """A few at a time, so that whoever asks for one does not wait for all."""
        for start in range(0, len(agents), _PIECE):
            piece = agents[start : start + _PIECE]
            readings = await self._run(functools.partial(_read_boxes, [live.record for live in piece]))
            for live, usage in zip(piece, readings, strict=True):
                if usage is None:
                    live.usage = live.usage_before = None
                elif live.usage is None or usage.moment - live.usage.moment > _FRESH:  # else another caller was here
                    live.usage_before = None if _age(live.usage) > _OLDEST else live.usage
                    live.usage = usage

    async def _run(self, work: Callable[[], Result]) -> Result:
        if self._under_way >= WORKERS + MOST_WAITING:
            raise TooMany("stats_busy", "Too many calls for stats wait already.", retry_after=1)
        self._under_way += 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        future.add_done_callback(self._ended)
        await asyncio.wait({future}, timeout=PATIENCE)
        if not future.done():
            raise Unavailable("stats_unavailable", f"The kernel did not answer within {PATIENCE:.0f} s.", retry_after=1)
        return future.result()

    def _ended(self, future: asyncio.Future[Any]) -> None:
        self._under_way -= 1
        if not future.cancelled():
            future.exception()  # told to whoever waits; if nobody does any more, to nobody


def _read_boxes(records: Sequence[Agent]) -> list[Usage | None]:
    return [
        None if record.pid is None or record.container_id is None else read_usage(record.pid, record.container_id)
        for record in records
    ]


def _age(usage: Usage | None) -> float:
    return float("inf") if usage is None else time.monotonic() - usage.moment


def describe(live: LiveAgent) -> Figures:
    """An agent's figures in JSON, after `refresh`. Each entry with `used` has a `limit`, None where there is none."""
    usage, record = live.usage, live.record
    assert usage is not None
    received, sent = usage.network or (None, None)
    return {
        "agent": record.id,
        "name": record.spec.name,
        "team": record.spec.team,
        "state": record.state,
        "started_at": timestamp(record.started_at),
        "at": timestamp(usage.at),
        "cpu": {
            **_share(live.usage_before, usage),
            "limit": usage.cores,
            "seconds": usage.cpu_seconds,
            "throttled": usage.throttled,
        },
        "memory": {
            "used": usage.memory,
            "limit": usage.memory_cap,
            "peak": usage.memory_peak,
            "oom_kills": usage.oom_kills,
        },
        "pids": {"used": usage.pids, "limit": usage.pids_cap},
        "disk": _room(usage.tmp),
        "shm": _room(usage.shm),
        "nofile": {
            "used": usage.open_files,
            "limit": record.spec.limits.nofile,
            "complete": usage.every_process,
        },
        "network": {
            "used": None if usage.network is None else sum(usage.network),
            "limit": None,
            "received": received,
            "sent": sent,
        },
        "wall": _time(usage.at, record.started_at, record.wall_deadline, record.spec.limits.wall),
        "ttl": _time(usage.at, record.started_at, record.expires_at, record.spec.ttl),
        "progress": _progress(live),
    }


def _share(before: Usage | None, now: Usage) -> Figures:
    """Cores used since the reading before, and over how many seconds that was."""
    if before is None or before.cpu_seconds is None or now.cpu_seconds is None or now.moment <= before.moment:
        return {"used": None, "over": None}
    over = now.moment - before.moment
    return {"used": round(max(0.0, now.cpu_seconds - before.cpu_seconds) / over, 4), "over": round(over, 3)}


def _room(space: Space | None) -> Figures:
    return {"used": None, "limit": None} if space is None else {"used": space.used, "limit": space.size}


def _time(now: float, since: float | None, until: float | None, limit: float | None) -> Figures:
    """Seconds since the start, and left until the end."""
    used = None if since is None else round(max(0.0, now - since), 3)
    return {"used": used, "limit": limit, "left": None if until is None else round(max(0.0, until - now), 3)}


def _progress(live: LiveAgent) -> Figures | None:
    if live.progress is None:
        return None
    return {name: live.progress.get(name) for name in ("text", "fraction", "elapsed", "at")}
