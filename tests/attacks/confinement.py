"""What the box says about itself, read from inside as the agent."""

# Inside a box the bare calls are the attack.
# ruff: noqa: PTH101, PTH112, PTH115, PTH123, PTH208

import ctypes
import json
import mmap
import os
import resource
import shutil
import socket


def attempt(action):
    """ "done", or the errno's name: the kernel's own word about why not."""
    try:
        action()
    except OSError as error:
        import errno

        return errno.errorcode.get(error.errno, str(error.errno))
    return "done"


def run(path):
    pid = os.fork()
    if pid == 0:
        try:
            os.execv(path, [path])
        except OSError as error:
            os._exit(error.errno)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def map_executable(path):
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    descriptor = os.open(path, os.O_RDONLY)
    place = library.mmap(None, 4096, mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE, descriptor, 0)
    number = ctypes.get_errno()
    os.close(descriptor)
    return 0 if place != ctypes.c_void_p(-1).value else number


def text(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError as error:
        return f"errno {error.errno}"


def write(path):
    with open(path, "w") as file:
        file.write("1")


status = dict(line.split(":", 1) for line in text("/proc/self/status").splitlines())
exec_tried = {}
for folder in ("/tmp", "/dev/shm"):
    copy = f"{folder}/true"
    shutil.copyfile("/usr/bin/true", copy)
    os.chmod(copy, 0o755)
    script = f"{folder}/script"
    write(script)
    with open(script, "w") as file:
        file.write("#!/usr/bin/python3\n")
    os.chmod(script, 0o755)
    exec_tried[folder] = {"binary": run(copy), "script": run(script), "mmap": map_executable(copy)}

print(
    json.dumps(
        {
            "status": {name: value.split() for name, value in status.items()},
            "cgroup": text("/proc/self/cgroup").splitlines(),
            "mounts": [line.split() for line in text("/proc/self/mountinfo").splitlines()],
            "devices": sorted(os.listdir("/dev")),
            "exec": exec_tried,
            "original": run("/usr/bin/true"),
            "original_mmap": map_executable("/usr/bin/true"),
            "writes": {
                path: attempt(lambda path=path: write(path))
                for path in (
                    "/new",
                    "/etc/passwd",
                    "/usr/bin/new",
                    "/var/new",
                    "/home/new",
                    "/root/new",
                    "/run/new",
                    "/run/isolator/new",
                    "/run/isolator/guest.py",
                    "/proc/sys/kernel/core_pattern",
                    "/proc/sysrq-trigger",
                    "/proc/self/oom_score_adj_",
                    "/sys/power/state",
                    "/tmp/new",
                    "/dev/shm/new",
                    "/dev/new",
                )
            },
            "reads": {
                path: text(path)[:80]
                for path in (
                    "/proc/kcore",
                    "/proc/keys",
                    "/proc/timer_list",
                    "/proc/cmdline",
                    "/proc/interrupts",
                    "/proc/version",
                )
            },
            "listings": {
                path: len(os.listdir(path))
                for path in (
                    "/sys/fs/cgroup",
                    "/sys/firmware",
                    "/sys/kernel",
                    "/sys/class",
                    "/proc/acpi",
                    "/sys/module",
                )
                if os.path.isdir(path)
            },
            "pids": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
            "hostname": socket.gethostname(),
            "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")},
            "core": resource.getrlimit(resource.RLIMIT_CORE),
            "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
            "lower_oom_score": attempt(lambda: os.write(os.open("/proc/self/oom_score_adj", os.O_WRONLY), b"-1000")),
            "chown": attempt(lambda: os.chown("/tmp/true", 0, 0)),
            "setuid": attempt(lambda: os.setuid(0)),
            "chroot": attempt(lambda: os.chroot("/tmp")),
            "mknod": attempt(lambda: os.mknod("/tmp/sda", 0o060666, os.makedev(254, 0))),
        }
    )
)
