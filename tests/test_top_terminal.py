"""`isolator top` in a real pseudo-terminal: drawn in place, following its size, and gone without a trace."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from client_helpers import AGENT_ID, StandIn, Talk, agent, ended, event, frame, serving
from conftest import RunningDaemon, wait_for
from test_cli_exec_terminal import CTRL_C, CTRL_Z, Person

from isolator.client import Client

pytestmark = pytest.mark.timeout(120)
IN, OUT = "\x1b[?1049h", "\x1b[?1049l"
Sit = Callable[..., Person]


def figures(name: str = "worker", **changes: Any) -> dict[str, Any]:
    """An agent's stats as the daemon tells them."""
    return {
        "agent": AGENT_ID,
        "name": name,
        "team": "red",
        "state": "running",
        "started_at": "2026-01-01T00:00:00.000000Z",
        "at": "2026-01-01T00:10:00.000000Z",
        "cpu": {"used": 0.2, "limit": 0.5, "over": 1.0, "seconds": 9.5, "throttled": 0.1},
        "memory": {"used": 128 << 20, "limit": 512 << 20, "peak": 130 << 20, "oom_kills": 0},
        "pids": {"used": 3, "limit": 256},
        "disk": {"used": 1 << 20, "limit": 64 << 20},
        "shm": {"used": 0, "limit": 64 << 20},
        "nofile": {"used": 9, "limit": 4096, "complete": True},
        "network": {"used": 3, "limit": None, "received": 1, "sent": 2},
        "wall": {"used": 60.0, "limit": 120.0, "left": 60.0},
        "ttl": {"used": 60.0, "limit": 3600.0, "left": 3540.0},
        "progress": {"text": "fetching pages", "fraction": 0.429, "elapsed": 12.3, "at": "2026-01-01T00:09:59Z"},
        **changes,
    }


def answer(*items: dict[str, Any], truncated: bool = False) -> dict[str, Any]:
    return {"items": list(items), "next": None, "truncated": truncated}


@pytest.fixture
def server() -> Iterator[StandIn]:
    folder = Path(tempfile.mkdtemp(prefix="iso-"))
    with serving(folder / "s") as standin:
        standin.on("GET", "/v1/stats", answer(figures()))
        yield standin
    shutil.rmtree(folder)


def environment(socket: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ISOLATOR_")}
    return {**kept, "ISOLATOR_SOCKET": str(socket), "TERM": "xterm"}


def cli(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "isolator", *arguments]


@pytest.fixture
def sit(server: StandIn) -> Iterator[Sit]:
    people: list[Person] = []

    def make(*arguments: str, under: tuple[str, ...] = ()) -> Person:
        people.append(Person([*under, *cli(*(arguments or ("top", "--interval", "0.2")))], environment(server.path)))
        return people[-1]

    yield make
    for person in people:
        person.leave()


def plain(server: StandIn, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        cli(*arguments), env=environment(server.path), capture_output=True, text=True, timeout=30, check=False
    )


def test_it_draws_in_place_and_follows_what_changes(sit: Sit, server: StandIn) -> None:
    server.on("GET", "/v1/stats", answer(figures("idle", cpu={"used": 0.0, "limit": 1.0}), figures("busy")))
    person = sit()
    person.resize(120, 24)
    shown = person.see("PROGRESS")
    assert IN in shown
    shown = person.see("idle")
    assert "busy" in shown  # most CPU first
    for text in ("40%", "128m/512m 25%", "3/256", "1m/64m", "1 min wall", "42% fetching pages (12 s)"):
        assert text in shown
    assert "0%" in person.see("(12 s)")
    server.on("GET", "/v1/stats", answer(figures("other")))
    assert OUT not in person.see("other")
    assert "idle" not in person.see("\x1b[J")
    person.type("q")
    assert person.ends() == 0
    person.see(OUT)


def test_a_new_size_is_drawn_at_once(sit: Sit, server: StandIn) -> None:
    server.on("GET", "/v1/stats", answer(*(figures(f"worker-{number:02}") for number in range(40))))
    person = sit("top", "--interval", "600")
    person.see("… and 20 more")
    person.resize(120, 50)
    assert "PROGRESS" in person.see("worker-39")
    person.resize(40, 10)
    shown = person.see("… and 34 more")
    assert "TEAM" not in shown.rpartition("\x1b[H")[2]
    lines = [line.replace("\x1b[K", "").strip("\r") for line in shown.rpartition("\x1b[H")[2].split("\n")]
    assert [line for line in lines if len(line) > 40] == []
    person.type(CTRL_C)
    assert person.ends() == 130


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP)],
)
def test_a_signal_gives_the_terminal_back(sit: Sit, number: int, code: int) -> None:
    person = sit()
    person.see("worker")
    person.process.send_signal(number)
    assert person.ends() == code
    shown = person.see(OUT)
    assert "Traceback" not in shown + person.seen


def test_suspended_it_gives_the_terminal_back_for_the_time(sit: Sit) -> None:
    person = sit("top", under=("bash", "--norc", "-mc", '"$@"; echo now $?; fg; echo then $?', "bash"))
    person.see("worker")
    person.type(CTRL_Z)
    assert OUT in person.see(f"now {128 + signal.SIGTSTP}")
    assert IN in person.see("worker")
    person.type("q")
    person.see("then 0")
    assert person.ends() == 0


def test_a_refusal_gives_the_terminal_back_and_is_told(sit: Sit, server: StandIn) -> None:
    person = sit()
    person.see("worker")
    server.routes["GET", "/v1/stats"] = lambda talk, _: talk.problem(403, "no_peer", "Not you.")
    person.see(OUT)
    person.see("isolator: Not you. [no_peer]")
    assert person.ends() == 125


def test_a_daemon_that_goes_away_is_told_and_waited_for(sit: Sit, server: StandIn) -> None:
    def vanish(talk: Talk, _: object) -> None:
        talk.close_connection = True

    person = sit()
    person.see("worker")
    server.routes["GET", "/v1/stats"] = vanish
    assert OUT not in person.see("hung up")
    server.on("GET", "/v1/stats", answer(figures("again")))
    person.see("again")
    person.type("q")
    assert person.ends() == 0


def test_hostile_texts_are_shown_as_codes(sit: Sit, server: StandIn) -> None:
    hostile = {"text": "\x1b[2J\x1b]0;x\x07evil\nrow\u202e", "fraction": 7.5, "elapsed": None, "at": None}
    server.on("GET", "/v1/stats", answer(figures("na\x1bme", progress=hostile, team=None, cpu="odd", pids=[])))
    person = sit()
    person.resize(200, 24)
    shown = person.see("evil\\nrow\\u202e")
    assert "\\x1b[2J\\x1b]0;x\\x07" in shown
    assert "na\\x1bme" in shown
    assert "\x07" not in shown
    person.type("q")
    assert person.ends() == 0


@pytest.mark.parametrize("terminal", ["dumb", "xterm"])
def test_once_is_a_plain_table(sit: Sit, server: StandIn, terminal: str) -> None:
    arguments = ("top",) if terminal == "dumb" else ("top", "--once")
    person = sit(*arguments, under=("env", f"TERM={terminal}"))
    assert person.ends() == 0
    shown = person.see("worker")
    assert "\x1b" not in shown + person.seen


def test_without_a_terminal_it_is_one_table_or_json(server: StandIn) -> None:
    result = plain(server, "top", "--team", "red")
    assert (result.returncode, result.stderr) == (0, "")
    head, row = result.stdout.splitlines()
    assert head.split() == ["NAME", "TEAM", "STATE", "AGE", "CPU", "MEMORY", "PIDS", "TMP", "LEFT", "PROGRESS"]
    assert row.startswith("worker  red   running")
    assert server.asked[-1].query == {"team": "red"}
    result = plain(server, "top", "--json")
    assert json.loads(result.stdout) == answer(figures())
    server.on("GET", "/v1/stats", answer())
    result = plain(server, "top")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "No agent runs.\n")
    server.on("GET", "/v1/stats", answer(figures(), truncated=True))
    assert "there are more" in plain(server, "top").stderr


def test_json_with_an_interval_is_one_object_a_line(server: StandIn) -> None:
    command = cli("top", "--json", "--interval", "0.2")
    with subprocess.Popen(command, env=environment(server.path), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(2):
            assert json.loads(process.stdout.readline()) == answer(figures())
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 130
    result = plain(server, "top", "--json", "--interval", "5", "--once")
    assert (result.returncode, json.loads(result.stdout)) == (0, answer(figures()))


def test_without_a_daemon_it_says_so_and_touches_no_terminal(sit: Sit, server: StandIn) -> None:
    server.on("GET", "/v1/stats", {"nonsense": True}, 500)
    person = sit()
    assert person.ends() == 125
    assert IN not in person.see("isolator: ")


# progress elsewhere


def progress_event(number: int, text: str, fraction: float) -> bytes:
    told = {"name": "worker", "text": text, "fraction": fraction, "elapsed": 75.0}
    return event(number, "agent.progress").replace(json.dumps({"n": 1}).encode(), json.dumps(told).encode())


def test_events_tell_progress_readably(server: StandIn) -> None:
    server.routes["GET", "/v1/events"] = lambda talk, _: talk.chunks(
        [progress_event(7, "fetching \x1b[2J", 0.5)], "text/event-stream"
    )
    result = plain(server, "events", "--no-follow")
    assert result.stdout == "7  2026-01-01T00:00:00Z  agent.progress  red/a  50% fetching \\x1b[2J (1 min)\n"


def serve_wait(server: StandIn, *output: bytes) -> None:
    """A spawn whose output comes when its progress has been told."""
    told: list[bool] = []

    def events(talk: Talk, _: object) -> None:
        talk.chunks([progress_event(7, "half \x07", 0.5)], "text/event-stream", whole=False)
        told.append(True)
        wait_for(lambda: len(told) > 1, 20)

    def logs(talk: Talk, _: object) -> None:
        wait_for(lambda: told, 20)
        talk.chunks([frame(1, data) for data in output])
        told.append(True)

    server.on("POST", "/v1/agents", agent(), 201)
    server.on("GET", f"/v1/agents/{AGENT_ID}", ended())
    server.routes["GET", "/v1/events"] = events
    server.routes["GET", f"/v1/agents/{AGENT_ID}/logs"] = logs


def test_spawn_wait_shows_progress_below_the_output(sit: Sit, server: StandIn) -> None:
    serve_wait(server, b"one\n", b"two", b" three\n")
    person = sit("spawn", "--team", "red", "--wait", "--", "true")
    person.see("50% half \\x07 (1 min)")
    shown = person.see(" three\r\n")
    assert "\r\x1b[Kone\r\n" in shown
    assert "two three" in shown  # a line that is not finished is left alone
    assert person.ends() == 0
    while select.select([person.keyboard], [], [], 0)[0]:
        person.seen += os.read(person.keyboard, 65536).decode(errors="replace")
    assert not person.seen.endswith("(1 min)")


def test_spawn_wait_says_nothing_where_nobody_looks(server: StandIn) -> None:
    serve_wait(server, b"one\n")
    server.routes["GET", f"/v1/agents/{AGENT_ID}/logs"] = lambda talk, _: talk.chunks([frame(1, b"one\n")])
    result = plain(server, "spawn", "--team", "red", "--wait", "--", "true")
    assert (result.stdout, result.stderr) == ("one\n", "")
    assert not any(asked.path == "/v1/events" for asked in server.asked)


# the real thing


@pytest.mark.engine
def test_a_real_agent_and_its_own_progress(daemon: RunningDaemon) -> None:
    report = (
        "import json, socket, time; s = socket.socket(socket.AF_UNIX);"
        "s.connect('/run/isolator/agent.sock');"
        "s.sendall(json.dumps({'to': 'gateway', 'type': 'progress',"
        " 'body': {'text': 'counting', 'fraction': 0.25, 'elapsed': 3}}).encode() + b'\\n');"
        "s.recv(100); time.sleep(600)"
    )
    spawned = daemon.spawn("python3", "-c", report, team="top", name="counter", limits={"pids": 40}, ttl=600)
    with Client(daemon.socket) as client:
        progress = wait_for(lambda: client.stats(spawned["id"]).progress, 15, lambda: daemon.log[-2000:])
        assert (progress.text, progress.fraction, progress.elapsed) == ("counting", 0.25, 3)
        assert progress.at
    person = Person(cli("top", "--interval", "0.5"), {**daemon.environment(), "TERM": "xterm"})
    try:
        person.resize(140, 24)
        shown = person.see("25% counting (3 s)")
        assert "counter" in shown
        assert "/40 " in shown
        assert daemon.delete(f"/v1/agents/{spawned['id']}?grace=0").status == 200
        person.see("No agent runs.")
        person.type(CTRL_C)
        assert person.ends() == 130
        person.see(OUT)
    finally:
        person.leave()
