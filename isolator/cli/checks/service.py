"""The running daemon: who may reach it, whether it answers, what it says of network, images and record."""

from __future__ import annotations

import grp
import os
import stat
from pathlib import Path

from isolator.cli.checks.engine import image_present
from isolator.cli.checks.finding import Facts, Finding, Level
from isolator.client import Client, IsolatorClientError, SocketDenied, SocketNotFound
from isolator.settings import Settings


def check_access(settings: Settings, socket: Path) -> list[Finding]:
    """The socket's group, owner and mode, and whether we may connect."""
    findings = [_group(settings)]
    try:
        facts = socket.stat()
    except FileNotFoundError:
        return [*findings, Finding("socket", "weak", f"no socket at {socket}", "start the daemon")]
    except OSError as error:
        action = f"have yourself added to the group {settings.socket_group}, then log in again"
        return [*findings, Finding("socket", "weak", f"{socket}: {error.strerror}", action)]
    mode = stat.S_IMODE(facts.st_mode)
    if mode & 0o007:
        findings.append(
            Finding(
                "socket",
                "broken",
                f"{socket} has mode {mode:04o}: every user of this host may connect",
                f"chmod 0660 {socket}, and set SocketMode=0660 in the socket unit",
            )
        )
    else:
        name = _group_name(facts.st_gid)
        findings.append(Finding("socket", "ok", f"{socket}, mode {mode:04o}, group {name}"))
        findings.append(_caller(facts, settings.socket_group if facts.st_gid == 0 else name))
    return findings


def _group(settings: Settings) -> Finding:
    if settings.socket_gid() is not None:
        return Finding("group", "ok", f"group {settings.socket_group} exists: its members may connect")
    return Finding(
        "group",
        "weak",
        f"there is no group {settings.socket_group}: only the daemon's own user may connect",
        f"groupadd --system {settings.socket_group} (or systemd-sysusers), then restart the daemon",
    )


def _caller(facts: os.stat_result, group: str) -> Finding:
    groups = {os.getegid(), *os.getgroups()}
    if os.geteuid() in (0, facts.st_uid) or (facts.st_gid in groups and facts.st_mode & stat.S_IWGRP):
        return Finding("you", "ok", f"uid {os.geteuid()} may connect")
    action = f"usermod -aG {group} USER as root, then log in again"
    return Finding("you", "weak", f"uid {os.geteuid()} may not connect: not in the group {group}", action)


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def unanswered(error: IsolatorClientError) -> Finding:
    """The finding for a daemon that gave no info."""
    if isinstance(error, SocketDenied):
        return Finding("daemon", "weak", "not asked: you may not connect", "run doctor as root")
    if isinstance(error, SocketNotFound) and not error.path.exists():
        return Finding("daemon", "weak", "not running", "systemctl start isolator, or: isolator daemon")
    return Finding("daemon", "broken", f"does not answer: {error.detail}", "see its log: journalctl -u isolator")


def check_daemon(facts: Facts) -> list[Finding]:
    """What the running daemon says: version, what is degraded, the network's proof."""
    found = facts.daemon
    if found is None:
        return []
    said = f"version {found.version}, instance {found.instance}, backend {found.backend}, answers"
    findings = [Finding("daemon", "ok", said)]
    findings += [Finding("daemon", "weak", str(each.get("detail") or each.get("code"))) for each in found.degraded]
    return [*findings, _network(facts)]


def _network(facts: Facts) -> Finding:
    network = facts.daemon.network if facts.daemon else {}
    status = network.get("status")
    checks = [each for each in network.get("checks") or () if isinstance(each, dict)]
    if status == "proven":
        meaning = f"self-test passed ({len(checks)} attempts to get out, {network.get('checked_at')})"
        return Finding("network", "ok", meaning)
    if status == "pending":
        return Finding("network", "weak", "self-test under way; networked agents wait for it", "ask again shortly")
    failed = "; ".join(f"{each.get('name')}: {each.get('detail')}" for each in checks if not each.get("held"))
    why = failed or str(network.get("reason") or "no reason given")
    return Finding(
        "network",
        "broken",
        f"self-test {status or 'unknown'}: {why}. Agents with a network are refused",
        "mend what is named, then restart the daemon; spawn with --network none works meanwhile",
    )


def check_images(facts: Facts) -> list[Finding]:
    """Whether our images are pinned, and on the engine."""
    wanted = facts.settings.default_image
    try:
        known = _known_images(facts)
    except PermissionError as error:
        unread = f"not looked at: {error.filename} can't be read by you"
        return [Finding("images", "weak", unread, "run doctor as root")]
    except _NoPinsError as error:
        return [Finding("images", "broken", str(error), "mend or rebuild it, as root: isolator image build")]
    build = "as root: isolator image build --if-missing"
    if not known:
        return [Finding("images", "broken", "none is pinned: no agent can be started", build)]
    findings = []
    if wanted.removesuffix(":latest") not in known and wanted not in facts.settings.allowed_images:
        findings.append(Finding("images", "broken", f"the default image {wanted} is not pinned", build))
    for name, present in known.items():
        if present is False:
            level: Level = "broken" if name == wanted.removesuffix(":latest") else "weak"
            findings.append(Finding("images", level, f"{name} is pinned, but the engine does not have it", build))
    unknown = [name for name, present in known.items() if present is None]
    if unknown:
        findings.append(Finding("images", "weak", f"pinned; on the engine? not known: {', '.join(unknown)}"))
    return findings or [Finding("images", "ok", f"pinned and on the engine: {', '.join(known)}")]


class _NoPinsError(Exception):
    pass


def _known_images(facts: Facts) -> dict[str, bool | None]:
    if facts.daemon is not None:
        return {image.name: image.present for image in facts.daemon.images}
    from isolator.images.lock import read_lock  # noqa: PLC0415 - without the daemon only
    from isolator.model.errors import IsolatorError  # noqa: PLC0415 - as above

    settings = facts.settings
    try:
        # The reader tells a file it may not open as unsafe; whether we may is asked first.
        if settings.image_lock_path.stat().st_size:
            settings.image_lock_path.open("rb").close()
        pins = read_lock(settings.image_lock_path)
    except FileNotFoundError:
        return {}
    except PermissionError:
        raise
    except (IsolatorError, OSError) as error:
        raise _NoPinsError(error.detail if isinstance(error, IsolatorError) else str(error)) from error
    return {name: image_present(settings.docker_socket, digest) for name, digest in pins.items()}


def check_record(facts: Facts, client: Client) -> list[Finding]:
    """Whether the audit log is whole: the daemon's word, or read here where it is not running."""
    mend = "keep a copy of the folder, and find out who could write there"
    if facts.daemon is not None:
        try:
            state = client.verify_audit()
        except IsolatorClientError as error:
            level: Level = "weak" if getattr(error, "status", 0) in (403, 404) else "broken"
            return [Finding("audit log", level, f"not verified: {error.detail}", "run doctor as root")]
        if state.ok:
            return [Finding("audit log", "ok", f"whole: {state.entries} entries")]
        return [Finding("audit log", "broken", f"not whole: {state.problem}", mend)]
    return _read_record(facts.settings.state_dir / "audit", mend)


def _read_record(folder: Path, mend: str) -> list[Finding]:
    from isolator.audit.reading import verify_folder  # noqa: PLC0415 - without the daemon only

    try:
        state = verify_folder(folder)
    except FileNotFoundError:
        return [Finding("audit log", "ok", "none yet")]
    except OSError as error:
        return [Finding("audit log", "weak", f"not verified: {folder}: {error.strerror}", "run doctor as root")]
    if state.problem is None:
        return [Finding("audit log", "ok", f"whole: {state.entries} entries (read without the daemon)")]
    return [Finding("audit log", "broken", f"not whole: {state.problem}", mend)]
