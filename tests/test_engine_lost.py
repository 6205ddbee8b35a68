"""An engine that dies, hangs and comes back: noticed, told, nobody hung, used again, and nothing half-made left.

The engine killed here is the test's own; the machine's is only asked for an image.
"""

from __future__ import annotations

import concurrent.futures
import random
import shutil
import signal
import time
from collections.abc import Iterator
from typing import Any

import docker
import pytest
from conftest import wait_for
from engine_helpers import events_of, settled, shown, streaming
from own_engine import PROGRAMS, InnerDaemon, OwnEngine, inner_daemon

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # the SDK leaves sockets of a dead engine to the collector
]

PYTHON = ("python3", "-c")
FOREVER = (*PYTHON, "import time; time.sleep(600)")
QUICK = 15.0


@pytest.fixture(scope="module")
def own_engine(engine: docker.DockerClient) -> Iterator[OwnEngine]:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    assert not missing, f"the tests of a lost engine need {missing} to run one of their own"
    own = OwnEngine()
    try:
        own.start(engine)
        yield own
    finally:
        own.close()


@pytest.fixture
def daemon(own_engine: OwnEngine, image_pins: dict[str, str]) -> Iterator[InnerDaemon]:
    """A daemon on the engine that may be killed; afterwards both run, and nothing is left on either."""
    with inner_daemon(own_engine, image_pins, ISOLATOR_ENGINE_TIMEOUT="5") as running:
        yield running
        assert running.process is not None
        assert running.process.poll() is None, f"the daemon ended:\n{running.log[-3000:]}"
        if own_engine.dockerd is None or own_engine.dockerd.poll() is not None:
            own_engine.start_dockerd()
        wait_for(lambda: running.get("/readyz").status == 200, 30)
        settled(running)
        for team in running.get("/v1/teams").json["items"]:
            answer = running.delete(f"/v1/teams/{team['id']}")
            assert answer.status == 200, answer.content
        running.stop()
        client = own_engine.client()
        assert running.leftovers(client) == []
        client.close()


def kinds(daemon: InnerDaemon) -> list[str]:
    return [event["type"] for event in events_of(daemon) if event["type"].startswith(("engine.", "daemon."))]


def refused_for_the_engine(daemon: InnerDaemon, **body: Any) -> None:
    began = time.monotonic()
    answer = daemon.post("/v1/agents", {"team": "el-down", "command": list(FOREVER), **body}, timeout=QUICK)
    assert (answer.status, answer.json["code"]) == (503, "engine_unavailable"), answer.content
    assert "retry-after" in answer.headers
    assert time.monotonic() - began < QUICK


def test_one_that_dies_is_noticed_told_and_used_again(daemon: InnerDaemon, own_engine: OwnEngine) -> None:
    daemon.start()
    folder = daemon.workspace("w")
    agent = daemon.spawn(*FOREVER, team="el-dies", name="first", workspace={"source": str(folder)})
    doomed = daemon.spawn(*FOREVER, team="el-dies", network="none")
    with streaming(daemon, "/v1/events") as events:
        own_engine.kill()
        lines = iter(lambda: events.readline().decode().strip(), "event: engine.down")
        assert len(list(zip(range(200), lines, strict=False))) < 200, "a follower of events is told"
    wait_for(lambda: daemon.get("/readyz").status == 503, 10)
    assert daemon.get("/healthz").status == 200
    refused_for_the_engine(daemon)
    refused_for_the_engine(daemon, network="none")
    assert daemon.get("/v1/info").json["engine"]["up"] is False
    assert "engine_unavailable" in [item["code"] for item in daemon.get("/v1/info").json["degraded"]]
    assert shown(daemon, agent)["id"] == agent["id"], "what it knows it still tells"
    stopped = daemon.delete(f"/v1/agents/{doomed['id']}?grace=0", timeout=QUICK)
    assert (stopped.status, stopped.json["code"]) == (503, "engine_unavailable")
    own_engine.start_dockerd()
    wait_for(lambda: daemon.get("/readyz").status == 200, 15)
    settled(daemon)
    assert kinds(daemon)[-3:] == ["engine.down", "engine.up", "daemon.reconciled"]
    # The stop that was asked for is done. The other agent ended with its engine or lived on: told as it was.
    wait_for(lambda: shown(daemon, doomed)["state"] == "removed", 10)
    client = own_engine.client()
    status = client.containers.get(agent["container_id"]).status
    client.close()
    if status == "running":
        assert shown(daemon, agent)["state"] == "running"
    else:
        assert daemon.wait(agent)["exit"]["reason"] == "killed"
    ended, output = daemon.run(*PYTHON, "print('again')", team="el-dies")
    assert (ended["exit"]["code"], output) == (0, "again\n")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_in_the_middle_of_spawns(daemon: InnerDaemon, own_engine: OwnEngine, seed: int) -> None:
    daemon.start()
    folder = daemon.workspace("w")
    body = {"command": list(FOREVER), "workspace": {"source": str(folder)}, "secrets": [{"name": "s", "value": "v"}]}
    # A team that exists, and one that the first spawn makes: networks are made in the middle too.
    daemon.post("/v1/teams", {"id": "el-old"})
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        spawns = [
            pool.submit(daemon.post, "/v1/agents", {"team": ("el-old", "el-new")[number % 2], **body}, timeout=100)
            for number in range(18)
        ]
        time.sleep(random.Random(seed).uniform(0.1, 1.5))
        own_engine.kill()
        answers = [spawn.result(120) for spawn in spawns]
    assert daemon.get("/healthz").status == 200
    assert {answer.status for answer in answers} <= {201, 502, 503}
    refused = [answer.json["code"] for answer in answers if answer.status != 201]
    assert refused, "it died too late to be in the middle of anything"
    assert set(refused) <= {"engine_unavailable", "network_unproven", "guest_failed", "box_died"}, refused
    own_engine.start_dockerd()
    wait_for(lambda: daemon.get("/readyz").status == 200, 15)
    settled(daemon)
    acknowledged = {answer.json["id"] for answer in answers if answer.status == 201}
    client = own_engine.client()
    listed = {item["id"]: item for item in daemon.get("/v1/agents").json["items"]}
    assert set(listed) == acknowledged

    def strangers() -> list[str]:
        """What is there beside the acknowledged agents and the self-test under way."""
        teams = {team["id"] for team in daemon.get("/v1/teams").json["items"]}
        expected = {f"folder {daemon.home}/run/agents/{agent}" for agent in acknowledged}
        expected |= {f"network openclaw-team-{team}" for team in teams}
        found = [item for item in daemon.leftovers(client) if item not in expected]
        return [item for item in found if not any(agent[:6] in item for agent in acknowledged)]

    daemon.until_proven()
    wait_for(lambda: not strangers(), 10, lambda: f"{strangers()}\n{daemon.log[-3000:]}")
    client.close()
    _, output = daemon.run(*PYTHON, "print('again')", team="el-old")
    assert output == "again\n"


def test_an_end_while_it_is_away_is_told_right(daemon: InnerDaemon, own_engine: OwnEngine) -> None:
    daemon.start(proven=False)
    folder = daemon.workspace("w")
    script = "import os, time\nwhile not os.path.exists('/workspace/go'): time.sleep(0.02)\nos._exit(9)"
    agent = daemon.spawn(*PYTHON, script, team="el-away", network="none", workspace={"source": str(folder)})
    expired = daemon.spawn(*FOREVER, team="el-away", network="none", ttl=3)
    own_engine.kill()
    wait_for(lambda: daemon.get("/readyz").status == 503, 10)
    (folder / "go").touch()
    time.sleep(3)
    own_engine.start_dockerd()
    ended = daemon.wait(agent)
    assert (ended["exit"]["code"], ended["exit"]["reason"]) == (9, "exited")
    assert daemon.wait(expired)["exit"]["reason"] in ("ttl", "killed")


def test_a_daemon_may_start_before_its_engine(daemon: InnerDaemon, own_engine: OwnEngine) -> None:
    own_engine.kill()
    daemon.start(proven=False)
    assert daemon.get("/readyz").status == 503
    assert daemon.get("/v1/agents").json["items"] == []
    refused_for_the_engine(daemon, network="none")
    own_engine.start_dockerd()
    wait_for(lambda: daemon.get("/readyz").status == 200, 15)
    _, output = daemon.run(*PYTHON, "print('late')", team="el-late", network="none")
    assert output == "late\n"


@pytest.mark.parametrize("moment", [0.05, 0.3])
def test_one_that_hangs_in_the_middle_of_the_self_test_keeps_nothing_of_it(
    daemon: InnerDaemon, own_engine: OwnEngine, moment: float
) -> None:
    """A network whose making was not answered in time may be there all the same."""
    daemon.start(proven=False)
    assert own_engine.dockerd is not None
    time.sleep(moment)
    own_engine.dockerd.send_signal(signal.SIGSTOP)
    try:
        time.sleep(7)
    finally:
        own_engine.dockerd.send_signal(signal.SIGCONT)
    wait_for(lambda: daemon.get("/v1/info").json["network"]["status"] == "proven", 60)


def test_one_that_hangs_is_noticed_and_hangs_nobody(daemon: InnerDaemon, own_engine: OwnEngine) -> None:
    """A stopped process keeps its sockets open: calls are cut off at the engine's timeout, which is 5 s here."""
    daemon.start(proven=False)
    agent = daemon.spawn(*FOREVER, team="el-hangs", network="none")
    wait_for(lambda: daemon.get("/v1/info").json["network"]["status"] == "proven", 60)
    assert own_engine.dockerd is not None
    own_engine.dockerd.send_signal(signal.SIGSTOP)
    try:
        refused_for_the_engine(daemon, network="none", team="el-hangs")
        assert daemon.get("/healthz", timeout=2).status == 200
        assert shown(daemon, agent)["state"] == "running"
        wait_for(lambda: daemon.get("/readyz").status == 503, 20)
    finally:
        own_engine.dockerd.send_signal(signal.SIGCONT)
    wait_for(lambda: daemon.get("/readyz").status == 200, 15)
    settled(daemon)
    assert shown(daemon, agent)["state"] == "running", "the engine was away, the agent was not"
    assert daemon.run(*PYTHON, "print(1)", team="el-hangs", network="none")[1] == "1\n"
