"""What an agent may use: the request's wishes within the operator's bounds."""

from __future__ import annotations

from typing import TypeVar

from isolator.model.errors import BadRequest
from isolator.model.limits import Limits
from isolator.model.request import LimitsRequest
from isolator.model.sizes import format_size
from isolator.settings import Settings

Number = TypeVar("Number", int, float)

# Less than this and PID 1 itself dies of hunger before the command starts.
MIN_MEMORY = 16 * 1024**2
MIN_CPUS = 0.01
MIN_PIDS = 4
MIN_DISK = 64 * 1024
MIN_NOFILE = 32
MAX_WALL = 366 * 86400.0


def _within(name: str, value: Number, low: Number, high: Number, show: str) -> Number:
    if not low <= value <= high:
        raise BadRequest(
            "limit_out_of_range",
            f"limits.{name} must be {show}. There is no value that means unlimited.",
            field=f"limits.{name}",
            minimum=low,
            maximum=high,
        )
    return value


def decide_limits(request: LimitsRequest, settings: Settings, host_cpus: int) -> Limits:
    """The caps of one agent.

    Raises:
        BadRequest: `limit_out_of_range`, with the field and its bounds.
    """
    cpus_high = min(settings.max_cpus, float(host_cpus))
    cpus = request.cpus if request.cpus is not None else min(settings.default_cpus, cpus_high)
    memory = request.memory if request.memory is not None else settings.default_memory
    pids = request.pids if request.pids is not None else settings.default_pids
    disk = request.disk if request.disk is not None else settings.default_disk
    nofile = request.nofile if request.nofile is not None else settings.default_nofile
    wall = request.wall
    if wall is not None:
        _within("wall", wall, 0.1, MAX_WALL, f"0.1 to {MAX_WALL:.0f} seconds")
    sizes = f"{format_size(MIN_MEMORY)} to {format_size(settings.max_memory)}"
    disks = f"{format_size(MIN_DISK)} to {format_size(settings.max_disk)}"
    return Limits(
        cpus=round(_within("cpus", cpus, MIN_CPUS, cpus_high, f"{MIN_CPUS} to {cpus_high:g} cores"), 3),
        memory=_within("memory", memory, MIN_MEMORY, settings.max_memory, sizes),
        pids=_within("pids", pids, MIN_PIDS, settings.max_pids, f"{MIN_PIDS} to {settings.max_pids}"),
        disk=_within("disk", disk, MIN_DISK, settings.max_disk, disks),
        nofile=_within("nofile", nofile, MIN_NOFILE, settings.max_nofile, f"{MIN_NOFILE} to {settings.max_nofile}"),
        wall=wall,
    )
