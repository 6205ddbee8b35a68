"""Attacks on PID 1, the guest, and on its socket, by a process of the same uid."""

# Inside a box the bare calls are the attack.
# ruff: noqa: PTH101, PTH104, PTH108, PTH123, PTH208, RUF015, SIM115

import ctypes
import errno
import json
import os
import signal
import socket

LIBRARY = ctypes.CDLL(None, use_errno=True)
EXITED = 4
HELLO = 1


def attempt(action):
    try:
        action()
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno))
    return "done"


def read(path):
    with open(path, "rb") as file:
        file.read(64)


def call(name, *arguments):
    ctypes.set_errno(0)
    if getattr(LIBRARY, name)(*arguments) >= 0:
        return "done"
    return errno.errorcode.get(ctypes.get_errno(), "?")


def frame(kind, *fields):
    body = bytes((kind,)) + b"".join(len(field).to_bytes(4, "big") + field for field in fields)
    return len(body).to_bytes(4, "big") + body


def forge(*frames):
    """Connect as the guest does and say something; what came back."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(5)
        link.connect("/run/isolator/agent.sock")
        try:
            for data in frames:
                link.sendall(data)
            return link.recv(4096).hex()
        except OSError as error:
            return errno.errorcode.get(error.errno, "timeout")


def replace_socket():
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as mine:
        mine.bind("/run/isolator/agent.sock")


vector = (ctypes.c_char * 64)()


class Vec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


own = Vec(ctypes.addressof(vector), 64)
child = os.fork()
if child == 0:
    signal.pause()

result = {
    "read": {name: attempt(lambda name=name: read(f"/proc/1/{name}")) for name in ("environ", "mem", "maps", "auxv")},
    "read_own_child": attempt(lambda: read(f"/proc/{child}/environ")),
    "fds": attempt(lambda: os.listdir("/proc/1/fd")),
    "root": attempt(lambda: os.listdir("/proc/1/root/")),
    "kill": {
        number: attempt(lambda number=number: os.kill(1, number))
        for number in (int(signal.SIGKILL), int(signal.SIGSTOP), int(signal.SIGSEGV), int(signal.SIGTSTP))
    },
    "ptrace": call("ptrace", 16, 1, 0, 0),
    "ptrace_own_child": call("ptrace", 16, child, 0, 0),
    "vm_read": call("process_vm_readv", 1, ctypes.byref(own), 1, ctypes.byref(own), 1, 0),
    "guest_program": attempt(lambda: open("/run/isolator/guest.py", "a")),
    "guest_rename": attempt(lambda: os.rename("/run/isolator/guest.py", "/run/isolator/other.py")),
    "socket_unlink": attempt(lambda: os.unlink("/run/isolator/agent.sock")),
    "socket_replace": attempt(replace_socket),
    "socket_chmod": attempt(lambda: os.chmod("/run/isolator/agent.sock", 0)),
    "forged_exit": forge(frame(HELLO, b"ended", b"1", b"0", b"0", b"0"), frame(EXITED, b"0", b"0")),
    "forged_hello": forge(frame(HELLO, b"waiting", b"1", b"0", b"0", b"0")),
    "listens_for_nothing": forge(),
}
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
with open("/proc/1/status") as file:
    result["pid_one_state"] = [line.split()[1] for line in file if line.startswith("State")][0]
print(json.dumps(result), flush=True)
if os.environ.get("STAY"):
    signal.pause()
