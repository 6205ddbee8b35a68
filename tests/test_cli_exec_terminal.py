"""`isolator exec -it` in a real pseudo-terminal: what a person types, sees, and gets back afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from aiohttp import web
from conftest import RunningDaemon, wait_for
from websocket_helpers import speaking

from isolator.client import Client

pytestmark = pytest.mark.engine
CTRL_C, CTRL_D, CTRL_Z, CTRL_BACKSLASH, ESCAPE = "\x03", "\x04", "\x1a", "\x1c", "\x1b"
SHELL = ("env", "PS1=box> ", "bash", "--norc", "--noprofile")


class Person:
    """Somebody at a terminal of their own, in which a program runs."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.keyboard, self.terminal = os.openpty()
        self.resize(80, 24, tell=False)
        self.before = termios.tcgetattr(self.terminal)
        self.seen = ""
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command],
            env=environment,
            stdin=self.terminal,
            stdout=self.terminal,
            stderr=self.terminal,
        )

    def resize(self, columns: int, rows: int, *, tell: bool = True) -> None:
        fcntl.ioctl(
            self.keyboard if tell else self.terminal, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0)
        )

    def type(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    def see(self, wanted: str, seconds: float = 15) -> str:
        """Look until `wanted` is on the screen; what came up to its end. The next look goes on behind it."""
        end = time.monotonic() + seconds
        while wanted not in self.seen:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.keyboard], [], [], left)[0]:
                raise AssertionError(f"{wanted!r} did not appear in {self.seen!r}")
            self.seen += os.read(self.keyboard, 65536).decode(errors="replace")
        shown, _, self.seen = self.seen.partition(wanted)
        return shown + wanted

    def ends(self) -> int:
        code = self.process.wait(15)
        assert termios.tcgetattr(self.terminal) == self.before, "the terminal is not as it was"
        return code

    def leave(self) -> None:
        for descriptor in (self.keyboard, self.terminal):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)


Sit = Callable[..., Person]


@pytest.fixture(scope="module")
def folder(daemon: RunningDaemon) -> Path:
    return daemon.workspace("terminal")


@pytest.fixture(scope="module")
def agent(daemon: RunningDaemon, folder: Path) -> str:
    shutil.copy("/bin/busybox", folder / "busybox")
    (folder / "nap").write_text("trap 'echo on' CONT; echo up; while :; do sleep 0.05; done")
    spawned = daemon.spawn(team="terminal", workspace={"source": str(folder), "mode": "rw"})
    return str(spawned["id"])


def cli(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "isolator", "exec", *arguments]


@pytest.fixture
def sit(daemon: RunningDaemon, agent: str) -> Iterator[Sit]:
    people: list[Person] = []

    def make(*command: str, options: tuple[str, ...] = ("-it",), under: tuple[str, ...] = ()) -> Person:
        person = Person([*under, *cli(*options, agent, *command)], daemon.environment())
        people.append(person)
        return person

    yield make
    for person in people:
        person.leave()


def running(daemon: RunningDaemon, agent: str, mark: str) -> bool:
    with Client(daemon.socket) as client:
        return client.run(agent, ["pgrep", "-f", f"^sleep {mark}"]).exit_code == 0


def test_a_shell_at_a_prompt_its_size_and_its_keys(sit: Sit) -> None:
    person = sit(*SHELL)
    person.see("box> ")
    person.type("tty; stty size\r")
    person.see("/dev/pts/")
    person.see("24 80\r\n")
    person.see("box> ")
    person.resize(101, 33)
    person.type("stty size\r")
    person.see("33 101\r\n")
    person.see("box> ")
    nap = "sh /workspace/nap"
    person.type(f"{nap}\r")
    person.see("up\r\n")
    person.type(CTRL_C)
    person.see("^C")
    person.see("box> ")
    person.type("echo code $?\r")
    person.see("code 130\r\n")
    person.type(f"{nap}\r")
    person.see("up\r\n")
    person.type(CTRL_Z)
    person.see("Stopped")
    person.see("box> ")
    person.type("jobs\r")
    person.see("Stopped")
    person.see("box> ")
    person.type("fg\r")
    person.see("on\r\n")
    person.type(CTRL_BACKSLASH)
    person.see("Quit")
    person.see("box> ")
    person.type("exit 3\r")
    assert person.ends() == 3


def test_vi_edits_a_file(sit: Sit, folder: Path) -> None:
    person = sit("/workspace/busybox", "vi", "/workspace/note")
    person.see("- /workspace/note")
    person.type("ifirst line\rsecond line")
    person.see("second line")
    person.resize(60, 20)
    person.type(ESCAPE)
    person.see("- /workspace/note")
    person.type("k0x:wq\r")
    assert person.ends() == 0
    assert (folder / "note").read_text() == "irst line\nsecond line\n"


def test_the_terminal_is_given_back_when_a_signal_ends_us(sit: Sit, daemon: RunningDaemon, agent: str) -> None:
    person = sit("sh", "-c", "echo ready; exec sleep 73")
    person.see("ready")
    assert termios.tcgetattr(person.terminal) != person.before
    person.process.send_signal(signal.SIGTERM)
    assert person.ends() == -signal.SIGTERM
    assert not running(daemon, agent, "73")


def test_a_terminal_that_hangs_up_ends_the_command(sit: Sit, daemon: RunningDaemon, agent: str) -> None:
    person = sit("sh", "-c", "trap '' HUP; echo ready; exec sleep 74")
    person.see("ready")
    os.close(person.terminal)
    os.close(person.keyboard)
    assert person.process.wait(15) == -signal.SIGHUP
    wait_for(lambda: not running(daemon, agent, "74"), 10)


def test_a_daemon_that_goes_away_leaves_the_terminal_as_it_was() -> None:
    async def leave(answer: web.WebSocketResponse) -> None:
        await answer.receive()
        await answer.send_str('{"started": {"pid": 42}}')
        await answer.send_bytes(b"\x01ready")
        await answer.receive()

    with tempfile.TemporaryDirectory() as place, speaking(Path(place) / "s", leave):
        person = Person(cli("-t", "abcdefghjkmnpqrs", "sh"), {**os.environ, "ISOLATOR_SOCKET": f"{place}/s"})
        try:
            person.see("ready")
            assert termios.tcgetattr(person.terminal) != person.before
            person.type("x")
            person.see("[connection_lost]")
            assert person.ends() == 125
        finally:
            person.leave()


def test_suspending_us_gives_the_terminal_back_for_the_time(sit: Sit) -> None:
    person = sit(*SHELL, under=("bash", "--norc", "-mc", '"$@"; echo now $?; fg; echo then $?', "bash"))
    person.see("box> ")
    raw = termios.tcgetattr(person.terminal)
    children = Path(f"/proc/{person.process.pid}/task/{person.process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTSTP)
    person.see(f"now {128 + signal.SIGTSTP}")
    person.type("\recho go$((1+1))on\r")
    person.see("go2on")
    assert termios.tcgetattr(person.terminal) == raw
    person.type("exit 4\r")
    person.see("then 4")
    assert person.ends() == 0


def test_lines_without_a_terminal_there(sit: Sit) -> None:
    person = sit("cat", options=())
    person.type("typed\n")
    person.see("typed\r\n")
    person.see("typed\r\n")
    person.type(CTRL_D)
    assert person.ends() == 0


def test_in_the_background_a_terminal_does_not_stop_us(sit: Sit) -> None:
    """What reads no input runs on in the background, as it would here."""
    person = sit(
        "echo", "from behind", options=(), under=("bash", "--norc", "-mc", '"$@" & wait $!; echo code $?', "bash")
    )
    shown = person.see("code ")
    assert "from behind" in shown
    person.see("0")
    assert person.ends() == 0
