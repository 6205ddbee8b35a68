"""What the kernel says about a process: its confinement, and its place in a container."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from isolator.model.box import BoxSpec
from isolator.model.errors import BoxFailed

_CAPABILITY_FIELDS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
SECCOMP_FILTER = "2"


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


def is_in(pid: int, container_id: str) -> bool:
    """Whether this host pid is a process of that container, by the kernel's word."""
    try:
        return container_id in Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return False


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
