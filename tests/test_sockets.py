"""What is sent along with a message to one of our sockets: open files, whose closing may take as long as one likes."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import wait_for

from isolator.host import sockets
from isolator.host.sockets import DeafSocket, without_descriptors

LINGERS = 20


def lingering() -> tuple[socket.socket, socket.socket]:
    """A socket whose last close takes LINGERS seconds, for its peer reads nothing; and that peer."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        sender = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
    sender.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sender.send(b"x" * 65536)
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGERS))
    return sender, peer


def send_along(caller: socket.socket, descriptors: list[int]) -> None:
    rights = array.array("i", descriptors)
    caller.sendmsg([b"{"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


@pytest.fixture(params=["kernel", "ourselves"])
def listener(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    if request.param == "ourselves":
        monkeypatch.setattr(sockets, "_SO_PASSRIGHTS", 9999)  # as a kernel that does not know it
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(tmp_path / "s"))
    made.listen()
    with without_descriptors(made) as ready:
        if request.param == "kernel" and isinstance(ready, DeafSocket):
            pytest.skip("this kernel has no SO_PASSRIGHTS")
        yield ready


def test_an_open_file_sent_along_holds_up_nobody(listener: socket.socket) -> None:
    slow, peer = lingering()
    heard: list[bytes] = []
    with peer, socket.socket(socket.AF_UNIX) as caller:
        caller.connect(listener.getsockname())
        connection, _ = listener.accept()
        with connection:
            try:
                send_along(caller, [slow.fileno()] * 253)
            except PermissionError:
                slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            slow.close()
            caller.shutdown(socket.SHUT_WR)
            reader = threading.Thread(target=lambda: heard.append(connection.recv(100)), daemon=True)
            reader.start()
            reader.join(LINGERS / 4)
            assert heard == [b""], "it still waits for somebody else's socket to close"


def test_what_is_only_said_is_heard(listener: socket.socket) -> None:
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(listener.getsockname())
        connection, _ = listener.accept()
        with connection:
            caller.sendall(b"only words")
            assert connection.recv(100) == b"only words"
            caller.close()
            assert connection.recv(100) == b""


def test_nothing_stays_open(tmp_path: Path) -> None:
    listening = DeafSocket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "s"))
    listening.listen()
    with listening, socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(tmp_path / "s"))
        connection, _ = listening.accept()
        with connection:
            before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - one number
            for _ in range(20):
                send_along(caller, [0] * 253)
                assert connection.recv(100) == b""
            wait_for(lambda: len(os.listdir("/proc/self/fd")) <= before, 5)  # noqa: PTH208
