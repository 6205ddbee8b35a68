"""Stopping: a signal, a grace, a kill, and nothing left; whoever ignores the signal wins nothing."""

from __future__ import annotations

import concurrent.futures
import signal
import time

import pytest
from conftest import RunningDaemon, running_daemon, wait_for
from engine_helpers import gone, knock, shown, spawn_bytes, streaming

pytestmark = pytest.mark.engine

DEAF = """
import signal, time
for number in (1, 2, 15):
    signal.signal(number, signal.SIG_IGN)
print('deaf', flush=True)
time.sleep(600)
"""
POLITE = """
import signal, sys, time
def leave(number, frame):
    print('goodbye', flush=True)
    sys.exit(4)
signal.signal(signal.SIGTERM, leave)
print('ready', flush=True)
time.sleep(600)
"""


def started(daemon: RunningDaemon, script: str, word: str, team: str = "st-stop") -> dict:
    agent = daemon.spawn("python3", "-c", script, team=team, network="none")
    wait_for(lambda: word in daemon.output(agent), 10)
    return agent


def test_one_that_ignores_the_signal_is_killed_after_the_grace(daemon: RunningDaemon, engine) -> None:
    agent = started(daemon, DEAF, "deaf")
    stopped = daemon.delete(f"/v1/agents/{agent['id']}?grace=0.5", timeout=8).json
    assert stopped["state"] == "removed"
    assert (stopped["exit"]["code"], stopped["exit"]["signal"], stopped["exit"]["reason"]) == (137, 9, "killed")
    gone(engine, agent)


def test_one_that_listens_gets_its_signal_and_its_last_word(daemon: RunningDaemon, engine) -> None:
    agent = started(daemon, POLITE, "ready")
    with streaming(daemon, f"/v1/agents/{agent['id']}/logs?follow") as output:
        assert output.readline() == b"ready\n"
        stopped = daemon.delete(f"/v1/agents/{agent['id']}?grace=20", timeout=15).json
        assert output.read() == b"goodbye\n"
    assert (stopped["exit"]["code"], stopped["exit"]["signal"], stopped["exit"]["reason"]) == (4, None, "killed")
    gone(engine, agent)


def test_the_signal_reaches_the_whole_group_of_the_command(daemon: RunningDaemon) -> None:
    folder = daemon.workspace("group")
    child = "trap 'echo child >> /workspace/told; exit 0' TERM; echo up; while :; do sleep 0.02; done"
    script = f"({child}) & trap 'sleep 0.3; echo parent >> /workspace/told; exit 0' TERM; while :; do sleep 0.02; done"
    agent = daemon.spawn("bash", "-c", script, team="st-stop", network="none", workspace={"source": str(folder)})
    wait_for(lambda: "up" in daemon.output(agent), 10)
    daemon.delete(f"/v1/agents/{agent['id']}?grace=5", timeout=15)
    assert sorted((folder / "told").read_text().split()) == ["child", "parent"]


def test_a_grace_of_zero_kills_at_once(daemon: RunningDaemon, engine) -> None:
    agent = started(daemon, POLITE, "ready")
    stopped = daemon.delete(f"/v1/agents/{agent['id']}?grace=0", timeout=8).json
    assert (stopped["exit"]["code"], stopped["exit"]["signal"]) == (137, 9), "it was not asked"
    gone(engine, agent)


@pytest.mark.parametrize("grace", ["-1", "601", "nan", "inf", "1e9", "soon", ""])
def test_a_grace_that_is_none_is_refused_and_nothing_is_stopped(daemon: RunningDaemon, grace: str) -> None:
    agent = daemon.spawn("sleep", "600", team="st-stop", network="none")
    answer = daemon.delete(f"/v1/agents/{agent['id']}?grace={grace}")
    assert (answer.status, answer.json["code"]) == (400, "invalid_query")
    assert shown(daemon, agent)["state"] == "running"


def test_stopping_twice_is_one_stop(daemon: RunningDaemon, engine) -> None:
    agent = started(daemon, DEAF, "deaf")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: daemon.delete(f"/v1/agents/{agent['id']}?grace=0.5"), range(4)))
    answers.append(daemon.delete(f"/v1/agents/{agent['id']}"))
    assert {answer.status for answer in answers} == {200}
    assert {answer.json["state"] for answer in answers} == {"removed"}
    assert len({str(answer.json["exit"]) for answer in answers}) == 1
    gone(engine, agent)
    # Every intent has its outcome.
    found = daemon.get(f"/v1/audit?act=agent.stop&agent={agent['id']}").json["items"]
    intents = {item["id"] for item in found if item["kind"] == "intent"}
    assert intents == {item["id"] for item in found if item["kind"] == "outcome"}


def test_stopping_one_that_has_ended_removes_it_and_keeps_its_ending(daemon: RunningDaemon, engine) -> None:
    agent, _ = daemon.run("sh", "-c", "exit 7", team="st-stop", network="none")
    stopped = daemon.delete(f"/v1/agents/{agent['id']}").json
    assert stopped["state"] == "removed"
    assert stopped["exit"] == agent["exit"]
    assert stopped["exit"]["reason"] == "exited"
    gone(engine, agent)


def test_stopping_one_that_is_not_there_is_told_so(daemon: RunningDaemon) -> None:
    answer = daemon.delete("/v1/agents/nosuchagent")
    assert (answer.status, answer.json["code"]) == (404, "agent_not_found")


def test_stopping_during_the_spawn_leaves_no_half(daemon: RunningDaemon, engine) -> None:
    for _ in range(4):
        connection = knock(daemon)
        connection.sendall(spawn_bytes({"team": "st-early", "network": "none", "command": ["sleep", "600"]}))
        found = wait_for(lambda: daemon.get("/v1/agents?team=st-early&state=creating").json["items"], 10)
        stopped = daemon.delete(f"/v1/agents/{found[0]['id']}?grace=0")
        head = connection.recv(65536)
        connection.close()
        assert head.startswith(b"HTTP/1.1 201"), "the spawn came to be first"
        assert (stopped.status, stopped.json["state"]) == (200, "removed")
        assert daemon.get("/v1/agents?team=st-early").json["items"] == []
        assert engine.containers.list(all=True, filters={"label": "openclaw.team=st-early"}) == []


def test_stopping_one_whose_spawn_fails_is_told_and_leaves_nothing(daemon: RunningDaemon, engine) -> None:
    connection = knock(daemon)
    connection.sendall(spawn_bytes({"team": "st-early", "network": "none", "command": ["no-such-program"]}))
    found = wait_for(lambda: daemon.get("/v1/agents?team=st-early&state=creating").json["items"], 10)
    stopped = daemon.delete(f"/v1/agents/{found[0]['id']}?grace=0")
    assert b"command_not_found" in connection.recv(65536)
    connection.close()
    assert (stopped.status, stopped.json["code"]) == (404, "agent_not_found")
    assert daemon.get(f"/v1/agents/{found[0]['id']}").status == 404
    assert engine.containers.list(all=True, filters={"label": "openclaw.team=st-early"}) == []


def test_deleting_a_team_stops_its_agents_and_no_others(daemon: RunningDaemon, engine) -> None:
    mine = [started(daemon, DEAF, "deaf", team="st-doomed"), daemon.spawn("sleep", "600", team="st-doomed")]
    ended, _ = daemon.run("true", team="st-doomed")
    other = daemon.spawn("sleep", "600", team="st-spared")
    answer = daemon.delete("/v1/teams/st-doomed", timeout=20)
    assert answer.status == 200
    assert set(answer.json["removed_agents"]) == {agent["id"] for agent in (*mine, ended)}
    for agent in (*mine, ended):
        gone(engine, agent)
        assert shown(daemon, agent)["state"] == "removed"
    assert engine.networks.list(names=["openclaw-team-st-doomed"]) == []
    assert daemon.get("/v1/teams/st-doomed").status == 404
    assert shown(daemon, other)["state"] == "running"
    assert engine.networks.list(names=["openclaw-team-st-spared"]) != []


def test_deleting_a_team_while_agents_are_spawned_leaves_none(daemon: RunningDaemon, engine) -> None:
    daemon.post("/v1/teams", {"id": "st-busy"})
    body = {"team": "st-busy", "command": ["sleep", "600"], "create_team": False}
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        spawns = [pool.submit(daemon.post, "/v1/agents", body) for _ in range(4)]
        wait_for(lambda: daemon.get("/v1/agents?team=st-busy").json["items"], 10)
        assert daemon.delete("/v1/teams/st-busy").status == 200
        answers = [spawn.result(60) for spawn in spawns]
    for answer in answers:
        assert answer.status == 201 or answer.json["code"] in ("team_deleting", "team_not_found"), answer.content
    label = {"label": "openclaw.team=st-busy"}
    assert engine.containers.list(all=True, filters=label) == []
    assert engine.networks.list(filters=label) == []


def test_a_stop_with_a_long_grace_holds_up_nobody_else(daemon: RunningDaemon) -> None:
    agent = started(daemon, DEAF, "deaf")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(daemon.delete, f"/v1/agents/{agent['id']}?grace=8")
        wait_for(lambda: shown(daemon, agent)["state"] == "stopping", 5)
        # Endings are still noticed, by the engine's word too: this one's guest is killed with it.
        other = daemon.spawn("sleep", "600", team="st-stop", network="none", limits={"wall": 0.3})
        assert daemon.wait(other, 6)["exit"]["reason"] == "wall"
        assert not stopping.done()
        assert stopping.result(20).json["exit"]["signal"] == 9


def test_a_daemon_told_to_end_breaks_off_a_long_stop_and_the_next_one_finishes_it(
    own_daemon: RunningDaemon, engine
) -> None:
    agent = started(own_daemon, DEAF, "deaf", team="st-ended")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(lambda: own_daemon.delete(f"/v1/agents/{agent['id']}?grace=600", timeout=60))
        wait_for(lambda: shown(own_daemon, agent)["state"] == "stopping", 5)
        assert own_daemon.process is not None
        own_daemon.process.send_signal(signal.SIGTERM)
        own_daemon.process.wait(25)
        assert stopping.exception(30) is not None, "it was cut off, not told a lie"
    own_daemon.start(proven=False)
    wait_for(lambda: shown(own_daemon, agent)["state"] == "removed", 10)
    gone(engine, agent)


@pytest.mark.parametrize("delay", [0.05, 0.4, 0.8, 1.3])
def test_a_daemon_that_ends_in_the_midst_of_its_self_test_leaves_nothing_of_it(
    engine, image_pins, delay: float
) -> None:
    """The fixture's own end is the test: it lists what is left on engine and host."""
    with running_daemon(engine, image_pins, start=False) as daemon:
        daemon.start(proven=False)
        time.sleep(delay)
