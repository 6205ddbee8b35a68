"""What a box uses now, by the kernel's own files: no call of the engine, a bounded number of small reads.

All of it is read through one descriptor of the box's PID 1 in /proc. That descriptor belongs to this very process: a
pid that was given to somebody else meanwhile leads nowhere, so nobody is told a stranger's figures.

Accepted miss: processes come and go while their open files are counted; one that was not there, is not counted.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass

from isolator.host import syscalls
from isolator.host.cgroups import Cgroup

_IN_BOX = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
_LONGEST_FILE = 1 << 20
MOST_PROCESSES = 1024
# Kernels before 6.2 don't say how many files a process has open: there, so many are counted in all.
MOST_COUNTED = 20_000


@dataclass(frozen=True, slots=True)
class Space:
    """A tmpfs: bytes used, and its size."""

    used: int
    size: int


@dataclass(frozen=True, slots=True)
class Usage:
    """One reading. What the kernel did not say is None.

    at: Unix seconds; moment: the same of a clock that nobody sets. cores: the cap. network: bytes in, bytes out,
    without loopback. open_files: of the process that has most; every_process: whether all were looked at.
    """

    at: float
    moment: float
    cpu_seconds: float | None
    throttled: float | None
    cores: float | None
    memory: int | None
    memory_cap: int | None
    memory_peak: int | None
    oom_kills: int | None
    pids: int | None
    pids_cap: int | None
    tmp: Space | None
    shm: Space | None
    open_files: int | None
    every_process: bool
    network: tuple[int, int] | None


def read_usage(pid: int, container_id: str) -> Usage | None:
    """What the box of this PID 1 uses; None if it is gone."""
    try:
        process = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _read(process, container_id)
    finally:
        os.close(process)


def _read(process: int, container_id: str) -> Usage | None:
    places = _text(process, "cgroup")
    if places is None or container_id not in places:
        return None
    cgroup = Cgroup(places)
    at, moment, seconds = time.time(), time.monotonic(), cgroup.cpu_seconds()
    open_files, every_process = _most_open_files(cgroup)
    tmp, shm = _spaces(process)
    usage = Usage(
        at=at,
        moment=moment,
        cpu_seconds=seconds,
        throttled=cgroup.throttled_seconds(),
        cores=cgroup.cores(),
        memory=cgroup.memory_used(),
        memory_cap=cgroup.memory_cap(),
        memory_peak=cgroup.memory_peak(),
        oom_kills=cgroup.oom_kills(),
        pids=cgroup.number("pids", "pids.current"),
        pids_cap=cgroup.number("pids", "pids.max"),
        tmp=tmp,
        shm=shm,
        open_files=open_files,
        every_process=every_process,
        network=_network(_text(process, "net/dev")),
    )
    # Had it ended meanwhile, some of this would be of nothing.
    return None if _text(process, "cgroup") is None else usage


def _text(process: int, name: str) -> str | None:
    """A file below a process's folder in /proc; None if the process is gone."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=process)
    except OSError:
        return None
    try:
        with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor, no path
            return file.read(_LONGEST_FILE).decode(errors="replace")
    except OSError:
        return None


def _spaces(process: int) -> tuple[Space | None, Space | None]:
    """The box's /tmp and /dev/shm, which no link and no mount of the host can replace."""
    try:
        root = os.open("root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=process)
    except OSError:
        return None, None
    try:
        return _space(root, "tmp"), _space(root, "dev/shm")
    finally:
        os.close(root)


def _space(root: int, path: str) -> Space | None:
    # Opened as a name only: nothing of the file system is asked but its size.
    with contextlib.suppress(OSError):
        folder = syscalls.openat2(root, path, os.O_PATH | os.O_DIRECTORY, _IN_BOX)
        try:
            facts = os.fstatvfs(folder)
        finally:
            os.close(folder)
        return Space((facts.f_blocks - facts.f_bfree) * facts.f_frsize, facts.f_blocks * facts.f_frsize)
    return None


def _most_open_files(cgroup: Cgroup) -> tuple[int | None, bool]:
    """Of the cgroup's processes, the largest number of open files; whether every process was looked at."""
    pids = (cgroup.text("pids", "cgroup.procs") or "").split()
    count = _told_by_kernel if _told_by_kernel("self") else _Counter().count
    most: int | None = None
    for pid in pids[:MOST_PROCESSES]:
        number = count(pid)
        if number is None:
            return most, False
        most = max(most or 0, number)
    return most, len(pids) <= MOST_PROCESSES


def _told_by_kernel(pid: str) -> int:
    """Since Linux 6.2 this folder's size is the number of open files; before, it is 0."""
    try:
        return os.stat(f"/proc/{pid}/fd").st_size  # noqa: PTH116 - in every reading, for every process
    except OSError:
        return 0


class _Counter:
    """Counts one by one, up to a number of files in all."""

    def __init__(self) -> None:
        self._left = MOST_COUNTED

    def count(self, pid: str) -> int | None:
        """Open files of a process, 0 if it is gone; None when too many were counted already."""
        found = 0
        with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
            for _ in entries:
                if self._left == 0:
                    return None
                found += 1
                self._left -= 1
        return found


def _network(table: str | None) -> tuple[int, int] | None:
    """Bytes in and out of all interfaces but loopback, from the text of /proc/<pid>/net/dev."""
    if table is None:
        return None
    received = sent = 0
    for line in table.splitlines()[2:]:
        name, _, text = line.partition(":")
        numbers = text.split()
        if name.strip() != "lo" and len(numbers) > 8:
            received += int(numbers[0])
            sent += int(numbers[8])
    return received, sent
