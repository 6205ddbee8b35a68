"""What the kernel's cgroup files say about a box: its caps and its use. v1 and v2 look alike from here."""

from __future__ import annotations

import contextlib
from pathlib import Path

from isolator.model.errors import BoxFailed
from isolator.model.limits import Limits

_ROOT = Path("/sys/fs/cgroup")
_SWAPS = Path("/proc/swaps")
# The kernel counts whole microseconds of a period of 100,000.
_CPU_ROUNDING = 0.001


class Cgroup:
    """Where one process is in the trees of cgroups, and what the files there say."""

    def __init__(self, places: str, root: Path = _ROOT) -> None:
        """`places` as /proc/<pid>/cgroup has them: a line for each v1 tree, number 0 for the unified one."""
        self._folders: dict[str, Path] = {}
        self._unified: Path | None = None
        for line in places.splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                self._unified = root / path.lstrip("/")
            for controller in controllers.split(","):
                self._folders[controller] = root / controller / path.lstrip("/")

    @classmethod
    def of(cls, pid: int) -> Cgroup:
        """That of a process; one that is gone is nowhere."""
        try:
            return cls(Path(f"/proc/{pid}/cgroup").read_text())
        except OSError:
            return cls("")

    def text(self, controller: str, name: str) -> str | None:
        """A file's content, of the controller's own tree (v1) or the unified one (v2); None where there is none."""
        folder = self._folders.get(controller, self._unified)
        if folder is not None:
            with contextlib.suppress(OSError):
                return (folder / name).read_text()
        return None

    def number(self, controller: str, *names: str) -> int | None:
        """The first of these files that holds a number."""
        for name in names:
            with contextlib.suppress(ValueError):
                return int(self.text(controller, name) or "")
        return None

    def entry(self, controller: str, name: str, key: str) -> int | None:
        """The number behind a key of a file of such lines."""
        for line in (self.text(controller, name) or "").splitlines():
            found, _, value = line.partition(" ")
            if found == key and value.isdigit():
                return int(value)
        return None

    def cores(self) -> float | None:
        """Cores it may use: v2 says quota and period in one line, v1 in two files. None: no cap."""
        both = (self.text("cpu", "cpu.max") or "").split()
        if len(both) == 2:
            return int(both[0]) / int(both[1]) if both[0].isdigit() else None
        quota, period = self.number("cpu", "cpu.cfs_quota_us"), self.number("cpu", "cpu.cfs_period_us")
        return quota / period if quota is not None and quota > 0 and period else None

    def cpu_seconds(self) -> float | None:
        """CPU time used so far."""
        nanoseconds = self.number("cpuacct", "cpuacct.usage")
        if nanoseconds is not None:
            return nanoseconds / 1e9
        microseconds = self.entry("cpu", "cpu.stat", "usage_usec")
        return None if microseconds is None else microseconds / 1e6

    def throttled_seconds(self) -> float | None:
        """How long its threads were kept waiting for the cap on CPU."""
        nanoseconds = self.entry("cpu", "cpu.stat", "throttled_time")
        if nanoseconds is not None:
            return nanoseconds / 1e9
        microseconds = self.entry("cpu", "cpu.stat", "throttled_usec")
        return None if microseconds is None else microseconds / 1e6

    def memory_used(self) -> int | None:
        """Bytes, without the file cache that the kernel drops first when it needs room; tmpfs counts."""
        whole = self.number("memory", "memory.usage_in_bytes", "memory.current")
        if whole is None:
            return None
        droppable = self.entry("memory", "memory.stat", "total_inactive_file")
        if droppable is None:
            droppable = self.entry("memory", "memory.stat", "inactive_file") or 0
        return max(0, whole - droppable)

    def memory_cap(self) -> int | None:
        """Bytes it may use; None: no cap."""
        return self.number("memory", "memory.limit_in_bytes", "memory.max")

    def memory_peak(self) -> int | None:
        """The most bytes it ever used, file cache included; older kernels with cgroup v2 don't say."""
        return self.number("memory", "memory.max_usage_in_bytes", "memory.peak")

    def oom_kills(self) -> int | None:
        """How often the kernel killed for memory."""
        for name in ("memory.oom_control", "memory.events"):
            found = self.entry("memory", name, "oom_kill")
            if found is not None:
                return found
        return None


def check_limits(cgroup: Cgroup, limits: Limits) -> bool:
    """Compare the caps in the kernel's own files with what was asked: an engine may ignore what it was asked.

    Returns:
        Whether swap is inside the memory cap. A kernel that does not count it can't promise that.

    Raises:
        BoxFailed: `box_mismatch`, naming the cap; also when it can't be read, for then it can't be promised.
    """
    memory = cgroup.memory_cap()
    if memory is None or memory > limits.memory:
        raise _mismatch("memory", memory, limits.memory)
    pids = cgroup.number("pids", "pids.max")
    if pids != limits.pids:
        raise _mismatch("pids", pids, limits.pids)
    cores = cgroup.cores()
    if cores is None or cores > limits.cpus + _CPU_ROUNDING:
        raise _mismatch("cpus", cores, limits.cpus)
    # v1 caps the sum, v2 the swap alone.
    total, swap = cgroup.text("memory", "memory.memsw.limit_in_bytes"), cgroup.text("memory", "memory.swap.max")
    if total is None and swap is None:
        return not has_swap()
    if (total is not None and int(total) > limits.memory) or (swap is not None and swap.strip() != "0"):
        raise _mismatch("memory", f"{total or swap}".strip() + " with swap", limits.memory)
    return True


def _mismatch(cap: str, found: object, wanted: object) -> BoxFailed:
    return BoxFailed("box_mismatch", f"The cap on {cap} is {found}, not {wanted}.", field=f"limits.{cap}")


def has_swap() -> bool:
    """Whether this host swaps at all."""
    try:
        return len(_SWAPS.read_text().splitlines()) > 1
    except OSError:
        return False


def oom_kills(pid: int) -> int:
    """How often the kernel killed for memory in the process's cgroup; 0 where it can't be read."""
    return Cgroup.of(pid).oom_kills() or 0


def cpu_seconds(pid: int) -> float | None:
    """CPU time the process's cgroup has used, seconds; None where it can't be read."""
    return Cgroup.of(pid).cpu_seconds()
