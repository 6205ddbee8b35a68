"""Commands in a running agent's box, run to their end: exact, bounded, and killed with all that came of them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import threading
import time
from typing import Any

import pytest
from api_helpers import AsUser, assert_problem, open_to_everybody
from attack_helpers import audit_entries, team
from conftest import RunningDaemon, UnixConnection, wait_for
from exec_helpers import empty, inside, pipes, run, runners

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]

# Double-forked, in sessions of their own, deaf to signals.
TREE = (
    "import os,signal,time\n"
    "for n in (1,2,3,15): signal.signal(n, signal.SIG_IGN)\n"
    "for _ in range(4):\n"
    "    if os.fork(): time.sleep(600)\n"
    "    os.setsid()\n"
    "    if os.fork(): os._exit(0)\n"
    "time.sleep(600)\n"
)


@pytest.fixture(scope="module")
def agent(daemon: RunningDaemon) -> dict[str, Any]:
    """One box for all that does not harm it."""
    return daemon.spawn(
        team=team(daemon), env={"FROM_SPAWN": "1"}, secrets=[{"name": "key", "value": "k", "as": "env", "env": "KEY"}]
    )


def test_argv_is_what_runs_no_shell(daemon: RunningDaemon, agent: dict[str, Any]) -> None:
    ran = run(daemon, agent["id"], "printf", "%s|", "a b", "$HOME", "; exit 3", "*", "ä\n", "")
    assert ran.stdout == "a b|$HOME|; exit 3|*|ä\n||".encode()
    assert ran.answer | {"stdout": "", "duration": 0} == {
        "exit_code": 0,
        "signal": None,
        "timed_out": False,
        "oom_killed": False,
        "truncated": False,
        "stdout": "",
        "stderr": "",
        "duration": 0,
    }
    assert 0 < ran.answer["duration"] < 30


def test_cwd_and_environment(daemon: RunningDaemon, agent: dict[str, Any]) -> None:
    """The agent's own variables, its secret ones too, and what is added for this one alone."""
    show = ("sh", "-c", "pwd; echo $FROM_SPAWN $KEY $ISOLATOR_AGENT $X; id -u")
    assert run(daemon, agent["id"], *show).stdout.decode().split() == ["/tmp", "1", "k", agent["id"], "10001"]
    ran = run(daemon, agent["id"], *show, cwd="/usr/bin", env={"X": "added", "FROM_SPAWN": "2"})
    assert ran.stdout.decode().split() == ["/usr/bin", "2", "k", agent["id"], "added", "10001"]
    assert run(daemon, agent["id"], "./env", cwd="/usr/bin", env={"PATH": "/none"}).answer["exit_code"] == 0


def test_streams_are_binary_and_kept_apart(daemon: RunningDaemon, agent: dict[str, Any]) -> None:
    data = bytes(range(256)) * 4000
    code = "import sys; d=sys.stdin.buffer.read(); sys.stdout.buffer.write(d); sys.stderr.buffer.write(d[::-1])"
    ran = run(daemon, agent["id"], "python3", "-c", code, stdin=data)
    assert (ran.stdout, ran.stderr) == (data, data[::-1])
    assert run(daemon, agent["id"], "cat").stdout == b"", "without stdin there is an end of file at once"
    assert run(daemon, agent["id"], "true", stdin=data).answer["exit_code"] == 0, "nobody has to read it"


def test_output_can_be_opened_again(daemon: RunningDaemon, agent: dict[str, Any]) -> None:
    ran = run(daemon, agent["id"], "sh", "-c", "echo a > /dev/stdout; echo b > /dev/stderr; cat /dev/stdin", stdin=b"c")
    assert (ran.stdout, ran.stderr) == (b"a\nc", b"b\n")


def test_code_signal_and_memory_are_told(daemon: RunningDaemon, agent: dict[str, Any]) -> None:
    def told(*command: str, **body: Any) -> tuple[int, int | None, bool]:
        answer = run(daemon, agent["id"], *command, **body).answer
        return answer["exit_code"], answer["signal"], answer["oom_killed"]

    assert told("sh", "-c", "exit 255") == (255, None, False)
    assert told("sh", "-c", "kill -11 $$") == (139, 11, False)
    assert told("sh", "-c", "kill -9 $$") == (137, 9, False)
    assert told("sh", "-c", "exit 137") == (137, None, False), "a code is no signal"
    small = daemon.spawn(team=team(daemon), network="none", limits={"memory": "48m"})
    answer = run(daemon, small["id"], "python3", "-c", "x=bytearray(200<<20)").answer
    assert (answer["exit_code"], answer["signal"], answer["oom_killed"]) == (137, 9, True)
    answer = run(daemon, small["id"], "true").answer
    assert (answer["exit_code"], answer["oom_killed"]) == (0, False), "the box goes on"
    daemon.delete(f"/v1/agents/{small['id']}?grace=0")


def test_what_is_cut_off_is_told(daemon: RunningDaemon, agent: dict[str, Any]) -> None:
    both = "import sys; sys.stdout.write('o'*1000); sys.stderr.write('e'*10)"
    for most, out, err, cut in ((100, 100, 10, True), (1000, 1000, 10, False), (0, 0, 0, True)):
        ran = run(daemon, agent["id"], "python3", "-c", both, max_output=most)
        assert (len(ran.stdout), len(ran.stderr), ran.answer["truncated"]) == (out, err, cut)
        assert ran.answer["exit_code"] == 0, "what is too much is dropped, not refused"
    ran = run(daemon, agent["id"], "head", "-c", str(300 << 20), "/dev/zero")
    assert (len(ran.stdout), ran.answer["truncated"], ran.answer["exit_code"]) == (4 << 20, True, 0)


def test_a_timeout_kills_all_of_it_and_of_nothing_else(daemon: RunningDaemon, agent: dict[str, Any]) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        other = beside.submit(run, daemon, agent["id"], "sh", "-c", "sleep 2; echo alive")
        ran = run(daemon, agent["id"], "python3", "-c", TREE + "#deaf", timeout=0.7)
        assert not [line for line in inside(agent["container_id"]) if "deaf" in line]
        assert (ran.answer["timed_out"], ran.answer["exit_code"], ran.answer["signal"]) == (True, 137, 9)
        assert other.result(20).stdout == b"alive\n"
    empty(agent["container_id"])
    ran = run(daemon, agent["id"], "sh", "-c", "echo so far; sleep 60", timeout=0.5)
    assert (ran.stdout, ran.answer["timed_out"]) == (b"so far\n", True)
    assert run(daemon, agent["id"], "true", timeout=30).answer["timed_out"] is False


def test_a_hang_up_kills_all_of_it(daemon: RunningDaemon, agent: dict[str, Any]) -> None:
    before = pipes(daemon)
    connection = UnixConnection(daemon.socket)
    body = json.dumps({"command": ["python3", "-c", TREE + "#left"]})
    connection.request("POST", f"/v1/agents/{agent['id']}/run", body)
    wait_for(lambda: len([line for line in inside(agent["container_id"]) if "left" in line]) >= 5, 10)
    connection.close()
    empty(agent["container_id"])
    wait_for(lambda: pipes(daemon) == before, 5)
    wait_for(lambda: [e for e in audit_entries(daemon) if e["detail"].get("code") == "hang-up"], 5)


def test_what_an_ended_exec_left_lives_on_and_holds_nobody_up(daemon: RunningDaemon, agent: dict[str, Any]) -> None:
    began = time.monotonic()
    ran = run(daemon, agent["id"], "sh", "-c", "yes background & echo $!")
    assert time.monotonic() - began < 10, "whatever it goes on writing"
    pid = ran.stdout.split()[0].decode() if ran.stdout[:1].isdigit() else ""
    wait_for(lambda: not [line for line in inside(agent["container_id"]) if line == "yes background"], 5)
    ran = run(daemon, agent["id"], "sh", "-c", "sleep 601 >&- 2>&- & echo $!")
    time.sleep(0.2)
    assert inside(agent["container_id"]) == ["sleep 601"], pid
    assert run(daemon, agent["id"], "kill", ran.stdout.decode().strip()).answer["exit_code"] == 0
    empty(agent["container_id"])


def test_a_box_that_ends_or_stops_its_runners_harms_itself(daemon: RunningDaemon, agent: dict[str, Any]) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        victim = beside.submit(run, daemon, agent["id"], "python3", "-c", TREE)
        wait_for(lambda: len(inside(agent["container_id"])) >= 5, 10)
        for runner in runners(agent["container_id"]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(runner, signal.SIGKILL)
        answer = victim.result(20).answer
        assert (answer["exit_code"], answer["signal"], answer["oom_killed"]) == (137, 9, False)
        empty(agent["container_id"])
        stopped = beside.submit(run, daemon, agent["id"], "sleep", "602", timeout=1)
        wait_for(lambda: "sleep 602" in inside(agent["container_id"]), 10)
        for runner in runners(agent["container_id"]):
            os.kill(runner, signal.SIGSTOP)
        assert stopped.result(20).answer["timed_out"] is True
        empty(agent["container_id"])
    wait_for(lambda: not runners(agent["container_id"]) or _answers(daemon, agent), 30)


def _answers(daemon: RunningDaemon, agent: dict[str, Any]) -> bool:
    return daemon.post(f"/v1/agents/{agent['id']}/run", {"command": ["true"]}).status == 200


COMMAND = ["true"]
REFUSED: dict[str, tuple[Any, int, str]] = {
    "no command": ({}, 400, "invalid_request"),
    "an empty command": ({"command": []}, 400, "invalid_request"),
    "an empty program": ({"command": [""]}, 400, "command_invalid"),
    "a command as text": ({"command": "ls"}, 400, "invalid_request"),
    "NUL in the command": ({"command": ["a\x00b"]}, 400, "command_invalid"),
    "half a character": ({"command": ["\ud800"]}, 400, "invalid_request"),
    "a long command": ({"command": ["true", *(["x" * 100_000] * 2)]}, 400, "command_too_long"),
    "513 words": ({"command": ["true"] * 513}, 400, "invalid_request"),
    "no such program": ({"command": ["no-such"]}, 400, "command_not_found"),
    "no program": ({"command": ["/etc/passwd"]}, 400, "command_not_executable"),
    "a folder": ({"command": ["/usr"]}, 400, "command_not_executable"),
    "a relative folder": ({"command": COMMAND, "cwd": "tmp"}, 400, "cwd_invalid"),
    "NUL in the folder": ({"command": COMMAND, "cwd": "/\x00"}, 400, "cwd_invalid"),
    "no such folder": ({"command": COMMAND, "cwd": "/no/such"}, 400, "cwd_invalid"),
    "a file for a folder": ({"command": COMMAND, "cwd": "/etc/passwd"}, 400, "cwd_invalid"),
    "a closed folder": ({"command": COMMAND, "cwd": "/root"}, 400, "cwd_invalid"),
    "LD_PRELOAD": ({"command": COMMAND, "env": {"LD_PRELOAD": "/x"}}, 403, "env_name_refused"),
    "a variable with =": ({"command": COMMAND, "env": {"A=B": "c"}}, 400, "env_name_invalid"),
    "NUL in a variable": ({"command": COMMAND, "env": {"A": "\x00"}}, 400, "env_value_invalid"),
    "a large environment": (
        {"command": COMMAND, "env": {f"V{n}": "x" * 100_000 for n in range(4)}},
        413,
        "env_too_large",
    ),
    "timeout 0": ({"command": COMMAND, "timeout": 0}, 400, "limit_out_of_range"),
    "timeout -1": ({"command": COMMAND, "timeout": -1}, 400, "limit_out_of_range"),
    "a timeout of a year": ({"command": COMMAND, "timeout": 3e7}, 400, "limit_out_of_range"),
    "a timeout in words": ({"command": COMMAND, "timeout": "soon"}, 400, "invalid_request"),
    "max_output -1": ({"command": COMMAND, "max_output": -1}, 400, "limit_out_of_range"),
    "max_output of a gigabyte": ({"command": COMMAND, "max_output": "1g"}, 400, "limit_out_of_range"),
    "stdin that is not base64": ({"command": COMMAND, "stdin": "a?"}, 400, "invalid_request"),
    "stdin that is not ASCII": ({"command": COMMAND, "stdin": "é"}, 400, "invalid_request"),
    "a terminal": ({"command": COMMAND, "tty": True}, 400, "unknown_field"),
    "privileged": ({"command": COMMAND, "Privileged": True}, 400, "unknown_field"),
    "a user": ({"command": COMMAND, "user": "root"}, 400, "unknown_field"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_requests_are_refused_by_name(daemon: RunningDaemon, agent: dict[str, Any], name: str) -> None:
    body, status, code = REFUSED[name]
    before = pipes(daemon)
    assert_problem(daemon.post(f"/v1/agents/{agent['id']}/run", body), status, code)
    assert pipes(daemon) == before
    assert inside(agent["container_id"]) == []


def test_only_a_running_agent_of_ones_own(daemon: RunningDaemon, agent: dict[str, Any], as_user: AsUser) -> None:
    open_to_everybody(daemon)
    with as_user(2001):
        answer = daemon.post(f"/v1/agents/{agent['id']}/run", {"command": ["true"]})
        assert_problem(answer, 404, "agent_not_found")
        assert_problem(daemon.get(f"/v1/agents/{agent['id']}/exec"), 404, "agent_not_found")
    assert_problem(daemon.post("/v1/agents/aaaaaaaaaaaaaaaa/run", {"command": ["true"]}), 404, "agent_not_found")
    ended = daemon.spawn("true", team=team(daemon), network="none")
    daemon.wait(ended)
    assert_problem(daemon.post(f"/v1/agents/{ended['id']}/run", {"command": ["true"]}), 409, "agent_not_running")
    daemon.delete(f"/v1/agents/{ended['id']}")
    assert_problem(daemon.post(f"/v1/agents/{ended['id']}/run", {"command": ["true"]}), 409, "agent_not_running")


def test_sixty_four_at_a_time_and_no_more(daemon: RunningDaemon, agent: dict[str, Any]) -> None:
    path, body = f"/v1/agents/{agent['id']}/run", json.dumps({"command": ["sleep", "603"]})
    held = []
    for _ in range(64):
        connection = UnixConnection(daemon.socket)
        connection.request("POST", path, body)
        held.append(connection)
    wait_for(lambda: inside(agent["container_id"]).count("sleep 603") == 64, 20)
    problem = assert_problem(daemon.post(path, {"command": ["true"]}), 429, "execs_exhausted")
    assert problem["retry_after"] == 1
    held.pop().close()
    wait_for(lambda: daemon.post(path, {"command": ["true"]}).status == 200, 10)
    for connection in held:
        connection.close()
    empty(agent["container_id"], 15)
    wait_for(lambda: pipes(daemon) < 20, 10)
    assert run(daemon, agent["id"], "true").answer["exit_code"] == 0


def test_a_full_box_says_so_and_is_well_again_with_room(daemon: RunningDaemon) -> None:
    box = daemon.spawn(team=team(daemon), network="none", limits={"pids": 8})
    path = f"/v1/agents/{box['id']}/run"
    held = []
    # The guest, and for each exec its runner and its process; the eighth place is a runner's that can start nothing.
    for processes in (3, 5, 7):
        connection = UnixConnection(daemon.socket)
        connection.request("POST", path, json.dumps({"command": ["sleep", "604"]}))
        held.append(connection)
        stats = f"/v1/agents/{box['id']}/stats"
        wait_for(lambda wanted=processes, stats=stats: daemon.get(stats).json["pids"]["used"] == wanted, 10)
    assert_problem(daemon.post(path, {"command": ["true"]}), 429, "box_full")
    assert assert_problem(daemon.post(path, {"command": ["true"]}), 429, "box_full")["retry_after"] == 1
    for connection in held:
        connection.close()
    wait_for(lambda: daemon.post(path, {"command": ["true"]}).status == 200, 10)
    daemon.delete(f"/v1/agents/{box['id']}?grace=0")


def test_an_agent_that_ends_during_an_exec_ends_it(daemon: RunningDaemon) -> None:
    box = daemon.spawn("sh", "-c", "sleep 1.5", team=team(daemon), network="none")
    began = time.monotonic()
    answer = daemon.post(f"/v1/agents/{box['id']}/run", {"command": ["sleep", "605"]})
    assert time.monotonic() - began < 20
    assert (answer.status, answer.json["exit_code"], answer.json["timed_out"]) == (200, 137, False)
    assert daemon.wait(box)["exit"]["code"] == 0
    box = daemon.spawn(team=team(daemon), network="none")
    threading.Timer(0.7, lambda: daemon.delete(f"/v1/agents/{box['id']}?grace=0")).start()
    answer = daemon.post(f"/v1/agents/{box['id']}/run", {"command": ["sleep", "606"]})
    assert (answer.status, answer.json["exit_code"]) == (200, 137)


def test_every_exec_is_in_the_audit_before_it_runs(daemon: RunningDaemon, agent: dict[str, Any]) -> None:
    run(daemon, agent["id"], "printf", "secret-argument")
    entries = [entry for entry in audit_entries(daemon) if entry["act"] == "agent.exec"]
    intent = next(entry for entry in reversed(entries) if entry["kind"] == "intent")
    assert (intent["agent"], intent["detail"]["program"], intent["detail"]["arguments"]) == (agent["id"], "printf", 2)
    assert "secret-argument" not in json.dumps(entries), "arguments may hold what the log should not"

    def told() -> bool:
        return any(e["kind"] == "outcome" and e["id"] == intent["id"] for e in audit_entries(daemon))

    wait_for(told, 5)


def test_after_a_kill_of_the_daemon_agents_are_reached_within_a_second(own_daemon: RunningDaemon) -> None:
    """And what ran for its callers is gone with its trees; what an ended exec had left lives on."""
    daemon = own_daemon
    box = daemon.spawn("sleep", "607", team=team(daemon), network="none")
    run(daemon, box["id"], "sh", "-c", "sleep 608 >&- 2>&- &")
    connection = UnixConnection(daemon.socket)
    connection.request("POST", f"/v1/agents/{box['id']}/run", json.dumps({"command": ["python3", "-c", TREE]}))
    wait_for(lambda: len([line for line in inside(box["container_id"]) if "fork" in line]) >= 5, 10)
    daemon.kill()
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection.getresponse()
    daemon.start(proven=False)
    wait_for(lambda: daemon.post(f"/v1/agents/{box['id']}/run", {"command": ["true"]}).status == 200, 2)
    wait_for(lambda: sorted(inside(box["container_id"])) == ["sleep 607", "sleep 608"], 5)
    # A daemon that is told to end takes them along as well.
    connection = UnixConnection(daemon.socket)
    connection.request("POST", f"/v1/agents/{box['id']}/run", json.dumps({"command": ["sleep", "609"]}))
    wait_for(lambda: "sleep 609" in inside(box["container_id"]), 10)
    daemon.stop()
    connection.close()
    assert sorted(inside(box["container_id"])) == ["sleep 607", "sleep 608"]
    daemon.start(proven=False)
