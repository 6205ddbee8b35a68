"""A small daemon that does what the real one does with its privileges, one act a request.

scripts/try-systemd starts it from the shipped unit, so that each privilege the unit leaves is seen to suffice
and each it takes is seen to be gone, without waiting for (or being confused by) the rest of the daemon.
One JSON object a connection in, one out; one client at a time; the watchdog is answered between two requests.
"""

# ruff: noqa: INP001
from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isolator.host.syscalls import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, bind_mount, openat2, set_thread_identity
from isolator.host.syscalls import unmount as detach
from isolator.host.systemd import listen_fds, notify, watchdog_interval

MOUNTS = Path("/run/isolator/mounts")
CLONE_NEWNS = 0x00020000
AF_VSOCK = 40
libc = ctypes.CDLL(None, use_errno=True)


def outcome(act: Callable[[], Any]) -> str:
    """`allowed`, or the name of the errno the kernel answered with."""
    try:
        act()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "?")
    return "allowed"


def apart(act: Callable[[], Any]) -> str:
    """The outcome in a child of its own, since some acts change the process that succeeds in them."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, outcome(act).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        told = answer.read()
    os.waitpid(child, 0)
    return told or "ended"


def call(name: str, *arguments: Any) -> int:
    """One libc call; its errno as OSError."""
    result: int = getattr(libc, name)(*arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def facts(_: dict[str, Any]) -> dict[str, Any]:
    """Who and where this process is."""
    return {
        "pid": os.getpid(),
        "mount_namespace": str(Path("/proc/self/ns/mnt").readlink()),
        "status": Path("/proc/self/status").read_text(),
        "left": sorted(name for name in os.environ if name.startswith("LISTEN_")),
    }


def mount(request: dict[str, Any]) -> dict[str, Any]:
    """Stage a folder from its open descriptor, as the daemon does."""
    target = MOUNTS / request["name"]
    target.mkdir(parents=True, exist_ok=True)
    source = Path(request["source"])
    root = os.open(source.parent, os.O_PATH | os.O_DIRECTORY)
    beneath = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS
    descriptor = openat2(root, source.name, os.O_PATH | os.O_DIRECTORY, beneath)
    try:
        bind_mount(descriptor, str(target))
    finally:
        os.close(descriptor)
        os.close(root)
    return {"target": str(target)}


def unmount(request: dict[str, Any]) -> dict[str, Any]:
    """Undo `mount`."""
    detach(str(MOUNTS / request["name"]))
    (MOUNTS / request["name"]).rmdir()
    return {}


def look(request: dict[str, Any]) -> dict[str, Any]:
    """Identity of a folder as another uid's process sees it."""
    seen = os.stat(f"/proc/{request['pid']}/root{request['path']}")  # noqa: PTH116 - /proc/<pid>/root is a magic link
    return {"device": seen.st_dev, "inode": seen.st_ino}


def reach(request: dict[str, Any]) -> dict[str, Any]:
    """Whether a path can be opened with the rights of the given uid."""
    set_thread_identity(request["uid"], request["uid"], [])
    try:
        return {"outcome": outcome(lambda: os.close(os.open(request["path"], os.O_RDONLY)))}
    finally:
        set_thread_identity(0, 0, [])


def hand_over(request: dict[str, Any]) -> dict[str, Any]:
    """A socket below the runtime folder, opened to a group this process is no member of."""
    path = Path("/run/isolator/handed.sock")
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.bind(str(path))
    os.chown(path, -1, request["group"])
    path.chmod(0o660)
    group = path.stat().st_gid
    path.unlink()
    return {"group": group}


def leave_child(_: dict[str, Any]) -> dict[str, Any]:
    """A child that should outlive this process."""
    child = subprocess.Popen(["/bin/sleep", "120"], stdin=subprocess.DEVNULL, start_new_session=True)
    return {"pid": child.pid}


def send_signal(request: dict[str, Any]) -> dict[str, Any]:
    """Kill a process of another uid."""
    os.kill(request["pid"], signal.SIGKILL)
    return {}


def forbidden(_: dict[str, Any]) -> dict[str, Any]:
    """What each act the unit takes away answers now."""
    executable = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    tries: dict[str, Callable[[], Any]] = {
        "a mount namespace": lambda: call("unshare", CLONE_NEWNS),
        "a vsock": lambda: socket.socket(AF_VSOCK, socket.SOCK_STREAM).close(),
        "a packet socket": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close(),
        "memory both writable and executable": lambda: mmap.mmap(-1, 4096, prot=executable).close(),
        "ptrace": lambda: call("ptrace", 0, 0, 0, 0),
        "chroot": lambda: os.chroot("/mnt"),
        "a device node": lambda: os.mknod("/run/isolator/node", 0o20600, os.makedev(1, 11)),
        "the clock": lambda: call("adjtimex", ctypes.create_string_buffer(512)),
        "the host's name": lambda: socket.sethostname("x"),
        "the kernel log": lambda: call("klogctl", 10, None, 0),
        "swap": lambda: call("swapoff", b"/nonexistent"),
        "another priority": lambda: os.setpriority(os.PRIO_PROCESS, 0, -5),
        "io_uring": lambda: call("syscall", 425, 1, None),
    }
    answers = {name: apart(act) for name, act in tries.items()}
    Path("/run/isolator/node").unlink(missing_ok=True)
    return answers


def hang(_: dict[str, Any]) -> dict[str, Any]:
    """Stop answering the watchdog."""
    time.sleep(600)
    return {}


ACTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    act.__name__: act
    for act in (facts, mount, unmount, look, reach, hand_over, leave_child, send_signal, forbidden, hang)
}


def serve(client: socket.socket) -> None:
    """Answer one request."""
    client.settimeout(10)
    with contextlib.suppress(ConnectionError, TimeoutError), client, client.makefile("rw") as stream:
        request = json.loads(stream.readline() or "null")
        if request is None:
            return
        try:
            answer = ACTS[request["do"]](request)
        except OSError as error:
            answer = {"error": errno.errorcode.get(error.errno or 0, str(error))}
        stream.write(json.dumps(answer) + "\n")


def main() -> int:
    """Serve until a signal ends it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    sockets = listen_fds()
    interval = watchdog_interval()
    print(f"sockets: {[one.getsockname() for one in sockets]}, watchdog every {interval} s")  # noqa: T201
    if len(sockets) != 1:
        return 125
    if os.environ.get("STANDIN_NEVER_READY"):
        time.sleep(600)
    if os.environ.get("STANDIN_EXIT"):
        return int(os.environ["STANDIN_EXIT"])
    notify("READY=1\nSTATUS=stand-in")
    while True:
        ready, _, _ = select.select(sockets, [], [], interval)
        if ready:
            client, _ = sockets[0].accept()
            serve(client)
        notify("WATCHDOG=1")


if __name__ == "__main__":
    sys.exit(main())
