"""Stats of real boxes: what they hold, open, fill and burn is told, and nothing of anybody else's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import docker
import pytest
from conftest import RunningDaemon, running_daemon, wait_for

from isolator.api import answers
from isolator.client import Client, ProblemError

pytestmark = pytest.mark.engine
MIB = 1 << 20
LIMITS = {"cpus": 0.5, "memory": "200m", "pids": 50, "disk": "16m", "nofile": 300, "wall": 500}
# Holds 60 MiB, has 120 more files open, fills 5 MiB of /tmp and 1 MiB of /dev/shm, has 4 more threads, and burns CPU.
GREEDY = """
import os, threading, time
held = b"x" * (60 << 20)
files = [open("/dev/null") for _ in range(120)]
for place, size in (("/tmp/full", 5), ("/dev/shm/full", 1)):
    with open(place, "wb") as file:
        file.write(b"y" * (size << 20))
for _ in range(4):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
print("ready", flush=True)
while True:
    pass
"""


@pytest.fixture(scope="module")
def users_daemon(engine: docker.DockerClient, image_pins: dict[str, str]) -> Iterator[RunningDaemon]:
    """Its socket lets everybody in, so that what they may is the API's to say."""
    with running_daemon(engine, image_pins) as daemon:
        daemon.socket.chmod(0o666)
        yield daemon


@pytest.fixture(scope="module")
def greedy(users_daemon: RunningDaemon) -> dict[str, Any]:
    agent = users_daemon.spawn("python3", "-c", GREEDY, team="use", name="greedy", limits=LIMITS, ttl=900)
    wait_for(lambda: "ready" in users_daemon.output(agent), 20, "it did not start")
    return agent


def stats_of(daemon: RunningDaemon, agent: dict[str, Any]) -> Any:
    answer = daemon.get(f"/v1/agents/{agent['id']}/stats")
    assert answer.status == 200, answer.content
    return answer.json


def test_figures_are_in_their_region_and_limits_exact(users_daemon: RunningDaemon, greedy: dict[str, Any]) -> None:
    told = stats_of(users_daemon, greedy)
    answers.StatsAnswer.model_validate(told, strict=True)
    assert (told["agent"], told["name"], told["team"], told["state"]) == (greedy["id"], "greedy", "use", "running")
    limits = {name: entry["limit"] for name, entry in told.items() if isinstance(entry, dict)}
    assert limits == {
        "cpu": 0.5,
        "memory": 200 * MIB,
        "pids": 50,
        "disk": 16 * MIB,
        "shm": 16 * MIB,
        "nofile": 300,
        "network": None,
        "wall": 500,
        "ttl": 900,
    }
    assert 66 * MIB <= told["memory"]["used"] <= 120 * MIB  # what it holds, the two files, and Python itself
    assert told["memory"]["used"] <= told["memory"]["peak"] <= 200 * MIB
    assert told["memory"]["oom_kills"] == 0
    assert 6 <= told["pids"]["used"] <= 10  # the guest, the command, its threads
    assert told["disk"]["used"] == 5 * MIB
    assert told["shm"]["used"] == MIB
    assert 123 <= told["nofile"]["used"] <= 130
    assert told["nofile"]["complete"] is True
    for name in ("wall", "ttl"):
        assert told[name]["used"] > 0
        assert told[name]["used"] + told[name]["left"] == pytest.approx(told[name]["limit"], abs=1)
    assert told["progress"] is None


def test_burnt_cpu_is_told_as_cores_and_throttled_at_the_cap(
    users_daemon: RunningDaemon, greedy: dict[str, Any]
) -> None:
    first = stats_of(users_daemon, greedy)["cpu"]

    def throttled() -> Any:
        later = stats_of(users_daemon, greedy)["cpu"]
        return later if later["throttled"] > first["throttled"] and later["seconds"] > first["seconds"] + 0.2 else None

    later = wait_for(throttled, 20, f"it burns nothing: {first}")
    assert 0 < later["used"] < 0.8  # never far above the cap, however busy this host is
    assert later["over"] > 0


def test_a_new_reading_sees_what_changed(users_daemon: RunningDaemon) -> None:
    agent = users_daemon.spawn(team="use", name="waits", network="none", limits={"disk": "8m"})
    assert stats_of(users_daemon, agent)["disk"] == {"used": 0, "limit": 8 * MIB}
    assert stats_of(users_daemon, agent)["network"] == {"used": 0, "limit": None, "received": 0, "sent": 0}
    with Client(users_daemon.socket) as client:
        client.run(agent["id"], ["dd", "if=/dev/zero", "of=/tmp/x", "bs=1M", "count=3"])
        wait_for(lambda: client.stats(agent["id"]).uses["disk"].used == 3 * MIB, 10)
        hog = "import mmap; m = mmap.mmap(-1, 3 << 30); [m.write(bytes(1 << 20)) for _ in range(3000)]"
        assert client.run(agent["id"], ["python3", "-c", hog]).oom_killed
        wait_for(lambda: client.stats(agent["id"]).uses["memory"].raw["oom_kills"] > 0, 10)


def test_network_bytes_are_the_boxs_own(users_daemon: RunningDaemon, greedy: dict[str, Any]) -> None:
    agent = users_daemon.spawn(team="use", name="talks")
    with Client(users_daemon.socket) as client:
        before = client.stats(agent["id"]).uses["network"].raw
        send = (
            "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
            "[s.sendto(bytes(1000), ('greedy', 9)) for _ in range(100)]"
        )
        assert client.run(agent["id"], ["python3", "-c", send]).exit_code == 0
        wait_for(lambda: client.stats(agent["id"]).uses["network"].raw["sent"] >= before["sent"] + 100_000, 10)


def test_one_answer_has_all_that_the_caller_may_see(
    users_daemon: RunningDaemon, greedy: dict[str, Any], as_user: Callable[[int], AbstractContextManager[None]]
) -> None:
    with as_user(1000):
        own = users_daemon.spawn("sleep", "600", team="own")
        whole = users_daemon.get("/v1/stats").json
        assert [item["agent"] for item in whole["items"]] == [own["id"]]
        assert users_daemon.get(f"/v1/agents/{own['id']}/stats").status == 200
        foreign = users_daemon.get(f"/v1/agents/{greedy['id']}/stats")
    assert (foreign.status, foreign.json["code"]) == (404, "agent_not_found")
    whole = users_daemon.get("/v1/stats")
    answers.StatsList.model_validate(whole.json, strict=True)
    assert {own["id"], greedy["id"]} <= {item["agent"] for item in whole.json["items"]}
    assert whole.json["truncated"] is False
    assert whole.json["next"] is None
    only = users_daemon.get("/v1/stats?team=own").json["items"]
    assert [item["agent"] for item in only] == [own["id"]]
    assert only[0]["cpu"]["used"] is not None


def test_an_ended_agent_has_none(users_daemon: RunningDaemon) -> None:
    agent = users_daemon.spawn("true", team="use")
    users_daemon.wait(agent)
    answer = users_daemon.get(f"/v1/agents/{agent['id']}/stats")
    assert (answer.status, answer.json["code"], answer.json["state"]) == (409, "agent_not_running", "exited")
    users_daemon.delete(f"/v1/agents/{agent['id']}")
    answer = users_daemon.get(f"/v1/agents/{agent['id']}/stats")
    assert (answer.status, answer.json["code"]) == (409, "agent_not_running")


def test_a_box_that_dies_while_it_is_read_is_never_half_told(users_daemon: RunningDaemon) -> None:
    """Asked all the while: whole figures, and from its death on the refusal."""
    agent = users_daemon.spawn(team="use", name="dies")
    with Client(users_daemon.socket) as client:
        assert client.stats(agent["id"]).uses["pids"].used
        os.kill(agent["pid"], 9)

        def refused() -> str | None:
            try:
                uses = client.stats(agent["id"]).uses
            except ProblemError as problem:
                return problem.code
            assert uses["memory"].limit == 512 * MIB
            assert uses["pids"].limit == 256
            return None

        assert wait_for(refused, 15) == "agent_not_running"
        assert agent["id"] not in {item.agent for item in client.all_stats().items}
