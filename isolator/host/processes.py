"""What the kernel says about a process: its confinement, its place in a container, its use."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from isolator.model.box import BoxSpec
from isolator.model.errors import BoxFailed

_CAPABILITY_FIELDS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
SECCOMP_FILTER = "2"
# The kernel counts whole microseconds of a period of 100,000.
_CPU_ROUNDING = 0.001


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """The fields of /proc/<pid>/status, by name, values stripped."""

    fields: dict[str, str]

    def numbers(self, name: str) -> tuple[int, ...]:
        """A field of several numbers, such as Uid."""
        return tuple(int(part) for part in self.fields.get(name, "").split())


def read_status(pid: int) -> ProcessStatus:
    """The status of a process.

    Raises:
        OSError: it is gone.
    """
    fields = {}
    for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        fields[name] = value.strip()
    return ProcessStatus(fields)


def is_init_of(pid: int, container_id: str) -> bool:
    """Whether this host pid is PID 1 of that container, by the kernel's word."""
    try:
        groups = Path(f"/proc/{pid}/cgroup").read_text()
        innermost = read_status(pid).numbers("NSpid")
    except OSError:
        return False
    return container_id in groups and len(innermost) > 1 and innermost[-1] == 1


def check_confinement(pid: int, spec: BoxSpec) -> None:
    """Compare what the kernel enforces on the box's PID 1 with what the spec says.

    Raises:
        BoxFailed: `box_mismatch`, naming the field, what it is and what it should be.
    """
    try:
        status = read_status(pid)
        interfaces = Path(f"/proc/{pid}/net/if_inet6")
        inet6 = interfaces.read_text() if interfaces.exists() else ""
    except OSError as error:
        raise BoxFailed("box_died", "The box ended before it could be checked.") from error
    wanted = {
        **dict.fromkeys(_CAPABILITY_FIELDS, "0000000000000000"),
        "NoNewPrivs": "1",
        "Seccomp": SECCOMP_FILTER,
        "Uid": "\t".join([str(spec.uid)] * 4),
        "Gid": "\t".join([str(spec.gid)] * 4),
    }
    for name, value in wanted.items():
        found = status.fields.get(name)
        if found != value:
            raise BoxFailed("box_mismatch", f"{name} is {found}, not {value}.", field=name)
    if not set(status.numbers("Groups")) <= {spec.gid}:
        raise BoxFailed("box_mismatch", "The box has further groups.", field="Groups")
    beyond = [line.split()[-1] for line in inet6.splitlines() if line.split()[-1] != "lo"]
    if beyond:
        raise BoxFailed("box_mismatch", f"IPv6 is on at {', '.join(beyond)}.", field="IPv6")


def check_limits(pid: int, spec: BoxSpec) -> None:
    """Compare the caps in the kernel's own cgroup files with the spec: an engine may ignore what it was asked.

    Raises:
        BoxFailed: `box_mismatch`, naming the cap; also when it can't be read, for then it can't be promised.
    """
    limits = spec.limits
    memory = _first_number(pid, "memory", ("memory.limit_in_bytes", "memory.max"))
    if memory is None or memory > limits.memory:
        raise BoxFailed("box_mismatch", f"The memory cap is {memory}, not {limits.memory}.", field="limits.memory")
    pids = _first_number(pid, "pids", ("pids.max",))
    if pids != limits.pids:
        raise BoxFailed("box_mismatch", f"The PID cap is {pids}, not {limits.pids}.", field="limits.pids")
    cpus = _cpu_quota(pid)
    if cpus is None or cpus > limits.cpus + _CPU_ROUNDING:
        raise BoxFailed("box_mismatch", f"The CPU cap is {cpus}, not {limits.cpus}.", field="limits.cpus")


def _first_number(pid: int, controller: str, names: tuple[str, ...]) -> int | None:
    for name in names:
        path = cgroup_file(pid, controller, name)
        if path is not None:
            with contextlib.suppress(OSError, ValueError):
                return int(path.read_text())
    return None


def _cpu_quota(pid: int) -> float | None:
    """Cores the cgroup may use: v2 says quota and period in one line, v1 in two files."""
    with contextlib.suppress(OSError, ValueError):
        both = cgroup_file(pid, "cpu", "cpu.max")
        if both is not None and both.exists():
            quota, period = both.read_text().split()
            return int(quota) / int(period)
    quota_us = _first_number(pid, "cpu", ("cpu.cfs_quota_us",))
    period_us = _first_number(pid, "cpu", ("cpu.cfs_period_us",))
    return quota_us / period_us if quota_us is not None and quota_us > 0 and period_us else None


def cgroup_file(pid: int, controller: str, name: str) -> Path | None:
    """A file of the process's cgroup: v1 by controller, v2 by the unified tree; None where there is none."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return Path("/sys/fs/cgroup") / controller / path.lstrip("/") / name
    for line in lines:
        if line.startswith("0::"):
            return Path("/sys/fs/cgroup") / line[3:].lstrip("/") / name
    return None


def oom_kills(pid: int) -> int:
    """How often the kernel killed for memory in the process's cgroup; 0 where it can't be read."""
    for name in ("memory.oom_control", "memory.events"):
        path = cgroup_file(pid, "memory", name)
        if path is None:
            continue
        with contextlib.suppress(OSError, ValueError):
            for line in path.read_text().splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value)
    return 0


def cpu_seconds(pid: int) -> float | None:
    """CPU time the process's cgroup has used, seconds; None where it can't be read."""
    usage = cgroup_file(pid, "cpuacct", "cpuacct.usage")
    if usage is not None and usage.name == "cpuacct.usage":
        with contextlib.suppress(OSError, ValueError):
            return int(usage.read_text()) / 1e9
    stat = cgroup_file(pid, "cpu", "cpu.stat")
    if stat is not None:
        with contextlib.suppress(OSError, ValueError):
            for line in stat.read_text().splitlines():
                if line.startswith("usage_usec "):
                    return int(line.split()[1]) / 1e6
    return None
