"""Runs inside a box: what ordinary Python programs do. Prints one JSON object, name -> "ok" or what failed.

Standard library only: the test hands this file to `python3 -c`.
"""

import asyncio
import ctypes
import json
import math
import mmap
import multiprocessing
import os
import pty
import resource
import select
import shutil
import signal
import socket
import socketserver
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import shared_memory
from pathlib import Path


def check_threads() -> None:
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(math.isqrt, [16] * 64)) == 256


def check_multiprocessing_fork() -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(abs, [-1, -2]) == [1, 2]


def check_multiprocessing_spawn() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(math.sqrt, [9.0]) == [3.0]


def check_semaphore() -> None:
    context = multiprocessing.get_context("fork")
    gate = context.Semaphore(0)
    child = context.Process(target=gate.release)
    child.start()
    assert gate.acquire(timeout=5)
    child.join(5)
    assert child.exitcode == 0


def check_shared_memory() -> None:
    block = shared_memory.SharedMemory(create=True, size=4096)
    try:
        other = shared_memory.SharedMemory(name=block.name)
        block.buf[0] = 7
        assert other.buf[0] == 7
        other.close()
    finally:
        block.close()
        block.unlink()


def check_subprocess() -> None:
    assert (
        subprocess.run([sys.executable, "-c", "print(6*7)"], capture_output=True, timeout=10, check=True).stdout
        == b"42\n"
    )


def check_asyncio_subprocess() -> None:
    async def echo() -> bytes:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "import sys; sys.stdout.write(sys.stdin.read()[::-1])",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        return (await asyncio.wait_for(child.communicate(b"abc"), 10))[0]

    assert asyncio.run(echo()) == b"cba"


def check_asyncio_network() -> None:
    async def talk() -> bytes:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write((await reader.readline()).upper())
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"hello\n")
        line = await asyncio.wait_for(reader.readline(), 5)
        writer.close()
        server.close()
        return line

    assert asyncio.run(talk()) == b"HELLO\n"


def check_socket_server() -> None:
    class Echo(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with socket.create_connection(server.server_address, timeout=5) as client:
            client.sendall(b"echo\n")
            assert client.recv(16) == b"echo\n"
        server.shutdown()


def check_udp() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as two,
    ):
        one.bind(("127.0.0.1", 0))
        one.settimeout(5)
        two.sendto(b"datagram", one.getsockname())
        assert one.recv(64) == b"datagram"


def check_unix_socket_passes_descriptors() -> None:
    left, right = socket.socketpair()
    reader, writer = os.pipe()
    socket.send_fds(left, [b"x"], [writer])
    _, (received,), _, _ = socket.recv_fds(right, 1, 1)
    os.write(received, b"through")
    assert os.read(reader, 16) == b"through"


def check_names_and_interfaces() -> None:
    assert ("127.0.0.1", 80) in [entry[4] for entry in socket.getaddrinfo("localhost", 80, type=socket.SOCK_STREAM)]
    assert "lo" in [name for _, name in socket.if_nameindex()]


def check_sqlite() -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = sqlite3.connect(Path(folder) / "base")
        assert base.execute("pragma journal_mode=wal").fetchone() == ("wal",)
        base.execute("create table t (n)")
        base.executemany("insert into t values (?)", [(n,) for n in range(100)])
        base.commit()
        assert base.execute("select sum(n) from t").fetchone() == (4950,)
        base.close()


def check_mmap_and_memfd() -> None:
    descriptor = os.memfd_create("scratch")
    os.ftruncate(descriptor, 8192)
    with mmap.mmap(descriptor, 8192) as view:
        view[:4] = b"data"
        view.flush()
        view.resize(4096)
        assert os.pread(descriptor, 4, 0) == b"data"


def check_signals() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    os.kill(os.getpid(), signal.SIGUSR1)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
    assert signal.sigtimedwait([signal.SIGUSR2], 5)
    assert seen == [signal.SIGUSR1]


def check_pidfd() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    handle = os.pidfd_open(child.pid)
    signal.pidfd_send_signal(handle, signal.SIGTERM)
    assert select.select([handle], [], [], 5)[0]
    assert child.wait(5) == -signal.SIGTERM


def check_terminal() -> None:
    child, master = pty.fork()
    if child == 0:
        os.execvp(sys.executable, [sys.executable, "-c", "import os; print(os.isatty(0), *os.get_terminal_size())"])
    text = os.read(master, 1024)
    os.waitpid(child, 0)
    assert text.startswith(b"True"), text


def check_files() -> None:
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one", Path(folder) / "two"
        one.write_bytes(b"x" * 100_000)
        one.chmod(0o640)
        shutil.copy2(one, two)  # copystat: must shrug off that extended attributes can't be written
        assert (two.stat().st_mode, two.stat().st_mtime) == (one.stat().st_mode, one.stat().st_mtime)
        shutil.copytree(folder, Path(folder) / "tree")
        with two.open("r+b") as target, one.open("rb") as source:
            assert os.copy_file_range(source.fileno(), target.fileno(), 1000) == 1000
            assert os.sendfile(target.fileno(), source.fileno(), 0, 1000) == 1000
        subprocess.run(["cp", "-a", one, Path(folder) / "three"], check=True, timeout=10)


def check_named_pipe() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pipe = Path(folder) / "pipe"
        os.mkfifo(pipe)
        if os.fork() == 0:
            pipe.write_text("through")
            os._exit(0)
        assert pipe.read_text() == "through"
        os.wait()


def check_attributes_fail_softly() -> None:
    with tempfile.NamedTemporaryFile() as file:
        try:
            os.setxattr(file.name, "user.note", b"1")
        except OSError as error:
            assert error.errno == 95, error  # noqa: PT017
        else:
            raise AssertionError("setxattr worked")
        assert os.listxattr(file.name) == []


def check_limits_and_scheduling() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.sched_setaffinity(0, os.sched_getaffinity(0))
    os.nice(1)


def check_own_sandbox() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    instruction = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0x7FFF_0000))  # return "allow"
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 1, ctypes.addressof(instruction)))
    child = os.fork()
    if child == 0:
        refused = libc.prctl(22, 2, ctypes.byref(program), 0, 0)  # PR_SET_SECCOMP, a filter
        os._exit(1 if refused else 0)
    assert os.waitpid(child, 0)[1] == 0


def check_git() -> None:
    with tempfile.TemporaryDirectory() as folder:

        def git(*words: str) -> bytes:
            identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
            command = ["git", "-C", folder, *identity, *words]
            return subprocess.run(
                command, check=True, capture_output=True, timeout=20, env=os.environ | {"HOME": folder}
            ).stdout

        git("init", "-q")
        (Path(folder) / "file").write_text("text")
        git("add", "file")
        git("commit", "-q", "-m", "first")
        git("gc", "-q")
        assert git("log", "--format=%s") == b"first\n"


def main() -> None:
    report = {}
    for name, check in list(globals().items()):
        if not name.startswith("check_"):
            continue
        if name == "check_git" and not shutil.which("git"):
            report[name] = "absent: git"
            continue
        signal.alarm(25)
        try:
            check()
            report[name] = "ok"
        except Exception:  # noqa: BLE001
            report[name] = traceback.format_exc()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
