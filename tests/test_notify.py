"""systemd's protocol against real datagram sockets and real passed descriptors."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from isolator.host.systemd import notify, watchdog_interval
from isolator.model.errors import Unavailable

PROBE = """
import json, os, socket, sys
sys.path.insert(0, sys.argv[1])
from isolator.host.systemd import listen_fds
from isolator.model.errors import IsolatorError
os.environ["LISTEN_PID"] = os.environ.pop("PROBE_PID", None) or str(os.getpid())
def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
answer = {"code": None, "sockets": []}
try:
    passed = listen_fds()
    answer["sockets"] = [
        {"name": one.getsockname(), "inheritable": one.get_inheritable(), "blocking": one.getblocking()}
        for one in passed
    ]
except IsolatorError as error:
    answer["code"] = error.code
answer["left"] = sorted(name for name in os.environ if name.startswith("LISTEN_"))
answer["open"] = [fd for fd in range(3, 3 + int(os.environ["PROBE_COUNT"])) if is_open(fd)]
print(json.dumps(answer))
"""


def receiver(address: str) -> socket.socket:
    box = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    box.bind(address)
    box.settimeout(5)
    return box


@pytest.fixture
def no_manager(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_notify_reaches_a_path_socket(no_manager: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with receiver(str(tmp_path / "notify")) as box:
        no_manager.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        assert notify("READY=1\nSTATUS=two agents")
        assert box.recv(4096) == b"READY=1\nSTATUS=two agents"


def test_notify_reaches_an_abstract_socket(no_manager: pytest.MonkeyPatch) -> None:
    name = f"isolator-test-{secrets.token_hex(8)}"
    with receiver("\0" + name) as box:
        no_manager.setenv("NOTIFY_SOCKET", "@" + name)
        assert notify("WATCHDOG=1")
        assert box.recv(4096) == b"WATCHDOG=1"


def test_notify_without_a_manager_says_false(no_manager: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not notify("READY=1")
    for address in ("", "relative/path", "vsock:2:1234", str(tmp_path / "nobody-listens")):
        no_manager.setenv("NOTIFY_SOCKET", address)
        assert not notify("READY=1"), address


def test_notify_never_hangs_on_a_manager_that_stopped_reading(no_manager: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with receiver(str(tmp_path / "notify")):
        no_manager.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        sent = 0
        started = time.monotonic()
        while notify("STATUS=" + "x" * 1000):
            sent += 1
            started = time.monotonic()
            assert sent < 100_000, "the queue of a datagram socket is bounded"
        assert sent > 0
        assert time.monotonic() - started < 5


def test_watchdog_is_half_of_what_is_allowed(no_manager: pytest.MonkeyPatch) -> None:
    assert watchdog_interval() is None
    no_manager.setenv("WATCHDOG_USEC", "30000000")
    assert watchdog_interval() == 15.0
    no_manager.setenv("WATCHDOG_PID", str(os.getpid()))
    assert watchdog_interval() == 15.0


def test_watchdog_of_another_process_is_not_ours(no_manager: pytest.MonkeyPatch) -> None:
    no_manager.setenv("WATCHDOG_USEC", "30000000")
    no_manager.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    assert watchdog_interval() is None


@pytest.mark.parametrize(
    ("allowed", "watched"),
    [("0", None), ("-5", None), ("", None), ("1e6", None), ("٣", None), ("1000000", "me"), ("1000000", "")],
)
def test_malformed_watchdog_is_refused(no_manager: pytest.MonkeyPatch, allowed: str, watched: str | None) -> None:
    no_manager.setenv("WATCHDOG_USEC", allowed)
    if watched is not None:
        no_manager.setenv("WATCHDOG_PID", watched)
    with pytest.raises(Unavailable) as refusal:
        watchdog_interval()
    assert refusal.value.code == "watchdog_invalid"


def probe(sockets: list[socket.socket], *, count: str | None = None, pid: str = "") -> dict:
    """Run listen_fds in a process that was given these sockets at descriptor 3 and up, as systemd does."""
    high = [os.dup2(one.fileno(), 100 + place, inheritable=True) for place, one in enumerate(sockets)]
    move = "; ".join(f"os.dup2({source}, {3 + place})" for place, source in enumerate(high))
    shut = "; ".join(f"os.close({source})" for source in high)
    launcher = f"import os, sys; {move or 'pass'}; {shut or 'pass'}; os.execv(sys.executable, sys.argv[1:])"
    environment = {
        "PATH": os.environ["PATH"],
        "LISTEN_FDS": str(len(sockets)) if count is None else count,
        "LISTEN_FDNAMES": "api",
        "PROBE_COUNT": str(len(sockets)),
    }
    if pid:
        environment["PROBE_PID"] = pid
    root = str(Path(__file__).resolve().parent.parent)
    try:
        done = subprocess.run(
            [sys.executable, "-c", launcher, sys.executable, "-c", PROBE, root],
            env=environment, pass_fds=high, capture_output=True, timeout=60, check=True,
        )  # fmt: skip
    finally:
        for descriptor in high:
            os.close(descriptor)
    return json.loads(done.stdout)


def listening(path: Path) -> socket.socket:
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    one.bind(str(path))
    one.listen(8)
    return one


def test_sockets_passed_to_us_are_taken(tmp_path: Path) -> None:
    with listening(tmp_path / "a") as first, listening(tmp_path / "b") as second:
        answer = probe([first, second])
    assert answer["code"] is None
    assert [one["name"] for one in answer["sockets"]] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert all(not one["inheritable"] and not one["blocking"] for one in answer["sockets"])
    assert answer["left"] == []


def test_sockets_passed_to_another_process_are_left_alone(tmp_path: Path) -> None:
    with listening(tmp_path / "a") as first:
        answer = probe([first], pid="1")
    assert answer["sockets"] == []
    assert answer["code"] is None
    assert answer["left"] == []
    assert answer["open"] == [3]


def test_anything_but_a_listening_unix_stream_is_refused(tmp_path: Path) -> None:
    tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    tcp.bind(("127.0.0.1", 0))
    tcp.listen(1)
    datagram = receiver(str(tmp_path / "datagram"))
    connected, other = socket.socketpair()
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bound.bind(str(tmp_path / "bound"))
    with tcp, datagram, connected, other, bound:
        for wrong in (tcp, datagram, connected, bound):
            with listening(tmp_path / f"good-{wrong.fileno()}") as good:
                answer = probe([good, wrong])
            assert answer["code"] == "socket_activation_invalid", wrong
            assert answer["open"] == [], "the good one must not be left open for a half-started daemon"
            assert answer["left"] == []


@pytest.mark.parametrize("count", ["-1", "many", "", "17", "٣"])
def test_malformed_count_is_refused(count: str) -> None:
    answer = probe([], count=count)
    assert answer["code"] == "socket_activation_invalid"
    assert answer["left"] == []


def test_a_descriptor_that_is_no_socket_is_refused() -> None:
    answer = probe([], count="1")
    assert answer["code"] == "socket_activation_invalid"
