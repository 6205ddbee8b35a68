"""kill -9 of the daemon at any moment: what was acknowledged goes on, of everything else nothing stays."""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import docker
import pytest
from conftest import RunningDaemon, running_daemon, wait_for
from engine_helpers import (
    GatedSocket,
    assert_joined,
    children_of,
    containers_of,
    events_of,
    gone,
    knock,
    lives,
    settled,
    shown,
    spawn_bytes,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

SLEEP = {"command": ["sleep", "600"]}


@pytest.fixture
def mortal(engine: docker.DockerClient, image_pins: dict[str, str]) -> Iterator[RunningDaemon]:
    """A daemon to be killed; nothing here waits for its network proof unless it says so."""
    with running_daemon(engine, image_pins, start=False) as daemon:
        daemon.start(proven=False)
        yield daemon
        if daemon.process is None or daemon.process.poll() is not None:
            daemon.start(proven=False)
        settled(daemon)


def try_spawn(daemon: RunningDaemon, team: str, number: int) -> dict[str, Any] | None:
    """The agent, if the daemon lived to acknowledge it."""
    body = {"team": team, "name": f"n{number}", **SLEEP, "workspace": {"source": str(daemon.roots / "shared")}}
    try:
        answer = daemon.post("/v1/agents", body, timeout=30)
    except OSError:
        return None
    return answer.json if answer.status == 201 else None


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_during_a_stream_of_spawns(mortal: RunningDaemon, engine, seed: int) -> None:
    choice = random.Random(seed)
    mortal.workspace("shared")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        spawns = [pool.submit(try_spawn, mortal, f"cr-{seed}", number) for number in range(24)]
        time.sleep(choice.uniform(0.05, 1.2))
        mortal.kill()
        acknowledged = [agent for spawn in spawns if (agent := spawn.result(60))]
    mortal.start(proven=False)
    settled(mortal)
    agents = assert_joined(mortal, engine)
    listed = {agent["id"] for agent in agents}
    assert {agent["id"] for agent in acknowledged} <= listed
    # At most those whose record was on disk when the answer was cut off, one for each caller.
    assert len(listed) - len(acknowledged) <= 4
    if agents:
        assert_reachable(mortal, engine, agents)


def assert_reachable(daemon: RunningDaemon, engine: docker.DockerClient, agents: list[dict[str, Any]]) -> None:
    """Stop works, a new neighbour finds the adopted one by name, and an end is noticed."""
    first, last = agents[0], agents[-1]
    wait_for(lambda: daemon.get("/v1/info").json["network"]["status"] == "proven", 60)
    find = f"import socket; print(socket.gethostbyname({first['name']!r}))"
    _, output = daemon.run("python3", "-c", find, team=first["team"])
    assert output.startswith("10."), output
    engine.containers.get(last["container_id"]).kill()
    assert daemon.wait(last)["exit"]["signal"] == 9
    for agent in agents[:-1]:
        assert daemon.delete(f"/v1/agents/{agent['id']}?grace=0").json["state"] == "removed"
        gone(engine, agent)


def test_exit_codes_of_the_downtime_are_told_right(mortal: RunningDaemon) -> None:
    folder = mortal.workspace("downtime")
    body = {"team": "cr-down", "network": "none", "workspace": {"source": str(folder)}}

    def ends(name: str, act: str) -> dict[str, Any]:
        script = f"import os, signal, time\nwhile not os.path.exists('/workspace/{name}'): time.sleep(0.02)\n{act}"
        return mortal.spawn("python3", "-c", script, **body)

    early = ends("early", "os._exit(5)")
    hit = ends("early", "os.kill(os.getpid(), signal.SIGSEGV)")
    late = ends("late", "os._exit(6)")
    after = ends("after", "os._exit(7)")
    greedy = mortal.spawn(
        "python3",
        "-c",
        "import os, time\nwhile not os.path.exists('/workspace/early'): time.sleep(0.02)\nbytearray(400 << 20)",
        **body,
        limits={"memory": "64m"},
    )
    mortal.kill()
    (folder / "early").touch()
    # The guest waits 10 s for a daemon to tell, then leaves with the command's code.
    wait_for(lambda: not lives(early["pid"]), 20, "the guest did not leave by itself")
    (folder / "late").touch()
    wait_for(lambda: children_of(late["pid"]) == [], 5)
    mortal.start(proven=False)
    (folder / "after").touch()
    told = {name: mortal.wait(agent)["exit"] for name, agent in (("early", early), ("late", late), ("after", after))}
    assert {name: (item["code"], item["reason"]) for name, item in told.items()} == {
        "early": (5, "exited"),
        "late": (6, "exited"),
        "after": (7, "exited"),
    }
    killed = mortal.wait(hit)["exit"]
    assert (killed["code"], killed["signal"], killed["reason"]) == (139, 11, "killed")
    assert mortal.wait(greedy)["exit"]["reason"] == "oom"


def test_a_time_that_ran_out_in_the_downtime_is_kept(mortal: RunningDaemon, engine) -> None:
    folder = mortal.workspace("ttl")
    end_by_itself = "while ! [ -e /workspace/go ]; do sleep 0.02; done; exit 3"
    body = {"team": "cr-ttl", "network": "none"}
    long = mortal.spawn("sleep", "600", ttl=600, **body)
    done = mortal.spawn("sh", "-c", end_by_itself, ttl=4, workspace={"source": str(folder)}, **body)
    over = mortal.spawn("sleep", "600", ttl=4, **body)
    wall = mortal.spawn("sleep", "600", limits={"wall": 4}, **body)
    mortal.kill()
    (folder / "go").touch()
    wait_for(lambda: children_of(done["pid"]) == [], 3)
    time.sleep(4.2)
    assert engine.containers.get(over["container_id"]).status == "running", "nobody was there to end it"
    mortal.start(proven=False)
    told = [mortal.wait(agent)["exit"] for agent in (over, wall, done)]
    assert [(item["code"], item["reason"]) for item in told] == [(137, "ttl"), (137, "wall"), (3, "exited")]
    settled(mortal)
    assert shown(mortal, long)["state"] == "running"


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.06])
def test_killed_between_the_steps_of_a_stop(mortal: RunningDaemon, engine, delay: float) -> None:
    agents = [mortal.spawn("sleep", "600", team="cr-stop", network="none") for _ in range(3)]
    connections = [knock(mortal) for _ in agents]
    for agent, connection in zip(agents, connections, strict=True):
        connection.sendall(f"DELETE /v1/agents/{agent['id']}?grace=0 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    time.sleep(delay)
    mortal.kill()
    mortal.start(proven=False)
    settled(mortal)
    for agent in agents:
        # A stop that was begun is finished; one that was not has changed nothing. There is no third state.
        state = wait_for(lambda a=agent: (s := shown(mortal, a)["state"]) in ("running", "removed") and s, 10)
        if state == "removed":
            gone(engine, agent)
        else:
            assert engine.containers.get(agent["container_id"]).status == "running"
            assert mortal.delete(f"/v1/agents/{agent['id']}?grace=0").json["state"] == "removed"
    for connection in connections:
        connection.close()
    assert assert_joined(mortal, engine) == []


def test_killed_in_the_midst_of_one_spawn_leaves_nothing_of_it(mortal: RunningDaemon, engine) -> None:
    mortal.workspace("shared")
    body = {"team": "cr-half", **SLEEP, "network": "none", "workspace": {"source": str(mortal.roots / "shared")}}
    body["secrets"] = [{"name": "token", "value": "not-to-be-found"}]
    connection = knock(mortal)
    connection.sendall(spawn_bytes(body))
    wait_for(lambda: containers_of(engine, mortal.instance), 10)
    mortal.kill()
    connection.close()
    mortal.start(proven=False)
    settled(mortal)
    assert [a for a in assert_joined(mortal, engine) if a["state"] != "running"] == []
    assert subprocess.run(["grep", "-rl", "not-to-be-found", str(mortal.home)], check=False).returncode == 1


def test_what_carries_our_label_without_a_promise_goes_and_nothing_else(
    mortal: RunningDaemon, engine, image_pins
) -> None:
    agent = mortal.spawn("sleep", "600", team="cr-orphan", network="none")
    mortal.kill()
    image = image_pins["isolator/agent-python"]
    common = {"entrypoint": ["sleep", "600"], "network_mode": "none", "detach": True}
    ours = {"openclaw.managed": "true", "openclaw.team": "x", "isolator.instance": mortal.instance}
    # One claims to be an agent that is really there: the id of its container tells them apart.
    orphans = [
        engine.containers.create(image, labels={**ours, "openclaw.agent": "ghost"}, **common),
        engine.containers.run(image, labels={**ours, "openclaw.agent": agent["id"]}, **common),
    ]
    spared = [
        engine.containers.run(image, labels={**ours, "isolator.instance": mortal.instance + "-other"}, **common),
        engine.containers.run(image, **common),
    ]
    networks = [
        engine.networks.create("openclaw-team-cr-ghost", internal=True, labels={**ours, "openclaw.team": "cr-ghost"}),
        engine.networks.create(
            "openclaw-team-cr-other", internal=True, labels={**ours, "isolator.instance": mortal.instance + "-other"}
        ),
        engine.networks.create("cr-foreign", internal=True),
    ]
    try:
        mortal.start(proven=False)
        settled(mortal)
        for orphan in orphans:
            gone(engine, {"container_id": orphan.id, "id": "orphan"})
        for container in spared:
            container.reload()
            assert container.status == "running"
        assert engine.containers.get(agent["container_id"]).status == "running"
        left = {item.name for item in engine.networks.list()}
        assert "openclaw-team-cr-ghost" not in left
        assert {"openclaw-team-cr-other", "cr-foreign", "openclaw-team-cr-orphan"} <= left
    finally:
        for item in (*orphans, *spared):
            with contextlib.suppress(docker.errors.APIError):
                item.remove(force=True)
        for network in networks:
            with contextlib.suppress(docker.errors.APIError):
                network.remove()


def test_a_network_the_engine_lost_in_the_downtime_is_made_again(mortal: RunningDaemon, engine) -> None:
    mortal.post("/v1/teams", {"id": "cr-net"})
    mortal.kill()
    engine.networks.list(names=["openclaw-team-cr-net"])[0].remove()
    mortal.start()
    settled(mortal)
    _, output = mortal.run("hostname", team="cr-net", name="inside")
    assert output.strip() == "inside"


def test_stale_files_do_not_stop_a_start_and_a_living_daemon_does(mortal: RunningDaemon, engine, image_pins) -> None:
    agent = mortal.spawn("sleep", "600", team="cr-stale", network="none")
    mortal.kill()
    assert mortal.socket.exists(), "a stale socket is what this is about"
    mortal.start(proven=False)
    assert shown(mortal, agent)["state"] == "running"
    with running_daemon(engine, image_pins, start=False) as other:
        other.home.joinpath("state").mkdir()
        for changes, code in (
            ({"ISOLATOR_STATE_DIR": str(mortal.home / "state")}, "state_in_use"),
            ({"ISOLATOR_SOCKET": str(mortal.socket)}, "socket_in_use"),
        ):
            second = subprocess.run(
                [sys.executable, "-m", "isolator", "daemon"],
                env={**other.environment(), **changes},
                capture_output=True,
                timeout=20,
                check=False,
            )
            assert second.returncode != 0
            assert code in second.stderr.decode()
            assert shown(mortal, agent)["state"] == "running"
            assert mortal.get("/healthz").status == 200
        other.start(proven=False)
        assert other.get("/v1/agents").json["items"] == []


def test_the_api_answers_before_reconcile_has_ended(mortal: RunningDaemon, engine) -> None:
    agents = [mortal.spawn("sleep", "600", team="cr-ready", network="none") for _ in range(20)]
    mortal.kill()
    with GatedSocket(mortal.home / "gate.sock", "/var/run/docker.sock") as gate:
        gate.close_gate()
        mortal.extra["ISOLATOR_DOCKER_SOCKET"] = str(gate.path)
        before = mortal.log.count("daemon.reconciled")
        mortal.start(proven=False)
        assert mortal.log.count("daemon.reconciled") == before
        listed = mortal.get("/v1/agents").json["items"]
        assert {item["id"] for item in listed} == {agent["id"] for agent in agents}
        assert mortal.get("/readyz").status == 503
        gate.open_gate()
        wait_for(lambda: mortal.get("/readyz").status == 200, 20)
        settled(mortal)
        reconciled = [event for event in events_of(mortal) if event["type"] == "daemon.reconciled"][-1]
        assert reconciled["data"]["adopted"] == 20
        del mortal.extra["ISOLATOR_DOCKER_SOCKET"]
        mortal.stop()
    mortal.start(proven=False)
