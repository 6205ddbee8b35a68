"""A claim that is broken off at any step: what was acknowledged goes on, of everything else nothing stays."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import docker.errors
import pytest
from attack_helpers import audit_entries, team
from conftest import RunningDaemon, running_daemon, wait_for
from engine_helpers import assert_joined, containers_of, events_of, gone, knock, settled, spawn_bytes
from pool_helpers import claimed, filled, primed, ran, waiting

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]

SECRET = "not-to-be-found"


class Faults:
    """Switches of tests/faults."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on(self, name: str) -> None:
        (self.folder / name).touch()

    def off(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def daemon(engine: docker.DockerClient, image_pins: dict[str, str], faults: Faults) -> Iterator[RunningDaemon]:
    extra = {
        "PYTHONPATH": str(Path(__file__).parent / "faults"),
        "FAULTS": str(faults.folder),
        "ISOLATOR_SPAWN_TIMEOUT": "4",
        "ISOLATOR_POOL_DEPTH": "1",
    }
    with running_daemon(engine, image_pins, **extra) as running:
        running.workspace("shared")
        yield running


@pytest.fixture(autouse=True)
def _healed(faults: Faults, daemon: RunningDaemon) -> Iterator[None]:
    """After each test no fault is on, the daemon runs, and there are no agents."""
    yield
    for fault in faults.folder.iterdir():
        fault.unlink()
    assert daemon.process is not None
    if daemon.process.poll() is not None:
        daemon.start()
    for each in daemon.get("/v1/teams").json["items"]:
        assert daemon.delete(f"/v1/teams/{each['id']}").status == 200


def body_of(daemon: RunningDaemon, prefix: str) -> dict[str, Any]:
    return {"team": team(daemon, prefix), "workspace": {"source": str(daemon.roots / "shared")}}


def results(daemon: RunningDaemon, agent: str) -> list[str | None]:
    """What became of the spawn by the audit log: intents as None."""
    return [e.get("result") for e in audit_entries(daemon) if e.get("agent") == agent and e["act"] == "agent.spawn"]


@pytest.mark.parametrize("point", ["taken", "announced", "placed", "released", "recorded"])
def test_killed_at_a_step_of_a_claim(daemon: RunningDaemon, engine, faults: Faults, point: str) -> None:
    body = body_of(daemon, f"die-{point}")
    (box,) = filled(daemon, primed(daemon, **body))
    request = {**body, "command": ["sleep", "600"], "secrets": [{"name": "s", "value": SECRET}]}
    headers = {"Idempotency-Key": point}
    faults.on(f"die-{point}")
    with pytest.raises((OSError, EOFError)):
        daemon.post("/v1/agents", request, headers=headers)
    assert daemon.process is not None
    assert daemon.process.wait(10) == -9
    faults.off(f"die-{point}")
    daemon.start()
    settled(daemon)
    agents = assert_joined(daemon, engine)
    assert [agent["id"] for agent in agents] == ([box["id"]] if point == "recorded" else [])
    retried = daemon.post("/v1/agents", request, headers=headers)
    assert retried.status == 201, retried.content
    assert (retried.json["id"] == box["id"]) is (point == "recorded")
    assert ran(daemon, retried.json, "cat", "/run/secrets/s") == SECRET
    if point == "recorded":
        name = f"/openclaw-{body['team']}-{box['id']}"
        wait_for(lambda: engine.api.inspect_container(box["container_id"])["Name"] == name, 5, "not renamed")
    found = subprocess.run(["grep", "-rl", SECRET, str(daemon.home)], check=False, capture_output=True, text=True)
    assert found.stdout == ""


@pytest.mark.parametrize("key", [None, "hung-up"])
def test_a_caller_who_hangs_up_during_a_claim_leaves_no_trace(
    daemon: RunningDaemon, engine, faults: Faults, key: str | None
) -> None:
    body = {**body_of(daemon, "hang"), "command": ["sleep", "600"]}
    kind = primed(daemon, body["team"], workspace=body["workspace"])
    (box,) = filled(daemon, kind)
    faults.on("claim-slow")
    connection = knock(daemon)
    connection.sendall(spawn_bytes(body, *([f"Idempotency-Key: {key}"] if key else [])))
    wait_for(lambda: box["id"] not in [item["id"] for item in waiting(daemon)], 5)
    connection.close()
    time.sleep(0.1)
    faults.off("claim-slow")
    wait_for(lambda: daemon.get(f"/v1/agents/{box['id']}").status == 404, 10)
    wait_for(lambda: box["id"] not in containers_of(engine, daemon.instance), 10)
    assert not (daemon.home / "run" / "agents" / box["id"]).exists()
    assert daemon.get(f"/v1/teams/{body['team']}").status == 200
    again = daemon.post("/v1/agents", body, headers={"Idempotency-Key": key} if key else {})
    assert (again.status, again.json["state"]) == (201, "running")
    assert again.json["id"] != box["id"]


def test_a_team_made_for_a_caller_who_hung_up_goes_though_boxes_were_begun_for_it(
    daemon: RunningDaemon, engine, faults: Faults
) -> None:
    body = {**body_of(daemon, "nobody"), "command": ["sleep", "600"]}
    faults.on("answer-late")
    connection = knock(daemon)
    connection.sendall(spawn_bytes(body))
    wait_for(lambda: daemon.get(f"/v1/agents?team={body['team']}&state=running").json["items"], 10)
    connection.close()
    time.sleep(0.1)
    faults.off("answer-late")
    wait_for(lambda: daemon.get(f"/v1/teams/{body['team']}").status == 404, 10)
    wait_for(lambda: not engine.api.containers(all=True, filters={"label": f"openclaw.team={body['team']}"}), 10)


def test_a_claim_over_its_time_is_undone_and_told(daemon: RunningDaemon, engine, faults: Faults) -> None:
    body = {**body_of(daemon, "late"), "command": ["sleep", "600"]}
    (box,) = filled(daemon, primed(daemon, body["team"], workspace=body["workspace"]))
    faults.on("claim-slow")
    answer = daemon.post("/v1/agents", body)
    faults.off("claim-slow")
    assert (answer.status, answer.json["code"]) == (503, "spawn_timeout")
    gone(engine, box)
    assert results(daemon, box["id"]) == [None, "failed"]
    assert daemon.get(f"/v1/agents?team={body['team']}&state=running").json["items"] == []


def test_a_record_the_disk_refuses_undoes_the_claim(daemon: RunningDaemon, engine, faults: Faults) -> None:
    body = {**body_of(daemon, "disk"), "command": ["sleep", "600"]}
    (box,) = filled(daemon, primed(daemon, body["team"], workspace=body["workspace"]))
    faults.on("record-refused")
    answer = daemon.post("/v1/agents", body)
    assert (answer.status, answer.json["code"]) == (503, "store_unavailable")
    faults.off("record-refused")
    gone(engine, box)
    assert daemon.get(f"/v1/agents/{box['id']}").status == 404
    assert results(daemon, box["id"]) == [None, "done", "undone"]


def test_a_place_that_fails_is_served_cold(daemon: RunningDaemon, engine, faults: Faults) -> None:
    body = body_of(daemon, "place")
    (box,) = filled(daemon, primed(daemon, body["team"], workspace=body["workspace"]))
    faults.on("place-fails")
    agent = daemon.spawn("sh", "-c", "touch /workspace/placed; sleep 600", **body)
    faults.off("place-fails")
    assert agent["warm"] is False
    wait_for((daemon.roots / "shared" / "placed").exists, 5)
    gone(engine, box)
    assert results(daemon, box["id"]) == [None, "failed"]
    assert results(daemon, agent["id"]) == [None, "done"]


def test_a_waiting_box_killed_from_outside_is_replaced_and_serves_nobody(daemon: RunningDaemon, engine) -> None:
    body = body_of(daemon, "shot")
    kind = primed(daemon, **body)
    (box,) = filled(daemon, kind)
    engine.containers.get(box["container_id"]).kill()
    agent = daemon.spawn("sleep", "600", **body)
    assert (agent["state"], agent["id"] == box["id"]) == ("running", False)
    assert ran(daemon, agent, "pwd") == "/workspace\n"
    assert filled(daemon, kind)[0]["id"] != box["id"]
    wait_for(lambda: box["id"] not in containers_of(engine, daemon.instance), 10)


def test_reconcile_never_eats_a_box_that_waits_or_is_claimed(daemon: RunningDaemon, faults: Faults) -> None:
    body = body_of(daemon, "eaten")
    kind = primed(daemon, **body)
    reconciled = daemon.log.count("daemon.reconciled")
    faults.on("reconciling")
    for _ in range(6):
        filled(daemon, kind)
        agent = claimed(daemon, "sleep", "600", **body)
        assert ran(daemon, agent, "pwd") == "/workspace\n"
    wait_for(lambda: daemon.log.count("daemon.reconciled") > reconciled + 20, 10)
    faults.off("reconciling")
    assert len(daemon.get(f"/v1/agents?team={body['team']}&state=running").json["items"]) == 6
    swept = [e for e in audit_entries(daemon) if e["act"] == "daemon.reconcile"]
    assert not [e for e in swept if agent["id"] in str(e)]
    assert "removing a box nobody was promised" not in daemon.log[daemon.log.rfind("isolator: ready in") :]


def test_an_engine_that_went_away_and_came_back(daemon: RunningDaemon, engine, faults: Faults) -> None:
    body = body_of(daemon, "away")
    kind = primed(daemon, **body)
    (box,) = filled(daemon, kind)
    agent = claimed(daemon, "sleep", "600", **body)
    (box,) = filled(daemon, kind)
    faults.on("engine-away")
    wait_for(lambda: waiting(daemon) == [], 10)
    faults.off("engine-away")
    wait_for(lambda: (found := waiting(daemon)) and found[0]["id"] != box["id"], 30, lambda: daemon.log[-3000:])
    assert box["id"] not in containers_of(engine, daemon.instance)
    assert ran(daemon, agent, "pwd") == "/workspace\n"
    assert claimed(daemon, "sleep", "600", **body)["state"] == "running"
    assert {"engine.down", "engine.up"} <= {event["type"] for event in events_of(daemon)}


def test_a_daemon_that_ends_takes_its_waiting_boxes_along(daemon: RunningDaemon, engine) -> None:
    body = body_of(daemon, "ends")
    filled(daemon, primed(daemon, **body))
    agent = claimed(daemon, "sleep", "600", **body)
    # In the midst of a refill, too.
    daemon.stop()
    assert containers_of(engine, daemon.instance).keys() == {agent["id"]}
    assert {entry.name for entry in (daemon.home / "run" / "agents").iterdir()} == {agent["id"]}
    daemon.start()
    settled(daemon)
    assert ran(daemon, agent, "pwd") == "/workspace\n"
