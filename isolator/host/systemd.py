"""The three conversations a service has with systemd: readiness, watchdog, and sockets opened for it.

They are a datagram and a few environment variables, so no library is needed. Nothing here assumes that
systemd is there: without its variables `notify` says False, `listen_fds` is empty and `watchdog_interval`
is None.

What is passed in is checked before it is believed. A daemon that served requests on whatever happened to be
descriptor 3 could be talked into answering on a TCP port, where no peer credentials exist.

Accepted miss: a NOTIFY_SOCKET of the vsock kind (systemd in a virtual machine reporting to its host) is not
spoken to; that is for PID 1, never for a service.
"""

from __future__ import annotations

import os
import socket
from typing import Final

from isolator.model.errors import Unavailable

_FIRST_PASSED_DESCRIPTOR: Final = 3
_MOST_SOCKETS: Final = 16
_NOTIFY_TIMEOUT: Final = 1.0  # seconds; PID 1 reads at once, and the event loop must not hang on it
_LISTEN_VARIABLES: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


def notify(state: str) -> bool:
    r"""Tell the service manager about a change, for example `READY=1`, `WATCHDOG=1` or `STATUS=3 agents`.

    Args:
        state: one or more `KEY=value` lines joined by newlines. A value that came from outside must not hold
            a newline, or it would add a line of its own (`MAINPID=` for one).

    Returns:
        True when the manager's socket took it; False when there is no manager, or it did not read for 1 s.
        Never raises: a lost message is the manager's to notice (by its start timeout or its watchdog).
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    target = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(_NOTIFY_TIMEOUT)
        try:
            sender.sendto(state.encode(), target)
        except OSError:
            return False
    return True


def listen_fds() -> list[socket.socket]:
    """Take over the listening sockets systemd opened for this process, in the unit's order.

    The variables are unset whatever the outcome, and the descriptors are closed on exec, so that no child
    inherits the daemon's front door.

    Returns:
        Listening AF_UNIX SOCK_STREAM sockets, non-blocking; empty when none were passed to this very process.

    Raises:
        Unavailable: `socket_activation_invalid` when the variables are malformed or a descriptor is anything
            other than a listening Unix stream socket. In the latter case all that were passed are closed.
    """
    values = {name: os.environ.pop(name, None) for name in _LISTEN_VARIABLES}
    pid, count = values["LISTEN_PID"], values["LISTEN_FDS"]
    if pid is None or count is None:
        return []
    if _number("LISTEN_PID", pid) != os.getpid():
        return []
    number = _number("LISTEN_FDS", count)
    if number > _MOST_SOCKETS:
        raise _refused(f"LISTEN_FDS={number} is more than the {_MOST_SOCKETS} sockets isolator takes.")
    descriptors = range(_FIRST_PASSED_DESCRIPTOR, _FIRST_PASSED_DESCRIPTOR + number)
    taken: list[socket.socket] = []
    try:
        for descriptor in descriptors:
            taken.append(_take(descriptor))  # noqa: PERF401 - a comprehension would lose those already taken
    except Unavailable:
        for passed in taken:
            passed.detach()
        for descriptor in descriptors:
            _close(descriptor)
        raise
    return taken


def watchdog_interval() -> float | None:
    """How often `WATCHDOG=1` is due.

    Returns:
        Seconds: half of what the unit's WatchdogSec allows, so that one late turn is forgiven. None when no
        watchdog watches this process.

    Raises:
        Unavailable: `watchdog_invalid` when the variables are not positive numbers; going on would mean to be
            killed for a reason nobody sees.
    """
    allowed = os.environ.get("WATCHDOG_USEC")
    if allowed is None:
        return None
    watched = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not (_is_number(allowed) and _is_number(watched) and int(allowed) > 0):
        raise Unavailable(
            "watchdog_invalid",
            f"WATCHDOG_USEC={allowed!r} with WATCHDOG_PID={watched!r} is not a pair of positive numbers; "
            "start the daemon from its systemd unit, or unset both.",
        )
    if int(watched) != os.getpid():
        return None
    return int(allowed) / 2_000_000


def _take(descriptor: int) -> socket.socket:
    """The listening Unix stream socket at this descriptor, or a refusal that leaves the descriptor open."""
    try:
        passed = socket.socket(fileno=descriptor)
    except OSError as error:
        raise _refused(f"Descriptor {descriptor} is not a socket ({error.strerror}).") from error
    listening = passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if passed.family != socket.AF_UNIX or passed.type != socket.SOCK_STREAM or not listening:
        passed.detach()
        raise _refused(f"Descriptor {descriptor} is not a listening Unix stream socket.")
    passed.set_inheritable(False)
    passed.setblocking(False)
    return passed


def _close(descriptor: int) -> None:
    try:
        os.close(descriptor)
    except OSError:
        return


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _number(name: str, text: str) -> int:
    if not _is_number(text):
        raise _refused(f"{name}={text!r} is not a number.")
    return int(text)


def _refused(what: str) -> Unavailable:
    return Unavailable(
        "socket_activation_invalid",
        f"{what} Use the shipped isolator.socket: one ListenStream= with a path, and Accept=no.",
    )
