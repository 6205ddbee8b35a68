"""The receipt: what this very box enforces, and by what. Pure. What is not enforced stands there too."""

from __future__ import annotations

from typing import Any

from isolator.backends.base import Guarantee, Guarantees
from isolator.model.box import BoxSpec
from isolator.model.sizes import format_size


def docker_guarantees(network: Guarantee) -> Guarantees:
    """What the Docker backend promises for every box on this host; `network` as its self-test found it."""
    return {
        "non-root": Guarantee(True, "uid checked in /proc before the command runs"),
        "no-capabilities": Guarantee(True, "all capability sets checked to be empty"),
        "no-new-privileges": Guarantee(True, "checked in /proc"),
        "seccomp": Guarantee(True, "our own allow-list profile, filter mode checked in /proc"),
        "read-only-rootfs": Guarantee(True, "compared with the engine's inspect"),
        "cpu-cap": Guarantee(True, "cgroup quota"),
        "memory-cap": Guarantee(True, "cgroup limit, swap included"),
        "pids-cap": Guarantee(True, "cgroup limit"),
        "file-scope": Guarantee(True, "own mount namespace; mounts compared by device and inode"),
        "process-hiding": Guarantee(True, "own PID namespace"),
        "network-isolation": network,
        "secrets-not-inspectable": Guarantee(True, "handed over through the guest to a tmpfs or its memory"),
        "kill-tree": Guarantee(True, "PID 1's end ends all"),
        "user-namespace": Guarantee(False, "the engine maps no user namespace; the box's uid is a host uid"),
        "lsm": Guarantee(False, "no AppArmor or SELinux profile of ours"),
    }


def receipt(spec: BoxSpec, guarantees: Guarantees, *, swap_capped: bool) -> dict[str, dict[str, Any]]:
    """The receipt of one box, for `GET /v1/agents/{id}`; `swap_capped` as it was measured on it."""
    limits = spec.limits
    values = {
        "cpu-cap": f"{limits.cpus:g} of the host's cores",
        "memory-cap": format_size(limits.memory),
        "pids-cap": str(limits.pids),
        "non-root": f"uid {spec.uid}",
    }
    lines: dict[str, dict[str, Any]] = {
        name: {"held": item.held, "how": f"{values[name]}: {item.how}" if name in values else item.how}
        for name, item in guarantees.items()
    }
    if not swap_capped:
        lines["memory-cap"] = {
            "held": False,
            "how": f"{format_size(limits.memory)}: cgroup limit, but this kernel does not count swap",
        }
    if spec.network == "none":
        lines["network-isolation"] = {"held": True, "how": "no network but loopback"}
    writable = [mount.target for mount in spec.mounts if not mount.read_only]
    lines["disk-cap"] = {
        "held": not writable,
        "how": f"/tmp and /dev/shm {format_size(limits.disk)} each"
        + (f"; {', '.join(writable)} not capped: use a quota of its file system" if writable else ""),
    }
    return lines
