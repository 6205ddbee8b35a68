"""The guest's protocol, word by word, with a real guest as PID 1 of a namespace and no engine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import time
from pathlib import Path

import pytest
from conftest import wait_for
from engine_helpers import lives
from guest_helpers import guest

from isolator.agents.frames import BYE, EXITED, FAILED, GO, HELLO, SIGNAL, STARTED
from isolator.host.processes import is_init_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a PID namespace of one's own needs root")

SH = ("/bin/sh", "-c")


def test_nothing_runs_before_it_is_released(tmp_path: Path) -> None:
    with guest(tmp_path, *SH, f"touch {tmp_path}/ran; exit 3") as box:
        link = box.accept()
        hello = link.frame(HELLO)
        assert hello.fields == (b"waiting", b"2", b"0", b"0", b"0")
        time.sleep(0.2)
        assert not (tmp_path / "ran").exists()
        link.send(GO)
        assert link.frame(STARTED).number(0) > 1
        assert link.frame(EXITED).fields == (b"3", b"0")
        assert (tmp_path / "ran").exists()
        link.send(BYE)
        assert box.ended() == 3


def test_secrets_arrive_as_files_and_variables_and_nowhere_else(tmp_path: Path) -> None:
    secret = bytes(range(1, 256)) * 100
    command = f"cat {tmp_path}/secrets/token | md5sum; stat -c %a {tmp_path}/secrets/token; echo $KEY"
    with guest(tmp_path, *SH, command) as box:
        link = box.released(b"stoken\x00" + secret, b"EKEY\x00hunter2")
        pid = box.host_pid()
        link.frame(STARTED)
        link.frame(EXITED)
        assert b"hunter2" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert b"hunter2" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        link.send(BYE)
        box.ended()
        lines = box.output().decode().split("\n")
    assert lines[0].split()[0] == hashlib.md5(secret).hexdigest()
    assert lines[1:3] == ["400", "hunter2"]


@pytest.mark.parametrize(
    ("program", "errno"),
    [
        ("/no/such", 2),
        ("no-such", 2),
        ("/etc/passwd", 13),
        ("/usr", 13),
        ("{folder}/garbage", 8),
        ("{folder}/orphan", 2),
    ],
)
def test_a_command_that_cannot_run_is_told_with_its_errno(tmp_path: Path, program: str, errno: int) -> None:
    (tmp_path / "garbage").write_bytes(b"\x00\x01\x02")
    (tmp_path / "orphan").write_text("#!/no/such/interpreter\n")
    for name in ("garbage", "orphan"):
        (tmp_path / name).chmod(0o755)
    with guest(tmp_path, program.format(folder=tmp_path), farewell=0.3) as box:
        link = box.released()
        assert link.frame(FAILED).number(0) == errno
        assert box.ended() == 125, "it leaves by itself, and no other command can be given to it"


def test_without_a_command_it_waits_for_a_signal(tmp_path: Path) -> None:
    with guest(tmp_path) as box:
        link = box.released()
        assert link.frame(STARTED).number(0) == 0
        link.send(SIGNAL, b"15")
        assert box.ended() == 128 + 15


def test_it_leaves_when_nobody_releases_it(tmp_path: Path) -> None:
    with guest(tmp_path, *SH, f"touch {tmp_path}/ran", release=0.5) as box:
        box.accept().frame(HELLO)
        assert box.ended() == 125
    assert not (tmp_path / "ran").exists()


def test_it_leaves_with_its_commands_code_when_nobody_says_goodbye(tmp_path: Path) -> None:
    with guest(tmp_path, *SH, "exit 4", farewell=0.3) as box:
        link = box.released()
        link.frame(STARTED)
        link.frame(EXITED)
        assert box.ended() == 4


def test_it_knocks_again_when_the_daemon_comes_back(tmp_path: Path) -> None:
    with guest(tmp_path, *SH, f"while ! [ -e {tmp_path}/go ]; do sleep 0.02; done; exit 6", farewell=20) as box:
        link = box.released()
        child = link.frame(STARTED).fields[0]
        link.connection.close()
        again = box.accept()
        assert again.frame(HELLO).fields == (b"running", b"2", b"0", b"0", child)
        again.connection.close()
        box.give_up()
        (tmp_path / "go").touch()
        time.sleep(0.3)
        box.listen()
        last = box.accept()
        assert last.frame(HELLO).fields == (b"ended", b"2", b"6", b"0", b"0"), "an end nobody heard is told anew"
        last.send(BYE)
        assert box.ended() == 6


@pytest.mark.parametrize(("script", "told"), [("kill -9 $$", (b"0", b"9")), ("exit 137", (b"137", b"0"))])
def test_a_signal_is_told_from_a_code(tmp_path: Path, script: str, told: tuple[bytes, bytes]) -> None:
    with guest(tmp_path, *SH, script) as box:
        link = box.released()
        link.frame(STARTED)
        assert link.frame(EXITED).fields == told


def test_signals_reach_the_whole_group(tmp_path: Path) -> None:
    child = f"trap 'touch {tmp_path}/child; exit' TERM; touch {tmp_path}/up; while :; do sleep 0.02; done"
    script = f"({child}) & trap 'sleep 0.3; exit 5' TERM; while :; do sleep 0.02; done"
    with guest(tmp_path, *SH, script) as box:
        link = box.released()
        link.frame(STARTED)
        wait_for((tmp_path / "up").exists, 5)
        link.send(SIGNAL, b"15")
        assert link.frame(EXITED).fields == (b"5", b"0")
        assert (tmp_path / "child").exists()


BREAKING = {
    "a huge length": b"\xff\xff\xff\xff" + b"x" * 10,
    "a length of nothing": b"\x00\x00\x00\x00",
    "a field beyond its frame": b"\x00\x00\x00\x06B\xff\xff\xff\xff1",
    "half a field's length": b"\x00\x00\x00\x03B\x00\x00",
}
IGNORED = {
    "an unknown kind": b"\x00\x00\x00\x01\xc8",
    "a signal without a number": b"\x00\x00\x00\x01B",
    "a signal that is no number": b"\x00\x00\x00\x08B\x00\x00\x00\x03abc",
    "a signal of no kind": b"\x00\x00\x00\x08B\x00\x00\x00\x03999",
    "an endless number": b"\x00\x00\x00\x19B\x00\x00\x00\x14" + b"9" * 20,
    "a second GO": b"\x00\x00\x00\x01A",
    "a goodbye too early": b"\x00\x00\x00\x01C",
}


@pytest.mark.parametrize("words", [*BREAKING, *IGNORED])
def test_nonsense_from_the_daemon_never_harms_the_command(tmp_path: Path, words: str) -> None:
    with guest(tmp_path, *SH, f"while ! [ -e {tmp_path}/go ]; do sleep 0.02; done; exit 8") as box:
        link = box.released()
        link.frame(STARTED)
        link.connection.sendall({**BREAKING, **IGNORED}[words])
        if words in BREAKING:
            assert link.hung_up(), "a link that makes no sense is ended"
            link = box.accept()
            assert link.frame(HELLO).fields[0] == b"running"
        (tmp_path / "go").touch()
        assert link.frame(EXITED).fields == (b"8", b"0")
        link.send(BYE)
        assert box.ended() == 8


def test_frames_may_come_in_pieces_and_together(tmp_path: Path) -> None:
    with guest(tmp_path, *SH, "trap 'exit 9' USR1; echo $A; while :; do sleep 0.02; done") as box:
        link = box.accept()
        link.frame(HELLO)
        for byte in b"\x00\x00\x00\x0bA\x00\x00\x00\x06EA\x00yes":
            link.connection.sendall(bytes((byte,)))
        link.frame(STARTED)
        time.sleep(0.2)
        link.connection.sendall(b"\x00\x00\x00\x01\xc8" + b"\x00\x00\x00\x07B\x00\x00\x00\x0210")
        assert link.frame(EXITED).fields == (b"9", b"0")
        link.send(BYE)
        box.ended()
        assert box.output() == b"yes\n"


def test_a_flood_of_signals_from_the_command_loses_no_end(tmp_path: Path) -> None:
    script = """
import os, signal
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
for _ in range(100000):
    os.kill(1, signal.SIGUSR1)
os._exit(7)
"""
    with guest(tmp_path, "/usr/bin/env", "python3", "-c", script) as box:
        link = box.released()
        link.frame(STARTED)
        assert link.frame(EXITED).fields == (b"7", b"0")


def test_a_full_queue_of_knockers_does_not_hold_it_up(tmp_path: Path) -> None:
    """Whoever shares the box can fill the socket's queue; the guest must go on reaping and leave in time."""
    with guest(tmp_path, *SH, f"while ! [ -e {tmp_path}/go ]; do sleep 0.02; done; exit 2", farewell=0.5) as box:
        link = box.released()
        link.frame(STARTED)
        box.give_up()
        box.listen(backlog=0)
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                knocker = stack.enter_context(contextlib.closing(socket.socket(socket.AF_UNIX)))
                knocker.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    knocker.connect(str(tmp_path / "agent.sock"))
            link.connection.close()
            time.sleep(0.5)
            (tmp_path / "go").touch()
            assert box.ended(8) == 2


def test_all_that_the_command_left_ends_with_it(tmp_path: Path) -> None:
    with guest(tmp_path, *SH, f"setsid sh -c 'echo $$ > {tmp_path}/left; exec sleep 600' & sleep 0.3; exit 0") as box:
        link = box.released()
        link.frame(STARTED)
        wait_for(lambda: (tmp_path / "left").exists() and (tmp_path / "left").read_text().strip(), 5)
        pid = box.host_pid()
        children = Path(f"/proc/{pid}/task/{pid}/children")
        below = [int(word) for word in children.read_text().split()]
        assert below
        link.frame(EXITED)
        wait_for(lambda: not any(lives(child) for child in below) and children.read_text() == "", 5)


def test_only_pid_one_of_the_very_container_is_taken_for_its_guest(tmp_path: Path) -> None:
    with guest(tmp_path, *SH, "sleep 600") as box:
        box.released().frame(STARTED)
        pid = box.host_pid()
        word = Path(f"/proc/{pid}/cgroup").read_text().split(":")[1] or ":"
        assert is_init_of(pid, word)
        assert not is_init_of(pid, "0" * 64), "another container's"
        command = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
        assert not is_init_of(int(command), word), "a process beside PID 1"
    assert not is_init_of(os.getpid(), word), "a process of the host"
    assert not is_init_of(1, word), "PID 1 of the host"
    assert not is_init_of(2**22 - 1, word), "nobody"
