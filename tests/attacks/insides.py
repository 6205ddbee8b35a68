"""All that a box shows of itself to its agent, without what differs from one box to the next of the same kind."""

# Inside a box the bare calls are the attack.
# ruff: noqa: PTH109, PTH115, PTH116, PTH123, PTH208

import ctypes
import errno
import json
import os
import re
import resource
import signal
import socket
import sys

IDENTITY = os.environ["ISOLATOR_AGENT"]
PROCESS = {"Pid", "Tgid", "PPid", "NStgid", "NSpid", "NSpgid", "NSsid"}


def text(path):
    try:
        with open(path) as file:
            return file.read().replace(IDENTITY, "ID")
    except OSError as error:
        return errno.errorcode[error.errno]


def attempt(action, *arguments):
    try:
        action(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno))
    return "done"


def status():
    lines = dict(line.split(":", 1) for line in text("/proc/self/status").splitlines())
    counters = re.compile(r"Vm|Rss|Hugetlb|voluntary|nonvoluntary")
    return {name: value.split() for name, value in lines.items() if name not in PROCESS and not counters.match(name)}


def mounts():
    found = []
    for line in text("/proc/self/mountinfo").splitlines():
        _, _, device, root, place, options, *rest = line.split()
        tags, (kind, source, super_options) = rest[: rest.index("-")], rest[rest.index("-") + 1 :]
        if kind == "overlay":
            super_options = re.sub(r"(lower|upper|work)dir=[^,]*", r"\1dir", super_options)
        if device.startswith("0:"):
            device = "anonymous"  # each tmpfs, proc and overlay is one of its own
        root = re.sub(r"[0-9a-f]{64}", "CONTAINER", root)
        tags = [tag.partition(":")[0] for tag in tags]
        found.append([place, device, root, options, tags, kind, source, super_options])
    return sorted(found)


def descriptors():
    found = {}
    for number in sorted(os.listdir("/proc/self/fd"), key=int):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue  # the listing's own
        found[number] = re.sub(r"\[\d+\]", "", target)
    return found


def writable():
    found = []
    for folder, folders, _ in os.walk("/"):
        if folder == "/":
            folders[:] = [name for name in folders if name not in ("proc", "sys")]
        if os.access(folder, os.W_OK):
            found.append(folder)
            folders.clear()
    return found


def call(number):
    library = ctypes.CDLL(None, use_errno=True)
    result = library.syscall(number, -1, -1, -1, -1, -1, -1)
    return errno.errorcode.get(ctypes.get_errno(), "done") if result == -1 else "done"


# x86_64: ptrace, keyctl, bpf, userfaultfd, perf_event_open, mount, umount2, pivot_root, unshare, setns, io_uring_setup,
# kexec_load, open_by_handle_at, name_to_handle_at, init_module, add_key, open_tree, move_mount, mount_setattr.
ASKED = (101, 250, 321, 323, 298, 165, 166, 155, 272, 308, 425, 246, 304, 303, 175, 248, 428, 429, 442)
RLIMITS = [name for name in dir(resource) if name.startswith("RLIMIT_")]
FOLDERS = ("/", "/run", "/run/isolator", "/run/secrets", "/workspace")
PLACES = (*FOLDERS, "/tmp", "/dev/shm", "/run/secrets/token", "/run/isolator/agent.sock", "/run/isolator/guest.py")
library = ctypes.CDLL(None)
print(
    json.dumps(
        {
            "status": status(),
            "mounts": mounts(),
            "fds": descriptors(),
            "environment": {name: value.replace(IDENTITY, "ID") for name, value in os.environ.items()},
            "argv": sys.argv[1:],
            "limits": text("/proc/self/limits"),
            "cgroup": text("/proc/self/cgroup"),
            "rlimits": {name: resource.getrlimit(getattr(resource, name)) for name in RLIMITS},
            "signals": {int(number): str(signal.getsignal(number)) for number in signal.valid_signals()},
            "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
            "cwd": os.getcwd(),
            "umask": os.umask(0o22),
            "ids": [os.getresuid(), os.getresgid(), os.getgroups()],
            "leader": [os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid(), os.getppid()],
            "priority": [os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0), len(os.sched_getaffinity(0))],
            "prctl": [library.prctl(option, 0, 0, 0, 0) for option in (3, 7, 16, 21, 27, 30, 37, 39, 42)],
            "personality": library.personality(0xFFFFFFFF),
            "terminal": attempt(lambda: os.close(os.open("/dev/tty", os.O_RDWR))),
            "kernel": {
                path: text(path)
                for path in (
                    "/proc/self/oom_score_adj",
                    "/proc/self/uid_map",
                    "/proc/self/gid_map",
                    "/proc/self/setgroups",
                    "/proc/self/attr/current",
                    "/proc/self/loginuid",
                    "/proc/self/timerslack_ns",
                    "/proc/self/coredump_filter",
                    "/proc/1/comm",
                    "/proc/1/oom_score_adj",
                    "/proc/sys/net/ipv4/ip_unprivileged_port_start",
                    "/proc/sys/net/ipv4/ping_group_range",
                    "/proc/sys/net/ipv6/conf/all/disable_ipv6",
                    "/proc/sys/kernel/shmmax",
                    "/proc/sys/fs/mqueue/msg_max",
                )
            },
            "pid_one": {
                name: attempt(lambda name=name: os.close(os.open(f"/proc/1/{name}", os.O_RDONLY)))
                for name in ("mem", "environ", "maps", "auxv", "stack", "syscall", "io", "cmdline", "status")
            }
            | {name: attempt(os.readlink, f"/proc/1/{name}") for name in ("cwd", "root", "exe", "ns/mnt")}
            | {"fd": attempt(os.listdir, "/proc/1/fd"), "signal": attempt(os.kill, 1, 19)},
            "processes": len([name for name in os.listdir("/proc") if name.isdigit()]),
            "interfaces": sorted(name for _, name in socket.if_nameindex()),
            "routes": sorted(
                line.split()[0:1] + line.split()[1:4] for line in text("/proc/net/route").splitlines()[1:]
            ),
            "resolver": text("/etc/resolv.conf"),
            "hosts": re.sub(r"\b10\.[\d.]+", "ADDRESS", text("/etc/hosts")),
            "hostname": socket.gethostname().replace(IDENTITY, "ID"),
            "devices": sorted(os.listdir("/dev")),
            "folders": {path: sorted(os.listdir(path)) for path in FOLDERS},
            "modes": {path: [oct(os.stat(path).st_mode), os.stat(path).st_uid] for path in PLACES},
            "writable": writable(),
            "secret": text("/run/secrets/token"),
            "calls": [call(number) for number in ASKED] if os.uname().machine == "x86_64" else [],
        }
    ),
    flush=True,
)
