"""How agents end, what is told of it, and what stays of them for how long."""

from __future__ import annotations

import time

import pytest
from conftest import RunningDaemon, wait_for
from engine_helpers import frames_of, gone, shown, streaming

pytestmark = pytest.mark.engine

PYTHON = ("python3", "-c")


def ending(daemon: RunningDaemon, *command: str, **body) -> tuple:
    ended, _ = daemon.run(*command, team="lf-endings", network="none", **body)
    assert ended["state"] == "exited"
    assert ended["pid"] is None
    assert ended["finished_at"] >= ended["started_at"]
    return ended["exit"]["code"], ended["exit"]["signal"], ended["exit"]["reason"]


@pytest.mark.parametrize("code", [0, 3, 255])
def test_an_exit_code_is_told(daemon: RunningDaemon, code: int) -> None:
    assert ending(daemon, *PYTHON, f"import sys; sys.exit({code})") == (code, None, "exited")


@pytest.mark.parametrize(
    ("script", "number"),
    [("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 11), ("import os; os.kill(os.getpid(), 9)", 9)],
)
def test_death_by_a_signal_is_told_from_an_exit(daemon: RunningDaemon, script: str, number: int) -> None:
    assert ending(daemon, *PYTHON, script) == (128 + number, number, "killed")
    # The twin: a command that merely exits with that code was not killed.
    assert ending(daemon, *PYTHON, f"import sys; sys.exit({128 + number})") == (128 + number, None, "exited")


def test_death_for_memory_is_told_as_oom(daemon: RunningDaemon) -> None:
    bomb = "x = []\nwhile True: x.append(bytearray(1 << 20))"
    assert ending(daemon, *PYTHON, bomb, limits={"memory": "64m"}) == (137, 9, "oom")
    assert ending(daemon, *PYTHON, "x = bytearray(32 << 20)", limits={"memory": "64m"}) == (0, None, "exited")


def test_a_child_killed_for_memory_is_mentioned_but_the_command_exited(daemon: RunningDaemon) -> None:
    child = "subprocess.run([sys.executable, '-c', 'bytearray(200 << 20)'])"
    script = f"import subprocess, sys\nsys.exit({child}.returncode == -9)"
    ended, _ = daemon.run(*PYTHON, script, team="lf-endings", network="none", limits={"memory": "64m"})
    assert (ended["exit"]["code"], ended["exit"]["reason"]) == (1, "exited")
    assert "memory" in ended["exit"]["detail"]


def test_wall_ttl_and_idle_ttl_are_told_apart(daemon: RunningDaemon) -> None:
    forever = ("sleep", "600")
    body = {"team": "lf-times", "network": "none"}
    wall = daemon.spawn(*forever, limits={"wall": 0.6}, **body)
    ttl = daemon.spawn(*forever, ttl=0.6, **body)
    idle = daemon.spawn(*forever, idle_ttl=0.6, **body)
    busy = daemon.spawn(*PYTHON, "while True: pass", idle_ttl=0.6, limits={"cpus": 0.3}, **body)
    long = daemon.spawn(*forever, ttl=600, limits={"wall": 600}, idle_ttl=600, **body)
    told = {name: daemon.wait(agent)["exit"] for name, agent in (("wall", wall), ("ttl", ttl), ("idle", idle))}
    assert [item["reason"] for item in told.values()] == ["wall", "ttl", "ttl"]
    assert {item["signal"] for item in told.values()} == {9}
    assert "limits.wall" in told["wall"]["detail"]
    assert "idle" not in told["ttl"]["detail"]
    assert "idle" in told["idle"]["detail"]
    assert shown(daemon, long)["state"] == "running"
    assert shown(daemon, busy)["state"] == "running", "one that works is not idle"


def test_one_that_ends_in_time_is_not_told_as_expired(daemon: RunningDaemon) -> None:
    assert ending(daemon, "true", ttl=600, limits={"wall": 600}) == (0, None, "exited")


REFUSED_COMMANDS = [
    (("no-such-program",), "command_not_found"),
    (("/no/such/program",), "command_not_found"),
    (("/etc/passwd",), "command_not_executable"),
    (("/usr",), "command_not_executable"),
    (("/workspace/garbage",), "command_not_executable"),
    (("/workspace/orphaned",), "command_not_found"),
]


@pytest.mark.parametrize(("command", "code"), REFUSED_COMMANDS)
def test_a_command_that_cannot_run_is_a_refusal_and_leaves_nothing(
    daemon: RunningDaemon, engine, command: tuple[str, ...], code: str
) -> None:
    workspace = daemon.roots / "commands"
    if not workspace.exists():
        daemon.workspace("commands")
        (workspace / "garbage").write_bytes(b"\x00\x01 neither a script nor a program")
        (workspace / "orphaned").write_text("#!/no/such/interpreter\n")
        (workspace / "fine").write_text("#!/bin/sh\nexit 5\n")
        for file in workspace.iterdir():
            file.chmod(0o755)
    body = {"team": "lf-refused", "network": "none", "workspace": {"source": str(workspace)}}
    answer = daemon.post("/v1/agents", {**body, "command": list(command)})
    assert answer.status == 400
    assert answer.headers["content-type"].startswith("application/problem+json")
    assert answer.json["code"] == code
    assert not [item for item in daemon.leftovers(engine) if "lf-refused" in item]
    assert daemon.get("/v1/agents?team=lf-refused&all").json["items"] == []
    # The twin in the same folder runs.
    ended, _ = daemon.run("/workspace/fine", **{**body, "team": "lf-commands"})
    assert ended["exit"]["code"] == 5


def test_without_a_command_the_box_waits_until_it_is_stopped(daemon: RunningDaemon, engine) -> None:
    agent = daemon.spawn(team="lf-waits", network="none")
    assert agent["command"] == []
    assert shown(daemon, agent)["state"] == "running"
    assert engine.containers.get(agent["container_id"]).status == "running"
    assert daemon.delete(f"/v1/agents/{agent['id']}").json["state"] == "removed"
    gone(engine, agent)


def test_output_stays_for_the_grace_and_the_record_longer(daemon: RunningDaemon, engine) -> None:
    agent = daemon.spawn("echo", "last words", team="lf-grace", network="none", cleanup_grace=2)
    ended = daemon.wait(agent)
    assert ended["state"] == "exited"
    assert daemon.output(agent) == "last words\n"
    kept = daemon.spawn("echo", "kept", team="lf-grace", network="none", cleanup_grace=600)
    daemon.wait(kept)
    removed = wait_for(lambda: (r := shown(daemon, agent))["state"] == "removed" and r, 10)
    assert removed["exit"] == ended["exit"]
    answer = daemon.get(f"/v1/agents/{agent['id']}/logs")
    assert (answer.status, answer.json["code"]) == (404, "logs_gone")
    gone(engine, agent)
    assert daemon.output(kept) == "kept\n", "another's grace is its own"
    assert agent["id"] in [item["id"] for item in daemon.get("/v1/agents?team=lf-grace&all").json["items"]]


def test_a_grace_of_zero_removes_at_once(daemon: RunningDaemon, engine) -> None:
    agent = daemon.spawn("true", team="lf-grace", network="none", cleanup_grace=0)
    wait_for(lambda: shown(daemon, agent)["state"] == "removed", 10)
    assert shown(daemon, agent)["exit"]["code"] == 0
    gone(engine, agent)


ORPHAN_MAKER = """
import os, time
for _ in range(20):
    if os.fork() == 0:
        if os.fork() == 0:
            os._exit(0)
        os._exit(0)
time.sleep(0.5)
states = []
for entry in os.listdir('/proc'):
    if entry.isdigit():
        fields = open(f'/proc/{entry}/stat').read().rsplit(')', 1)[1].split()
        if fields[0] == 'Z' and fields[1] != str(os.getpid()):
            states.append(entry)
print(len(states))
"""


def test_orphans_are_reaped_by_the_guest(daemon: RunningDaemon) -> None:
    _, output = daemon.run(*PYTHON, ORPHAN_MAKER, team="lf-zombies", network="none")
    assert output.strip() == "0", "zombies that belong to PID 1 were left"


DAEMONISED = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True:
            with open('/workspace/beat', 'a') as file:
                file.write('.')
            time.sleep(0.02)
    os._exit(0)
while not os.path.exists('/workspace/beat'):
    time.sleep(0.01)
"""


def test_what_a_command_leaves_behind_dies_with_it(daemon: RunningDaemon) -> None:
    folder = daemon.workspace("beats")
    ended, _ = daemon.run(*PYTHON, DAEMONISED, team="lf-beats", network="none", workspace={"source": str(folder)})
    assert ended["exit"]["code"] == 0
    beats = (folder / "beat").stat().st_size
    assert beats > 0, "the daemonised child never ran, so this proves nothing"
    time.sleep(0.3)
    assert (folder / "beat").stat().st_size == beats


def test_stdout_and_stderr_are_kept_apart(daemon: RunningDaemon) -> None:
    script = (
        "import sys\nfor n in range(3):\n  print('out', n, flush=True); print('err', n, file=sys.stderr, flush=True)"
    )
    agent, _ = daemon.run(*PYTHON, script, team="lf-streams", network="none")
    path = f"/v1/agents/{agent['id']}/logs"
    framed = frames_of(daemon.get(f"{path}?format=frames").content)
    assert b"".join(data for number, data in framed if number == 1) == b"out 0\nout 1\nout 2\n"
    assert b"".join(data for number, data in framed if number == 2) == b"err 0\nerr 1\nerr 2\n"
    assert daemon.get(f"{path}?stream=stderr").content == b"err 0\nerr 1\nerr 2\n"
    assert len(daemon.get(f"{path}?tail=1").content.splitlines()) == 1
    assert daemon.get(f"{path}?tail=0").content == b""
    assert len(daemon.get(f"{path}?tail=4").content.splitlines()) == 4


def test_following_output_streams_it_live_and_ends_with_the_agent(daemon: RunningDaemon) -> None:
    folder = daemon.workspace("follow")
    wait = "while not os.path.exists('/workspace/go'): time.sleep(0.01)"
    script = f"import os, time\nprint('first', flush=True)\n{wait}\nprint('second')"
    agent = daemon.spawn(*PYTHON, script, team="lf-follow", network="none", workspace={"source": str(folder)})
    with streaming(daemon, f"/v1/agents/{agent['id']}/logs?follow") as response:
        assert response.readline() == b"first\n"
        assert shown(daemon, agent)["state"] == "running", "its first line was told while it ran"
        (folder / "go").touch()
        assert response.read() == b"second\n"
    assert daemon.wait(agent)["exit"]["code"] == 0


def test_a_box_taken_away_by_hand_is_told_as_lost(daemon: RunningDaemon, engine) -> None:
    agent = daemon.spawn("sleep", "600", team="lf-lost", network="none", cleanup_grace=600)
    engine.containers.get(agent["container_id"]).remove(force=True)
    ended = daemon.wait(agent)
    assert (ended["state"], ended["exit"]["reason"]) in (("lost", "lost"), ("exited", "killed"))


def test_the_ending_is_an_event_and_comes_after_the_start(daemon: RunningDaemon) -> None:
    agents = [daemon.spawn("true", team="lf-order", network="none") for _ in range(5)]
    for agent in agents:
        daemon.wait(agent)
        events = daemon.get(f"/v1/events?follow=false&agent={agent['id']}").content.decode()
        kinds = [line.removeprefix("event: ") for line in events.splitlines() if line.startswith("event: ")]
        assert kinds == ["agent.started", "agent.exited"]


def test_secrets_that_do_not_fit_are_refused_before_anything_is_made(daemon: RunningDaemon) -> None:
    """The box's place for secrets is 1 MiB, in whole pages."""
    body = {"team": "lf-secrets", "network": "none", "command": ["true"]}
    quarters = [{"name": f"s{number}", "value": "x" * 262_144} for number in range(4)]
    fits = daemon.post("/v1/agents", {**body, "command": ["sleep", "60"], "secrets": quarters})
    assert fits.status == 201
    more = [*quarters, {"name": "last", "value": "x"}]
    answer = daemon.post("/v1/agents", {**body, "team": "lf-secrets-none", "secrets": more}, timeout=15)
    assert (answer.status, answer.json["code"]) == (413, "secrets_too_large")
    assert daemon.get("/v1/teams/lf-secrets-none").status == 404
    assert b"xxxx" not in answer.content
    assert len(daemon.get("/v1/agents?team=lf-secrets").json["items"]) == 1
