"""The exec WebSocket, with an independent client: channels, terminals, gigabytes, and callers who leave at any step."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from api_helpers import assert_problem
from attack_helpers import team
from conftest import RunningDaemon, wait_for
from exec_helpers import CLOSE, RESIZE, STDERR, STDIN, STDOUT, Exec, empty, exec_socket, inside, pipes, run

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def agent(daemon: RunningDaemon) -> dict[str, Any]:
    return daemon.spawn(team=team(daemon), network="none", limits={"memory": "256m"})


@pytest.fixture
async def opened(daemon: RunningDaemon, agent: dict[str, Any]) -> AsyncIterator[Exec]:
    async with exec_socket(daemon, agent["id"]) as opened:
        yield opened
    await asyncio.to_thread(empty, agent["container_id"])


async def test_channels_are_kept_apart_and_the_end_is_told(opened: Exec) -> None:
    await opened.ask("sh", "-c", "cat; echo error >&2; exit 3")
    assert opened.started["pid"] > 1
    data = bytes(range(256)) * 1000
    for start in range(0, len(data), 7001):
        await opened.type(data[start : start + 7001])
    await opened.until(data[-5:])
    await opened.close_stdin()
    await opened.type(b"ignored")
    await opened.close_stdin()
    status = await opened.end()
    assert (bytes(opened.output[STDOUT]), bytes(opened.output[STDERR])) == (data, b"error\n")
    assert status == {
        "status": "Failure",
        "reason": "NonZeroExitCode",
        "message": "command terminated with exit code 3",
        "details": {"causes": [{"reason": "ExitCode", "message": "3"}]},
        "exit_code": 3,
        "signal": None,
        "timed_out": False,
        "oom_killed": False,
        "truncated": False,
    }
    assert opened.socket.close_code == 1000


async def test_success_timeout_and_cuts_are_told(daemon: RunningDaemon, agent: dict[str, Any]) -> None:
    async with exec_socket(daemon, agent["id"]) as opened:
        await opened.ask("sh", "-c", "cat; echo $X", stdin=False, env={"X": "y"}, cwd="/usr")
        status = await opened.end()
        assert (status["status"], status["exit_code"], bytes(opened.output[STDOUT])) == ("Success", 0, b"y\n")
    async with exec_socket(daemon, agent["id"]) as opened:
        await opened.ask("sh", "-c", "echo abc; sleep 60", timeout=0.5, max_output=2)
        status = await opened.end()
        assert (status["reason"], status["timed_out"], status["truncated"]) == ("Timeout", True, True)
        assert (status["exit_code"], status["signal"], bytes(opened.output[STDOUT])) == (137, 9, b"ab")


async def test_refusals_are_the_status(daemon: RunningDaemon, agent: dict[str, Any]) -> None:
    asked: list[tuple[str | bytes, int, str]] = [
        (json.dumps({"command": ["no-such"]}), 400, "command_not_found"),
        (json.dumps({"command": ["true"], "cwd": "x"}), 400, "cwd_invalid"),
        (json.dumps({"command": ["true"], "stdin": "YQ=="}), 400, "invalid_request"),
        (json.dumps({"command": ["true"], "size": {"width": 0, "height": 1}}), 400, "invalid_request"),
        ('{"command": ["true"], "command": ["false"]}', 400, "invalid_json"),
        ("nonsense", 400, "invalid_json"),
        ("[" * 100_000, 400, "invalid_json"),
        (b"\x00ls", 400, "invalid_request"),
    ]
    for said, http_status, code in asked:
        async with exec_socket(daemon, agent["id"]) as opened:
            await (opened.socket.send_str(said) if isinstance(said, str) else opened.socket.send_bytes(said))
            status = await opened.end()
            assert (status["status"], status["http_status"], status["code"]) == ("Failure", http_status, code), said
            assert status["exit_code"] is None
            assert status["detail"]
    assert_problem(daemon.get(f"/v1/agents/{agent['id']}/exec"), 426, "upgrade_required")


async def test_signals_by_message(opened: Exec) -> None:
    await opened.ask("sh", "-c", "trap 'echo got usr1' USR1; echo ready; while :; do sleep 0.05; done")
    await opened.until(b"ready")
    for nonsense in (
        "{}",
        "[]",
        "x",
        '{"signal": "SIGNOPE"}',
        '{"signal": true}',
        '{"signal": 4096}',
        '{"signal": []}',
    ):
        await opened.socket.send_str(nonsense)
    await opened.signal("SIGUSR1")
    await opened.until(b"got usr1")
    await opened.signal(15)
    status = await opened.end()
    assert (status["exit_code"], status["signal"]) == (143, 15)


async def test_a_terminal_has_its_size_its_keys_and_one_stream(opened: Exec) -> None:
    script = (
        "stty size; tty >&2; echo $TERM; trap 'stty size' WINCH; trap 'echo stopped; exit 4' INT; "
        "read x; while :; do sleep 0.05; done"
    )
    await opened.ask("bash", "-c", script, tty=True, size={"width": 101, "height": 33})
    await opened.until(b"xterm")
    assert bytes(opened.output[STDOUT]).startswith(b"33 101\r\n/dev/pts/")
    await opened.type(b"line\r")
    await opened.until(b"line")
    await opened.resize(80, 24)
    await opened.until(b"24 80\r\n")
    await opened.type(b"\x03")
    await opened.until(b"stopped")
    status = await opened.end()
    assert (status["exit_code"], status["signal"]) == (4, None)
    assert opened.output[STDERR] == b""


async def test_keys_as_signals_reach_the_foreground_of_a_terminal(opened: Exec) -> None:
    script = (
        "import os,signal\nchild = os.fork()\n"
        "if child == 0:\n"
        "    signal.signal(signal.SIGTTOU, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "    os.setpgid(0, 0); os.tcsetpgrp(0, os.getpid()); os.write(1, b'ready'); signal.pause()\n"
        "os.write(1, b'signal %d' % os.waitpid(child, 0)[1])"
    )
    await opened.ask("python3", "-c", script, tty=True)
    await opened.until(b"ready")
    await opened.signal("SIGINT")
    await opened.until(b"signal 2")
    assert (await opened.end())["exit_code"] == 0


async def test_a_terminal_closed_and_opened_again_is_read_on(opened: Exec) -> None:
    script = (
        "import os,time; os.closerange(0,3); time.sleep(0.4); "
        "f=os.open('/dev/tty',1); os.write(f,b'again'); time.sleep(0.1)"
    )
    await opened.ask("python3", "-c", script, tty=True)
    await opened.end()
    assert bytes(opened.output[STDOUT]) == b"again"


def rss(daemon: RunningDaemon) -> int:
    """The daemon's resident memory, bytes."""
    assert daemon.process is not None
    return int(Path(f"/proc/{daemon.process.pid}/statm").read_text().split()[1]) * 4096


async def test_a_gigabyte_passes_and_the_daemon_keeps_none_of_it(daemon: RunningDaemon, opened: Exec) -> None:
    before, most, got = rss(daemon), 0, 0
    await opened.socket.send_str(json.dumps({"command": ["head", "-c", str(1 << 30), "/dev/zero"]}))
    async for message in opened.socket:
        if message.type == aiohttp.WSMsgType.BINARY and message.data[0] == STDOUT:
            got += len(message.data) - 1
            most = max(most, rss(daemon)) if got % 7 == 0 else most
        elif message.type == aiohttp.WSMsgType.BINARY:
            opened.status = json.loads(message.data[1:])
    assert got == 1 << 30
    assert opened.status is not None
    assert opened.status["exit_code"] == 0
    assert max(most, rss(daemon)) - before < 64 << 20


async def test_a_reader_who_pauses_slows_the_program_down(
    daemon: RunningDaemon, opened: Exec, agent: dict[str, Any]
) -> None:
    """A line of 300 MiB without an end, and nobody reads: what is held stays small, and the other execs go on."""
    before = rss(daemon)
    script = (
        "import os\nn=0\nwhile n < 300<<20:\n    n+=os.write(1,bytes(1<<16))\n"
        "    open('/tmp/written','w').write(str(n))"
    )
    await opened.ask("python3", "-c", script)
    await asyncio.sleep(1)
    written = [int(run(daemon, agent["id"], "cat", "/tmp/written").stdout or b"0")]
    await asyncio.sleep(0.5)
    written.append(int(run(daemon, agent["id"], "cat", "/tmp/written").stdout or b"0"))
    assert written[0] == written[1] < 32 << 20, "the program waits for its reader"
    assert rss(daemon) - before < 64 << 20
    got = 0
    while opened.status is None:
        await opened.step()
        got += len(opened.output[STDOUT])
        opened.output[STDOUT].clear()
    assert got == 300 << 20


@pytest.mark.parametrize("tty", [False, True])
async def test_a_program_that_never_reads_holds_up_only_its_own_caller(
    daemon: RunningDaemon, agent: dict[str, Any], tty: bool
) -> None:
    before, held = rss(daemon), pipes(daemon)
    async with exec_socket(daemon, agent["id"]) as opened:
        await opened.ask("sleep", "610", tty=tty)

        poured = 0

        async def pour() -> None:
            nonlocal poured
            while True:
                await opened.type(bytes(65536))
                poured += 1

        pouring = asyncio.create_task(pour())
        await asyncio.sleep(0.5)
        # A terminal drops what does not fit into its line, as fast as it comes; a pipe makes its writer wait.
        assert tty or poured < 128, "it can't all have been taken"
        assert rss(daemon) - before < 32 << 20
        assert run(daemon, agent["id"], "true").answer["exit_code"] == 0
        await opened.hang_up()
        pouring.cancel()
        await asyncio.gather(pouring, return_exceptions=True)
        await asyncio.to_thread(empty, agent["container_id"])
        await asyncio.to_thread(wait_for, lambda: pipes(daemon) == held, 5)


async def test_empty_and_endless_messages_cost_nothing(daemon: RunningDaemon, opened: Exec) -> None:
    before = rss(daemon)
    await opened.ask("sleep", "611")
    for _ in range(3000):
        await opened.socket.send_bytes(bytes((STDIN,)))
        await opened.socket.send_bytes(bytes((CLOSE, STDIN)))
        await opened.socket.send_bytes(b"")
        await opened.socket.send_bytes(b"\x09unknown")
    assert rss(daemon) - before < 16 << 20
    await opened.socket.send_bytes(bytes((RESIZE,)) + b"{}")
    status = await opened.end()
    assert (status["status"], status["code"]) == ("Failure", "invalid_request")


async def nothing(_: Exec) -> None:
    """Leave before a word."""


async def half_a_request(opened: Exec) -> None:
    writer = opened.socket._writer
    writer.transport.write(b"\x81\xfe\x10\x00")  # type: ignore[union-attr]


async def right_after_asking(opened: Exec) -> None:
    await opened.socket.send_str(json.dumps({"command": ["sleep", "612"]}))


async def after_started(opened: Exec) -> None:
    await opened.ask("sleep", "612")


async def started_with_a_terminal(opened: Exec) -> None:
    await opened.ask("bash", "-c", "trap '' HUP; sleep 612 & sleep 612", tty=True)


async def amid_output(opened: Exec) -> None:
    await opened.ask("cat", "/dev/zero")
    await opened.until(bytes(1 << 20))


async def amid_input(opened: Exec) -> None:
    await opened.ask("sh", "-c", "sleep 612; cat")
    pouring = asyncio.create_task(_pour(opened))
    await asyncio.sleep(0.3)
    pouring.cancel()


async def _pour(opened: Exec) -> None:
    while True:
        await opened.type(bytes(65536))


async def after_half_closing(opened: Exec) -> None:
    await opened.ask("sh", "-c", "cat; echo end; sleep 612")
    await opened.close_stdin()
    await opened.until(b"end")


async def while_it_is_killed(opened: Exec) -> None:
    await opened.ask("sleep", "612", timeout=0.2)
    await asyncio.sleep(0.2)


async def before_the_status(opened: Exec) -> None:
    await opened.ask("true")


STEPS: list[Callable[[Exec], Awaitable[None]]] = [
    nothing,
    half_a_request,
    right_after_asking,
    after_started,
    started_with_a_terminal,
    amid_output,
    amid_input,
    after_half_closing,
    while_it_is_killed,
    before_the_status,
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
async def test_a_caller_who_leaves_at_any_step_leaves_nothing(
    daemon: RunningDaemon, agent: dict[str, Any], step: Callable[[Exec], Awaitable[None]]
) -> None:
    before = pipes(daemon)
    async with exec_socket(daemon, agent["id"]) as opened:
        await step(opened)
        await opened.hang_up()
    await asyncio.to_thread(empty, agent["container_id"])
    await asyncio.to_thread(wait_for, lambda: pipes(daemon) == before, 5)
    assert inside(agent["container_id"]) == []
    # And it counts no more: as many as may run at a time do.
    assert "Traceback" not in daemon.log
    assert "never retrieved" not in daemon.log


async def test_after_all_that_as_many_may_run_as_ever(daemon: RunningDaemon, agent: dict[str, Any]) -> None:
    async with contextlib.AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(exec_socket(daemon, agent["id"])) for _ in range(64)]
        for item in opened:
            await item.ask("sleep", "613")
            assert item.started, item.status
        async with exec_socket(daemon, agent["id"]) as extra:
            await extra.ask("true")
            assert extra.status is not None
            assert (extra.status["code"], extra.status["http_status"]) == ("execs_exhausted", 429)
        for item in opened:
            await item.hang_up()
    await asyncio.to_thread(empty, agent["container_id"])
