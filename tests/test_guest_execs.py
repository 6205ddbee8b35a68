"""The guest's execs, frame by frame: started with the descriptors handed over, told exactly, ended to the last process.

A real guest as PID 1 of a namespace, no engine. Marks are made with `exec -a`-like argv: a process is found on the
host by its command line, whatever it does in its namespace.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import wait_for
from engine_helpers import lives
from guest_helpers import GuestBox, GuestLink, guest

from isolator.agents.frames import (
    BYE,
    EXEC,
    EXEC_EXITED,
    EXEC_FAILED,
    EXEC_GONE,
    EXEC_KILL,
    EXEC_SIGNAL,
    EXEC_STARTED,
    EXITED,
    HELLO,
    STARTED,
    Frame,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a PID namespace of one's own needs root")

SH = ("/bin/sh", "-c")
STAY = ("/bin/sh", "-c", "while :; do sleep 60; done")


@pytest.fixture
def mark() -> str:
    """A word that only this test's processes have in their command line."""
    return f"mark-{secrets.token_hex(6)}"


def marked(mark: str) -> list[int]:
    """Processes of the host with this word among their arguments, but guests and their runners."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and lives(int(entry.name)):
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if mark.encode() in words and not any(word.endswith(b"guest.py") for word in words):
                found.append(int(entry.name))
    return found


def runners(box: GuestBox) -> list[int]:
    """The guest's children that are runners, spare or not, as the host numbers them."""
    pid = box.host_pid()
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in children if b"guest.py" in Path(f"/proc/{child}/cmdline").read_bytes()]


def strays(box: GuestBox) -> list[int]:
    """What lives in the guest's namespace but itself and its runners: one look, which a quick one may slip through."""
    space = Path(f"/proc/{box.host_pid()}/ns/pid").stat().st_ino
    known = {box.host_pid(), *runners(box)}
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in known and lives(int(entry.name)):
            try:
                if (entry / "ns/pid").stat().st_ino == space:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[tuple[GuestBox, GuestLink]]:
    """A guest without a command, released."""
    with guest(tmp_path) as box:
        link = box.released()
        link.frame(STARTED)
        yield box, link


def test_an_exec_reads_writes_and_ends_as_told(idle: tuple[GuestBox, GuestLink], tmp_path: Path) -> None:
    _, link = idle
    code = "import os,sys; d=sys.stdin.buffer.read(); os.write(1,d); os.write(2,os.environ['A'].encode()); sys.exit(7)"
    streams = link.execute(b"1", sys.executable, "-c", code, cwd=str(tmp_path), env={"A": "é"})
    data = bytes(range(256)) * 100
    assert link.frame(EXEC_STARTED).number(1) > 1
    os.write(streams.stdin, data)
    streams.end_input()
    assert streams.read() == (data, "é".encode())
    assert link.frame(EXEC_EXITED).fields == (b"1", b"7", b"0")
    assert link.frame(EXEC_GONE).fields == (b"1",)
    streams.close()


def test_the_working_folder_the_agents_variables_and_nothing_open(tmp_path: Path) -> None:
    with guest(tmp_path) as box:
        link = box.released(b"EKEY\x00hunter2", b"vTERM\x00x")
        link.frame(STARTED)
        first = link.execute(b"0", "/bin/true")  # so that the second one runs under a runner that stood by
        link.until_gone(b"0")
        for number in (b"1", b"2"):
            streams = link.execute(number, *SH, "pwd; echo $KEY $TERM; ls /proc/self/fd", cwd=str(tmp_path))
            link.until_gone(number)
            lines = streams.read()[0].decode().split()
            assert lines[:3] == [str(tmp_path), "hunter2", "x"]
            assert lines[3:] == ["0", "1", "2", "3"], "3 is the listing's own"
            streams.close()
        first.close()


@pytest.mark.parametrize(
    ("program", "cwd", "errno", "where"),
    [
        ("/no/such", "/", 2, "program"),
        ("no-such-program", "/", 2, "program"),
        ("/etc/passwd", "/", 13, "program"),
        ("/bin/true", "/no/such", 2, "cwd"),
        ("/bin/true", "/etc/passwd", 20, "cwd"),
    ],
)
def test_what_can_not_be_started_is_told_with_its_reason(
    idle: tuple[GuestBox, GuestLink], program: str, cwd: str, errno: int, where: str
) -> None:
    _, link = idle
    streams = link.execute(b"1", program, cwd=cwd)
    told = link.frame(EXEC_FAILED)
    assert (told.field(0), told.number(1)) == (b"1", errno)
    assert (told.field(2) == b"cwd") is (where == "cwd")
    assert link.frame(EXEC_GONE).fields == (b"1",)
    assert streams.read() == (b"", b""), "nobody holds the descriptors"
    streams.close()


def test_signals_reach_the_group_and_are_told(idle: tuple[GuestBox, GuestLink]) -> None:
    _, link = idle
    streams = link.execute(b"1", *SH, "sleep 60 & echo ready; wait")
    link.frame(EXEC_STARTED)
    assert streams.line() == b"ready"
    for nonsense in (b"x", b"", b"-9", b"9999", b"77"):
        link.send(EXEC_SIGNAL, b"1", nonsense)
    link.send(EXEC_SIGNAL, b"other", b"9")
    link.send(EXEC_SIGNAL, b"1", b"15")
    assert link.frame(EXEC_EXITED).fields == (b"1", b"0", b"15")
    assert link.frame(EXEC_GONE).fields == (b"1",)
    streams.close()


def test_the_next_execs_runner_stands_by(idle: tuple[GuestBox, GuestLink]) -> None:
    box, link = idle
    assert runners(box) == []
    streams = link.execute(b"1", "/bin/true")
    link.until_gone(b"1")
    spare = wait_for(lambda: runners(box), 5)
    assert len(spare) == 1
    second = link.execute(b"2", *STAY)
    link.frame(EXEC_STARTED)
    assert runners(box) == spare, "no further one was made for it"
    streams.close()
    second.close()


# Double-forked, each generation in a session of its own, signals ignored, output closed.
TREE = """
import os, signal, sys, time
for number in (1, 2, 3, 15):
    signal.signal(number, signal.SIG_IGN)
for _ in range(4):
    if os.fork():
        {parent}
    os.setsid()
os.closerange(0, 3)
time.sleep(600)
"""


@pytest.mark.parametrize("parent", ["time.sleep(600)", "os._exit(0)"])
def test_a_kill_ends_every_process_of_the_exec_and_of_no_other(
    idle: tuple[GuestBox, GuestLink], mark: str, parent: str
) -> None:
    _, link = idle
    other = link.execute(b"other", *SH, "echo ready; read x; echo $x", mark + "-other")
    link.frame(EXEC_STARTED)
    streams = link.execute(b"1", sys.executable, "-c", TREE.format(parent=parent), mark)
    wait_for(lambda: len(marked(mark)) == (5 if "sleep" in parent else 1), 10)
    link.send(EXEC_KILL, b"1")
    told = link.until_gone(b"1")
    assert [frame.kind for frame in told] == [EXEC_STARTED, EXEC_EXITED, EXEC_GONE]
    assert marked(mark) == [], "when it is told, nothing is left"
    os.write(other.stdin, b"alive\n")
    assert [other.line(), other.line()] == [b"ready", b"alive"]
    assert link.frame(EXEC_EXITED).fields == (b"other", b"0", b"0")
    streams.close()
    other.close()


HOPS = "import os,sys\nwhile True:\n    if os.fork(): os._exit(0)\n    os.setsid()\n"


def test_a_process_that_hops_from_fork_to_fork_is_caught(idle: tuple[GuestBox, GuestLink]) -> None:
    box, link = idle
    streams = link.execute(b"1", sys.executable, "-S", "-c", HOPS)
    link.frame(EXEC_STARTED)
    assert link.frame(EXEC_EXITED).fields == (b"1", b"0", b"0")
    link.connection.settimeout(0.3)
    with pytest.raises(TimeoutError):
        link.any_frame()  # it goes on, or its exec would be gone
    link.connection.settimeout(10)
    link.send(EXEC_KILL, b"1")
    assert link.frame(EXEC_GONE).fields == (b"1",)
    for _ in range(20):
        assert strays(box) == []
    streams.close()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGALRM])
def test_the_orphans_of_a_runner_that_somebody_ended_are_hunted(tmp_path: Path, mark: str, end: int) -> None:
    """Neither the command nor what daemonised itself before is hurt."""
    daemonised = (
        "import os,time\nif os.fork(): time.sleep(600)\nos.setsid()\nif os.fork(): os._exit(0)\n"
        f"os.execv('/bin/sh', ['sh', '-c', 'read x < {tmp_path}/never', '{mark}-daemon'])"
    )
    os.mkfifo(tmp_path / "never")
    with guest(tmp_path, sys.executable, "-S", "-c", daemonised, f"{mark}-command") as box:
        link = box.released()
        link.frame(STARTED)
        wait_for(lambda: marked(f"{mark}-daemon") and marked(f"{mark}-command"), 5)
        time.sleep(0.05)  # the kernel counts starts in hundredths of a second
        streams = link.execute(b"1", sys.executable, "-c", TREE.format(parent="time.sleep(600)"), mark)
        hopping = link.execute(b"2", sys.executable, "-S", "-c", HOPS)
        wait_for(lambda: len(marked(mark)) == 5, 10)
        for runner in runners(box):
            os.kill(runner, end)
        told = link.until_gone(b"1")
        assert [frame.fields[1:] for frame in told if frame.kind == EXEC_EXITED] == [(b"0", b"9")]
        assert marked(mark) == []
        assert len(strays(box)) == 2, "the command and its daemon"
        assert len(marked(f"{mark}-daemon")) == len(marked(f"{mark}-command")) == 1
        later = link.execute(b"3", "/bin/true")
        assert Frame(EXEC_EXITED, (b"3", b"0", b"0")) in link.until_gone(b"3")
        for item in (streams, hopping, later):
            item.close()


def test_a_runner_that_somebody_stopped_is_ended_with_its_exec(idle: tuple[GuestBox, GuestLink], mark: str) -> None:
    box, link = idle
    streams = link.execute(b"1", *SH, "sleep 600 & sleep 600", mark)
    link.frame(EXEC_STARTED)
    (runner,) = runners(box)
    os.kill(runner, signal.SIGSTOP)
    other = link.execute(b"2", "/bin/true")
    assert link.until_gone(b"2")[-1].kind == EXEC_GONE, "others are not held up"
    link.send(EXEC_KILL, b"1")
    assert [frame.kind for frame in link.until_gone(b"1")][-1] == EXEC_GONE
    wait_for(lambda: not marked(mark) and not lives(runner), 5)
    streams.close()
    other.close()


def test_a_spare_runner_that_was_ended_or_stopped_costs_one_exec_at_most(idle: tuple[GuestBox, GuestLink]) -> None:
    box, link = idle
    for number, end in ((b"1", signal.SIGKILL), (b"2", signal.SIGSTOP)):
        streams = link.execute(number, "/bin/true")
        link.until_gone(number)
        streams.close()
        (spare,) = wait_for(lambda: runners(box), 5)
        os.kill(spare, end)
        if end == signal.SIGKILL:
            entry = Path(f"/proc/{spare}")
            wait_for(lambda entry=entry: not entry.exists(), 5)  # reaped: the guest knows
    streams = link.execute(b"3", "/bin/true")  # its runner is stopped, so it never starts
    link.send(EXEC_KILL, b"3")
    assert [frame.kind for frame in link.until_gone(b"3")] == [EXEC_EXITED, EXEC_GONE]
    streams.close()
    streams = link.execute(b"4", "/bin/true")
    assert [frame.kind for frame in link.until_gone(b"4")] == [EXEC_STARTED, EXEC_EXITED, EXEC_GONE]
    streams.close()


def cpu_ticks(pid: int) -> int:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(words[11]) + int(words[12])


def test_it_rests_when_nothing_is_to_be_done(idle: tuple[GuestBox, GuestLink]) -> None:
    box, link = idle
    streams = link.execute(b"1", *STAY)
    link.frame(EXEC_STARTED)
    for runner in runners(box):
        os.kill(runner, signal.SIGKILL)
    link.until_gone(b"1")
    streams.close()
    wait_for(lambda: not runners(box), 5)
    time.sleep(2.5)  # a hunt looks a few times more
    before = cpu_ticks(box.host_pid())
    time.sleep(0.5)
    assert cpu_ticks(box.host_pid()) - before <= 5


def test_a_lost_link_ends_running_execs_but_not_what_an_ended_one_left(
    idle: tuple[GuestBox, GuestLink], mark: str
) -> None:
    box, link = idle
    left = link.execute(b"1", *SH, f"sh -c 'while :; do sleep 60; done' {mark}-left <&- >&- 2>&- & exit 0")
    link.frame(EXEC_STARTED)
    link.frame(EXEC_EXITED)
    running = link.execute(b"2", sys.executable, "-c", TREE.format(parent="time.sleep(600)"), mark)
    wait_for(lambda: len(marked(mark)) == 5 and len(marked(f"{mark}-left")) == 1, 10)
    link.connection.close()
    again = box.accept()
    assert again.frame(HELLO).fields[0] == b"running"
    wait_for(lambda: not marked(mark), 5)
    assert len(marked(f"{mark}-left")) == 1
    again.send(EXEC_KILL, b"1")
    assert again.until_gone(b"1")[-1].fields == (b"1",)
    assert marked(f"{mark}-left") == []
    left.close()
    running.close()


def test_an_exec_before_its_release_or_after_its_end_is_refused(tmp_path: Path) -> None:
    with guest(tmp_path, *SH, "exit 0") as box:
        link = box.accept()
        link.frame(HELLO)
        streams = [link.execute(b"early", "/bin/true")]
        assert link.frame(EXEC_FAILED).fields == (b"early", b"16", b"phase")
        link.send(65)
        link.frame(STARTED)
        link.frame(EXITED)
        streams.append(link.execute(b"late", "/bin/true"))
        assert link.frame(EXEC_FAILED).fields == (b"late", b"16", b"phase")
        for item in streams:
            assert item.read() == (b"", b"")
            item.close()
        link.send(BYE)
        assert box.ended() == 0


def test_the_commands_end_ends_its_execs_and_claims_no_end_of_theirs(tmp_path: Path, mark: str) -> None:
    with guest(tmp_path, *SH, f"while ! [ -e {tmp_path}/go ]; do sleep 0.02; done") as box:
        link = box.released()
        link.frame(STARTED)
        streams = link.execute(b"1", *SH, "sleep 600; true", mark)
        link.frame(EXEC_STARTED)
        (tmp_path / "go").touch()
        assert link.frame(EXITED).fields == (b"0", b"0")
        assert link.frame(EXEC_GONE).fields == (b"1",)
        assert marked(mark) == []
        streams.close()


def test_numbers_that_repeat_and_execs_that_are_too_many_are_refused(idle: tuple[GuestBox, GuestLink]) -> None:
    box, link = idle
    streams = [link.execute(b"1", *STAY)]
    link.frame(EXEC_STARTED)
    streams.append(link.execute(b"1", "/bin/true"))
    assert link.frame(EXEC_FAILED).fields == (b"1", b"16", b"guest")
    link.send(EXEC_KILL, b"unknown")
    assert link.frame(EXEC_GONE).fields == (b"unknown",), "nothing is left of what never was"
    for number in range(8):
        link.send(EXEC, b"x%d" % number, b"", b"/")  # lacks a command: ignored
    os.kill(box.host_pid(), 0)
    link.send(EXEC_KILL, b"1")
    link.until_gone(b"1")
    for item in streams:
        item.close()


def test_without_its_descriptors_nothing_runs(idle: tuple[GuestBox, GuestLink], tmp_path: Path) -> None:
    """Else it would write into the agent's own output."""
    _, link = idle
    link.send(EXEC, b"1", b"", b"/", b"a/usr/bin/touch", f"a{tmp_path}/ran".encode())
    assert link.frame(EXEC_FAILED).fields == (b"1", b"24", b"guest")
    time.sleep(0.1)
    assert not (tmp_path / "ran").exists()


def test_a_guest_without_descriptors_left_says_so(tmp_path: Path) -> None:
    with guest(tmp_path, files=24) as box:
        link = box.released()
        link.frame(STARTED)
        streams = [link.execute(b"%d" % number, "/bin/sleep", "60") for number in range(24)]
        told = [link.any_frame() for _ in streams]
        failed = [frame for frame in told if frame.kind == EXEC_FAILED]
        assert failed
        assert {frame.number(1) for frame in failed} == {24}
        for frame in told:
            if frame.kind == EXEC_STARTED:
                link.send(EXEC_KILL, frame.fields[0])
                link.until_gone(frame.fields[0])
        streams.append(link.execute(b"last", "/bin/true"))
        assert Frame(EXEC_EXITED, (b"last", b"0", b"0")) in link.until_gone(b"last")
        for item in streams:
            item.close()


def test_nobody_else_holds_an_execs_pipes(idle: tuple[GuestBox, GuestLink]) -> None:
    """A program that closes its output is seen to, whatever other runners were made meanwhile."""
    _, link = idle
    streams = [link.execute(b"1", *SH, "exec >&- 2>&-; read x")]
    streams += [link.execute(b"%d" % number, *STAY) for number in range(2, 6)]
    assert streams[0].read() == (b"", b"")
    for number in range(1, 6):
        link.send(EXEC_KILL, b"%d" % number)
    for item in streams:
        item.close()


def test_many_at_once_are_told_apart(idle: tuple[GuestBox, GuestLink]) -> None:
    _, link = idle
    streams = {
        b"%d" % number: link.execute(b"%d" % number, *SH, f"echo {number}; exit {number}") for number in range(40)
    }
    ends: dict[bytes, bytes] = {}
    gone: set[bytes] = set()
    while len(gone) < 40:
        frame = link.any_frame()
        if frame.kind == EXEC_EXITED:
            ends[frame.field(0)] = frame.field(1)
        elif frame.kind == EXEC_GONE:
            gone.add(frame.field(0))
    assert ends == {number: number for number in streams}
    for number, item in streams.items():
        assert item.read()[0].strip() == number
        item.close()
