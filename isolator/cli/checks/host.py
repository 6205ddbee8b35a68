"""The kernel and the folders isolator stands on."""

from __future__ import annotations

import os
import platform
import shutil
import stat
from pathlib import Path
from typing import Final

from isolator.cli.checks.finding import Facts, Finding
from isolator.cli.checks.holes import parse_version

_OLDEST_KERNEL: Final = (5, 6, 0)
_SCARCE: Final = 0.05
_EMPTY: Final = 0.01
_PROC: Final = Path("/proc")
_CGROUP: Final = Path("/sys/fs/cgroup")


def check_kernel() -> list[Finding]:
    """Version, seccomp, our own profile, cgroups, user namespaces."""
    return [_version(), _seccomp(), _profile(), _cgroups(), _user_namespaces()]


def _version() -> Finding:
    release = platform.release()
    version = parse_version(release)
    if version is not None and version < _OLDEST_KERNEL:
        return Finding(
            "kernel",
            "broken",
            f"{release} lacks openat2: mounts can't be opened without following links",
            "use Linux 5.6 or newer",
        )
    return Finding("kernel", "ok", f"Linux {release}")


def _seccomp() -> Finding:
    actions = _text(_PROC / "sys/kernel/seccomp/actions_avail")
    if actions is None or "errno" not in actions.split():
        return Finding(
            "seccomp",
            "broken",
            "the kernel filters no system calls: every one is open to an agent",
            "use a kernel with CONFIG_SECCOMP_FILTER",
        )
    return Finding("seccomp", "ok", f"the kernel filters system calls (actions: {actions.strip()})")


def _profile() -> Finding:
    from isolator.model.errors import IsolatorError  # noqa: PLC0415 - doctor only
    from isolator.seccomp import load_profile  # noqa: PLC0415 - as above

    try:
        profile = load_profile()
    except IsolatorError as error:
        return Finding("seccomp profile", "broken", error.detail, "reinstall isolator")
    return Finding("seccomp profile", "ok", f"our own list of allowed calls is whole ({len(profile.groups)} groups)")


def _cgroups() -> Finding:
    if (_CGROUP / "cgroup.controllers").exists():
        return Finding("cgroups", "ok", "version 2")
    missing = [name for name in ("cpu", "memory", "pids") if not (_CGROUP / name).is_dir()]
    if missing:
        return Finding(
            "cgroups",
            "broken",
            f"version 1 without {', '.join(missing)}: such caps can't be enforced",
            "mount these controllers, or boot with cgroup version 2",
        )
    return Finding("cgroups", "ok", "version 1 with cpu, memory and pids")


def _user_namespaces() -> Finding:
    limit = _text(_PROC / "sys/user/max_user_namespaces")
    if limit is None or limit.strip() == "0":
        return Finding(
            "user namespaces (kernel)",
            "ok",
            "off; a Docker box does not need them, a sandbox without Docker would",
        )
    return Finding("user namespaces (kernel)", "ok", f"on (up to {limit.strip()}); agents can't make any: seccomp")


def check_folders(facts: Facts) -> list[Finding]:
    """State, runtime and secret folder, and the roots that mounts may lie below."""
    settings = facts.settings
    return [
        *_state(settings.state_dir),
        *_runtime(settings.runtime_dir),
        *_secrets(settings.secret_dir),
        *_roots(settings.workspace_roots),
    ]


def _state(folder: Path) -> list[Finding]:
    facts = _stat(folder)
    if facts is None:
        return [Finding("state", "weak", f"{folder} is not there yet", "the daemon makes it at its first start")]
    if facts.st_uid not in (0, os.geteuid()) or facts.st_mode & 0o022:
        return [
            Finding(
                "state",
                "broken",
                f"{folder} can be changed by users other than root",
                f"chown root: {folder} && chmod 0700 {folder}",
            )
        ]
    usage = shutil.disk_usage(folder)
    share = usage.free / usage.total if usage.total else 0.0
    if share < _SCARCE:
        return [
            Finding(
                "state",
                "broken" if share < _EMPTY else "weak",
                f"{folder}: {share:.1%} of its file system is free; without room for the audit log every act is "
                "refused",
                "make room",
            )
        ]
    return [Finding("state", "ok", f"{folder}, {share:.0%} of its file system free")]


def _runtime(folder: Path) -> list[Finding]:
    facts = _stat(folder)
    if facts is None:
        return [Finding("runtime", "weak", f"{folder} is not there yet", "the daemon makes it at its first start")]
    if facts.st_uid not in (0, os.geteuid()) or facts.st_mode & 0o022:
        return [
            Finding(
                "runtime",
                "broken",
                f"{folder} can be changed by others: they could put their own socket there",
                f"chmod go-w {folder}",
            )
        ]
    return [Finding("runtime", "ok", str(folder))]


def _secrets(folder: Path) -> list[Finding]:
    facts = _stat(folder)
    if facts is None:
        return [Finding("secrets", "ok", f"no folder {folder}: the host offers agents no secrets")]
    if facts.st_mode & 0o077 or facts.st_uid not in (0, os.geteuid()):
        return [
            Finding(
                "secrets",
                "broken",
                f"{folder} is open to others than its owner (mode {stat.S_IMODE(facts.st_mode):04o})",
                f"chown root: {folder} && chmod 0700 {folder}",
            )
        ]
    return [Finding("secrets", "ok", f"{folder} is root's alone")]


def _roots(roots: list[Path]) -> list[Finding]:
    if not roots:
        return [
            Finding(
                "workspace roots",
                "ok",
                "none set: agents get no folder of the host (ISOLATOR_WORKSPACE_ROOTS)",
            )
        ]
    absent = [str(root) for root in roots if not root.is_dir()]
    if absent:
        return [
            Finding(
                "workspace roots",
                "weak",
                f"not there: {', '.join(absent)}",
                "make them, or take them off the list",
            )
        ]
    return [Finding("workspace roots", "ok", ", ".join(str(root) for root in roots))]


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
