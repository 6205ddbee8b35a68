"""`isolator exec` next to the local command: whoever called it could not tell which of the two it was."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import RunningDaemon, wait_for

from isolator.client import Client, ProblemError

pytestmark = pytest.mark.engine
BYTES = bytes(range(256)) * 2000
PASSED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTSTP)
# Whoever runs the tests in the background may have us ignore signals; a person's terminal does not.
DEFAULT_SIGNALS = ["env", *(f"--default-signal={number.name.removeprefix('SIG')}" for number in PASSED)]
LOCAL = "here"
IN_BOX = "in the box"


@dataclass
class Box:
    """An agent, and a folder that both sides see."""

    daemon: RunningDaemon
    agent: str
    folder: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def exec(self, *arguments: str) -> list[str]:
        return [*DEFAULT_SIGNALS, sys.executable, "-m", "isolator", "exec", *arguments]

    def prefix(self, where: str) -> list[str]:
        return DEFAULT_SIGNALS if where == LOCAL else self.exec(self.agent, "--")

    def start(self, command: list[str], **more: object) -> subprocess.Popen[bytes]:
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        options = {**streams, "env": self.daemon.environment(), **more}
        process: subprocess.Popen[bytes] = subprocess.Popen(command, **options)  # type: ignore[call-overload]
        self.started.append(process)
        return process

    def sweep(self) -> None:
        """End what a test started and may have left."""
        while self.started:
            process = self.started.pop()
            process.kill()
            process.wait(10)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()

    def run(self, command: list[str], **more: object) -> subprocess.CompletedProcess[bytes]:
        options = {"capture_output": True, "timeout": 60, "env": self.daemon.environment()}
        return subprocess.run(command, check=False, **{**options, **more})  # type: ignore[call-overload,no-any-return]

    def client(self) -> Client:
        return Client(self.daemon.socket)

    def processes(self, mark: str) -> list[str]:
        """States of the box's processes whose command line holds `mark`."""
        with self.client() as client:
            ended = client.run(self.agent, ["ps", "-eo", "stat=,args="])
        assert ended.exit_code == 0, ended.stderr
        return [line[0] for line in ended.stdout.decode().splitlines() if mark in line]


@pytest.fixture(scope="module")
def box(daemon: RunningDaemon) -> Box:
    folder = daemon.workspace("mirror")
    agent = daemon.spawn(team="mirror", name="box", workspace={"source": str(folder), "mode": "rw"})
    return Box(daemon, agent["id"], folder)


@pytest.fixture(autouse=True)
def swept(box: Box) -> Iterator[None]:
    yield
    box.sweep()


def shell(text: str) -> list[str]:
    return ["sh", "-c", text]


MIRRORED: dict[str, tuple[list[str], bytes]] = {
    "binary both ways": (["cat"], BYTES),
    "no input": (["cat"], b""),
    "streams apart": (shell("echo out; echo err >&2; printf 'no newline'"), b""),
    "arguments": (["printf", "<%s>", "", "a b", "ü", "\n", "--", "-t", "$HOME", "'"], b""),
    "exit code 1": (["false"], b""),
    "exit code 255": (shell("exit 255"), b""),
    "ended by TERM": (shell("echo before; kill -TERM $$"), b""),
    "ended by KILL": (shell("kill -KILL $$"), b""),
    "ended by SEGV": (shell("kill -SEGV $$"), b""),
    "ended by PIPE": (shell("kill -PIPE $$"), b""),
    "exit code of a signal": (shell("exit 143"), b""),
    "input ends, output goes on": (shell("cat >/dev/null; echo after; exec cat"), BYTES),
    "input read in part": (["head", "-c", "3"], BYTES * 8),
    "input not read": (["true"], BYTES * 8),
    "input closed there": (shell("exec 0<&-; sleep 0.2; echo on"), BYTES),
    "a line of 3 MiB": (["python3", "-c", "print('x' * 3_000_000)"], b""),
    "left children": (shell("sleep 0.1 >/dev/null 2>&1 & echo quick"), b""),
    "an error's words": (["ls", "/nonexistent"], b""),
}


@pytest.mark.parametrize("case", MIRRORED)
def test_a_command_is_mirrored(box: Box, case: str) -> None:
    command, stdin = MIRRORED[case]
    ended = [box.run([*box.prefix(where), *command], input=stdin) for where in (LOCAL, IN_BOX)]
    here, there = ((each.returncode, each.stdout, each.stderr) for each in ended)
    assert there == here


@pytest.mark.parametrize("stdin", ["file", "null", "closed", "socket", "non-blocking"])
def test_any_standard_input_will_do(box: Box, tmp_path: Path, stdin: str) -> None:
    (tmp_path / "file").write_bytes(BYTES)
    command = [*box.prefix(IN_BOX), "cat"]
    wanted = BYTES
    if stdin == "closed":
        command, wanted = ["sh", "-c", 'exec "$@" <&-', "sh", *command], b""
        ended = box.run(command)
    elif stdin in ("file", "null"):
        source = tmp_path / "file" if stdin == "file" else Path("/dev/null")
        wanted = source.read_bytes()
        with source.open("rb") as file:
            ended = box.run(command, stdin=file)
    else:
        ended = _fed(box, command, stdin)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, wanted, b"")


def _fed(box: Box, command: list[str], kind: str) -> subprocess.CompletedProcess[bytes]:
    import socket

    if kind == "socket":
        theirs, ours = (end.detach() for end in socket.socketpair())
    else:
        theirs, ours = os.pipe()
        os.set_blocking(theirs, False)

    def feed() -> None:
        time.sleep(0.3)
        with os.fdopen(ours, "wb") as file:
            file.write(BYTES)

    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        return box.run(command, stdin=theirs)
    finally:
        feeder.join()
        os.close(theirs)


def test_sixty_four_mebibytes_both_ways_through_slow_hands(box: Box) -> None:
    piece = os.urandom(1 << 20)
    process = box.start([*box.prefix(IN_BOX), "cat"])
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def feed() -> None:
        for _ in range(64):
            stdin.write(piece)
        stdin.close()

    feeder = threading.Thread(target=feed)
    feeder.start()
    time.sleep(0.5)  # nobody reads: everything stands still and nothing is lost
    found, size = hashlib.sha256(), 0
    while part := stdout.read(1 << 20):
        found.update(part)
        size += len(part)
    feeder.join()
    assert process.wait(30) == 0
    assert size == 64 << 20
    assert found.digest() == hashlib.sha256(piece * 64).digest()


def test_a_non_blocking_output_gets_everything(box: Box) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    process = box.start([*box.prefix(IN_BOX), "head", "-c", "2000000", "/dev/zero"], stdout=writing)
    os.close(writing)
    time.sleep(0.5)
    with os.fdopen(reading, "rb") as file:
        assert file.read() == bytes(2_000_000)
    assert process.wait(20) == 0


@pytest.mark.parametrize("where", [LOCAL, IN_BOX])
def test_a_reader_that_goes_ends_it_by_sigpipe(box: Box, where: str) -> None:
    process = box.start([*box.prefix(where), "yes", "sigpipe-mark"])
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"sigpipe-mark\n"
    process.stdout.close()
    assert process.wait(20) == -signal.SIGPIPE
    assert process.stderr.read() == b""
    wait_for(lambda: not box.processes("sigpipe-mark"), 10)


@pytest.mark.parametrize("where", [LOCAL, IN_BOX])
def test_a_command_whose_reader_goes_is_told_and_decides_itself(box: Box, where: str) -> None:
    program = """
import os, sys
try:
    while True:
        os.write(1, b"x" * 65536)
except BrokenPipeError:
    os.write(2, b"told")
    sys.exit(9)
"""
    process = box.start([*box.prefix(where), "python3", "-c", program])
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(10) == b"x" * 10
    process.stdout.close()
    assert process.wait(20) == 9
    assert process.stderr.read() == b"told"


@pytest.mark.parametrize("where", [LOCAL, IN_BOX])
def test_whoever_writes_to_a_command_that_takes_no_more_is_told(box: Box, where: str) -> None:
    process = box.start([*box.prefix(where), *shell("exec <&-; sleep 607")])
    assert process.stdin is not None

    def refused() -> bool:
        try:
            os.write(process.stdin.fileno(), b"x" * 1000)  # type: ignore[union-attr]
        except BrokenPipeError:
            return True
        return False

    wait_for(refused, 20)
    assert process.poll() is None, "it runs on all the same"


@pytest.mark.parametrize("number", PASSED[:6], ids=lambda number: number.name)
def test_a_signal_reaches_the_command(box: Box, number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    for trap, wanted in (("", -number), (f"trap 'echo caught; exit 5' {name}; ", 5)):
        text = trap + "echo ready; while :; do sleep 0.05; done"
        for where in (LOCAL, IN_BOX):
            process = box.start([*box.prefix(where), *shell(text)])
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(number)
            assert process.wait(20) == wanted, where
            assert process.stdout.read() == (b"caught\n" if trap else b"")


def test_what_we_were_started_to_ignore_is_ignored(box: Box) -> None:
    process = box.start(["env", "--ignore-signal=HUP", *box.prefix(IN_BOX)[len(DEFAULT_SIGNALS) :], "cat"])
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"x\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"x\n"
    process.send_signal(signal.SIGHUP)
    assert process.communicate(b"still\n", timeout=20)[0] == b"still\n"
    assert process.returncode == 0


def test_suspend_and_go_on(box: Box) -> None:
    process = box.start(
        [*box.prefix(IN_BOX), *shell(": suspend-mark; while :; do echo; sleep 0.05; done")], process_group=0
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTSTP)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    wait_for(lambda: box.processes("suspend-mark") == ["T"], 10)
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: box.processes("suspend-mark") in (["S"], ["R"]), 10)
    process.send_signal(signal.SIGTERM)
    process.stdout.close()
    assert process.wait(20) in (-signal.SIGTERM, -signal.SIGPIPE)


def test_a_signal_does_not_wait_behind_input_that_nobody_reads(box: Box) -> None:
    with Path("/dev/zero").open("rb") as zeros:
        process = box.start([*box.prefix(IN_BOX), *shell("echo ready; exec sleep 61.5")], stdin=zeros)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == -signal.SIGINT
    wait_for(lambda: not box.processes("61.5"), 10)


def test_our_end_is_the_end_of_all_of_it(box: Box) -> None:
    process = box.start([*box.prefix(IN_BOX), *shell("(setsid sleep 62.5 &); echo ready; sleep 62.5")])
    assert process.stdout is not None
    process.stdout.readline()
    assert len(box.processes("62.5")) >= 2
    process.kill()
    process.wait(10)
    wait_for(lambda: not box.processes("62.5"), 10)


def test_own_failures_have_the_codes_of_a_shell(box: Box) -> None:
    (box.folder / "plain").write_text("no program")
    for arguments, code, word in (
        ([box.agent, "no-such-program"], 127, b"command_not_found"),
        ([box.agent, "/workspace/plain"], 126, b"command_not_executable"),
        (["nobody", "true"], 125, b"agent_not_found"),
        (["-t", box.agent, "true"], 125, b"no_terminal"),
        (["--cwd", "/none", box.agent, "true"], 125, b"cwd_invalid"),
        ([box.agent], 125, b"COMMAND"),
        (["--timeout", "0.3", box.agent, "sleep", "60"], 124, b"timeout"),
    ):
        ended = box.run(box.exec(*arguments), stdin=subprocess.DEVNULL)
        assert (ended.returncode, ended.stdout) == (code, b""), arguments
        assert word in ended.stderr
        assert b"Traceback" not in ended.stderr


def test_options(box: Box) -> None:
    code = "import os,sys; print(os.environ['A'], os.environ['B'], os.getcwd()); sys.stderr.write('e'); sys.exit(3)"
    arguments = ["-i", "-e", "A=1", "-e", "B", "-w", "/tmp", "--json", "mirror/box", "python3", "-c", code]
    ended = box.run(box.exec(*arguments), env={**box.daemon.environment(), "B": "ours"}, stdin=subprocess.DEVNULL)
    assert ended.returncode == 3
    assert ended.stderr == b""
    lines = ended.stdout.decode().splitlines()
    assert '{"stream": "stdout", "data": "MSBvdXJzIC90bXAK"}' in lines
    assert '{"stream": "stderr", "data": "ZQ=="}' in lines
    assert lines[-1].startswith('{"exit_code": 3, "signal": null, "timed_out": false')


# the client


def test_run(box: Box) -> None:
    with box.client() as client:
        ended = client.run(box.agent, shell("cat; echo err >&2; pwd; exit 4"), stdin=BYTES[:1000], cwd="/tmp")
        assert (ended.exit_code, ended.signal, ended.stderr) == (4, None, b"err\n")
        assert ended.stdout == BYTES[:1000] + b"/tmp\n"
        assert ended.duration > 0
        assert (ended.timed_out, ended.oom_killed, ended.truncated) == (False, False, False)
        cut = client.run(box.agent, ["head", "-c", "1000", "/dev/zero"], max_output=10)
        assert (cut.stdout, cut.truncated, cut.exit_code) == (bytes(10), True, 0)
        late = client.run(box.agent, ["sleep", "60"], timeout=0.2)
        assert (late.timed_out, late.signal) == (True, signal.SIGKILL)
        with pytest.raises(ProblemError) as caught:
            client.run(box.agent, ["no-such-program"])
        assert caught.value.code == "command_not_found"


def test_leaving_an_exec_ends_it(box: Box) -> None:
    with box.client() as client:
        with client.exec(box.agent, shell("echo one; echo 63.5; exec sleep 63.5")) as execution:
            _, data = next(iter(execution))
            assert data.startswith(b"one\n")
            assert len(box.processes("63.5")) == 1
        wait_for(lambda: not box.processes("63.5"), 10)
        kept = client.exec(box.agent, ["sleep", "64.5"])  # closed with the client
        assert kept.pid > 1
        assert len(box.processes("64.5")) == 1
    wait_for(lambda: not box.processes("64.5"), 10)
