"""Bombs. The first argument names one; each says how far it came."""

# Inside a box the bare calls are the attack.
# ruff: noqa: PTH108, PTH123, PTH208, SIM105

import errno
import json
import os
import resource
import signal
import sys
import threading
import time

MEBIBYTE = 1024 * 1024


def processes():
    """Fork for ever; tell where it ended."""
    children, error = [], None
    for _ in range(100_000):
        try:
            pid = os.fork()
        except OSError as failure:
            error = errno.errorcode[failure.errno]
            break
        if pid == 0:
            signal.pause()
        children.append(pid)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return {"made": len(children), "error": error}


def fork_bomb():
    """Every process forks on; nobody ever waits. Never returns."""
    print("bombing", flush=True)
    while True:
        try:
            os.fork()
        except OSError:
            pass


def threads():
    made, gate = 0, threading.Event()
    try:
        for _ in range(100_000):
            threading.Thread(target=gate.wait).start()
            made += 1
    except RuntimeError:
        pass
    gate.set()
    return {"made": made}


def memory():
    held = []
    while True:
        held.append(bytearray(16 * MEBIBYTE))
        print(len(held) * 16, flush=True)


def shared_memory():
    """Files of a tmpfs are memory too."""
    with open("/dev/shm/flood", "wb") as file:
        while True:
            file.write(os.urandom(MEBIBYTE))


def disk():
    """Fill both scratch places; how much each took, and the error at its end."""
    taken = {}
    for folder in ("/tmp", "/dev/shm"):
        size, error = 0, None
        with open(f"{folder}/flood", "wb", buffering=0) as file:
            try:
                while True:
                    size += file.write(b"\0" * 65536)
            except OSError as failure:
                error = errno.errorcode[failure.errno]
        os.unlink(f"{folder}/flood")
        taken[folder] = {"size": size, "error": error}
    return taken


def inodes():
    made, error = 0, None
    try:
        for number in range(1_000_000):
            os.close(os.open(f"/tmp/{number}", os.O_CREAT | os.O_WRONLY))
            made += 1
    except OSError as failure:
        error = errno.errorcode[failure.errno]
    return {"made": made, "error": error}


def descriptors():
    made, error = 0, None
    held = []
    try:
        while True:
            held.append(os.open("/dev/null", os.O_RDONLY))
            made += 1
    except OSError as failure:
        error = errno.errorcode[failure.errno]
    for descriptor in held:
        os.close(descriptor)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (made * 4, made * 4))
        raised = "done"
    except ValueError as refusal:
        raised = str(refusal)
    return {"made": made, "error": error, "raised": raised}


def output():
    """40 MiB of output, numbered, in lines of 1 KiB."""
    for number in range(40 * 1024):
        sys.stdout.write(f"{number:>10} {'x' * 1012}\n")
    return {}


def cpu():
    """Burn on two threads' worth of processes for two seconds; the time the kernel granted them."""
    pid = os.fork()
    began = time.monotonic()
    while time.monotonic() - began < 2:
        pass
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    used = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"cores": used / (time.monotonic() - began)}


def core():
    pid = os.fork()
    if pid == 0:
        os.chdir("/tmp")
        resource.setrlimit(resource.RLIMIT_CORE, resource.getrlimit(resource.RLIMIT_CORE))
        os.abort()
    _, status = os.waitpid(pid, 0)
    return {"signal": os.WTERMSIG(status), "dumped": os.WCOREDUMP(status), "files": os.listdir("/tmp")}


print(json.dumps(globals()[sys.argv[1]]()), flush=True)
