"""What one agent may use at most."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Caps of one agent; every one is a positive number, none means "unlimited" except `wall`.

    cpus: cores; memory: bytes, swap included; pids: processes and threads; disk: bytes of /tmp;
    nofile: open files a process; wall: seconds the command may run, or None.
    """

    cpus: float
    memory: int
    pids: int
    disk: int
    nofile: int
    wall: float | None
