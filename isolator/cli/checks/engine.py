"""The Docker Engine: does it answer, what is it made of, and can it enforce what isolator promises.

Asked directly over its socket, so that `doctor` needs neither the daemon nor the engine's SDK.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from isolator.cli.checks.finding import Facts, Finding
from isolator.client.errors import IsolatorClientError, ProblemError, SocketDenied
from isolator.client.location import Location
from isolator.client.transport import request

_TIMEOUT: Final = 5.0
_OLDEST_API: Final = (1, 41)
_NOT_FOUND: Final = 404
_CAPS: Final = (
    ("MemoryLimit", "memory"),
    ("SwapLimit", "swap"),
    ("PidsLimit", "process"),
    ("CpuCfsQuota", "CPU"),
)


def ask_engine(socket: Path, path: str) -> dict[str, Any]:
    """One answer of the engine. Raises IsolatorClientError, whose text speaks of sockets, not of Docker."""
    body = request(Location(socket, named=True), "GET", path, timeout=_TIMEOUT).body
    return body if isinstance(body, dict) else {}


def image_present(socket: Path, digest: str) -> bool | None:
    """Whether the engine has this image; None if it does not say."""
    try:
        ask_engine(socket, f"/images/{digest}/json")
    except ProblemError as problem:
        return False if problem.status == _NOT_FOUND else None
    except IsolatorClientError:
        return None
    return True


def unreachable(socket: Path, error: IsolatorClientError) -> Finding:
    """The finding for an engine that did not answer."""
    if isinstance(error, SocketDenied):
        return Finding(
            "engine",
            "weak",
            f"not looked at: you may not connect to {socket}, which is as it should be for anyone but root",
            "run doctor as root to have the engine checked too",
        )
    return Finding(
        "engine",
        "broken",
        f"no Docker Engine answers at {socket}: no agent can be started",
        "start it (systemctl start docker), or name its socket with ISOLATOR_DOCKER_SOCKET",
    )


def check_engine(facts: Facts) -> list[Finding]:
    """Version and API, and what `docker info` says about caps, seccomp, user namespaces, restarts."""
    findings: list[Finding] = []
    if facts.version is not None:
        findings += _versions(facts.version)
    if facts.engine is not None:
        findings += [*_enforcement(facts.engine), *_hardening(facts.engine)]
    return findings


def components(version: dict[str, Any]) -> dict[str, str]:
    """Lower-case component names and their versions, from the engine's version answer."""
    return {
        str(part.get("Name", "")).lower(): str(part.get("Version", ""))
        for part in version.get("Components") or ()
        if isinstance(part, dict)
    }


def _versions(version: dict[str, Any]) -> list[Finding]:
    api = str(version.get("ApiVersion", ""))
    parts = ", ".join(f"{name} {number}" for name, number in components(version).items())
    said = f"Docker {version.get('Version')} answers, API {api}"
    try:
        old = tuple(int(part) for part in api.split(".")) < _OLDEST_API
    except ValueError:
        old = True
    if old:
        needed = ".".join(str(part) for part in _OLDEST_API)
        return [Finding("engine", "broken", f"{said}: older than {needed}", "upgrade to Docker 20.10 or newer")]
    return [Finding("engine", "ok", f"{said} ({parts})")]


def _enforcement(engine: dict[str, Any]) -> list[Finding]:
    missing = [word for key, word in _CAPS if engine.get(key) is False]
    cgroups = f"cgroup v{engine.get('CgroupVersion', '1')}, driver {engine.get('CgroupDriver', 'unknown')}"
    if missing == ["swap"]:
        caps = Finding(
            "caps",
            "weak",
            f"the engine can't cap swap ({cgroups}): an agent may swap beyond its memory",
            "turn swap off, or boot with swapaccount=1",
        )
    elif missing:
        caps = Finding(
            "caps",
            "broken",
            f"the engine can't enforce {', '.join(missing)} caps ({cgroups}): a runaway agent takes the host along",
            "enable these cgroup controllers (boot options cgroup_enable=memory, or cgroup v2)",
        )
    else:
        caps = Finding("caps", "ok", f"CPU, memory, swap and process caps can be enforced ({cgroups})")
    options = [str(option) for option in engine.get("SecurityOptions") or ()]
    if any(option.startswith("name=seccomp") for option in options):
        seccomp = Finding("engine seccomp", "ok", "the engine filters system calls")
    else:
        seccomp = Finding(
            "engine seccomp",
            "broken",
            "the engine was built without seccomp: no agent's system calls would be filtered",
            "install an engine and kernel with seccomp",
        )
    return [caps, seccomp]


def _hardening(engine: dict[str, Any]) -> list[Finding]:
    options = [str(option) for option in engine.get("SecurityOptions") or ()]
    findings = []
    if any(option.startswith(("name=userns", "name=rootless")) for option in options):
        findings.append(Finding("user namespaces", "ok", "the engine maps the box's users to unprivileged ones"))
    else:
        findings.append(
            Finding(
                "user namespaces",
                "weak",
                "a box's uid is the same uid on the host; it is never root, but an escape would meet that user's files",
                "give workspaces owners that can do little else; userns-remap of the engine is not supported yet",
            )
        )
    if any(option.startswith(("name=apparmor", "name=selinux")) for option in options):
        findings.append(Finding("second lock", "ok", "AppArmor or SELinux stands behind seccomp"))
    else:
        findings.append(
            Finding(
                "second lock",
                "weak",
                "neither AppArmor nor SELinux is active: seccomp and dropped capabilities stand alone",
                "enable AppArmor if the distribution has it",
            )
        )
    if engine.get("LiveRestoreEnabled") is True:
        findings.append(Finding("engine restart", "ok", "agents outlive a restart of the engine (live-restore)"))
    else:
        findings.append(
            Finding(
                "engine restart",
                "weak",
                "a restart of the engine ends every agent",
                'set "live-restore": true in the engine\'s daemon.json',
            )
        )
    return findings
