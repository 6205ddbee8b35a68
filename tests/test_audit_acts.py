"""No act without its line: whatever moment the daemon is killed at, every container that ever was had its intent."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import docker
import pytest
from api_helpers import assert_problem
from conftest import RunningDaemon

from isolator.audit.reading import verify

pytestmark = pytest.mark.engine


def log_of(daemon: RunningDaemon) -> Path:
    return daemon.home / "state" / "audit" / "audit.jsonl"


def entries(daemon: RunningDaemon, act: str, kind: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in log_of(daemon).read_bytes().splitlines()]
    return [record for record in records if record["act"] == act and record["kind"] == kind]


def test_every_act_has_an_intent_and_then_an_outcome(daemon: RunningDaemon) -> None:
    agent = daemon.spawn(
        "sleep", "60", team="acts", name="worker", env={"A": "b"}, secrets=[{"name": "K", "value": "hush!"}]
    )
    daemon.delete(f"/v1/agents/{agent['id']}")
    assert_problem(daemon.post("/v1/agents", {"team": "acts", "command": ["/no/such"]}), 400, "command_not_found")
    daemon.delete("/v1/teams/acts")
    records = [json.loads(line) for line in log_of(daemon).read_bytes().splitlines()]
    mine = [record for record in records if record.get("team") == "acts"]
    intents = {record["id"]: record for record in mine if record["kind"] == "intent"}
    outcomes = {record["id"]: record for record in mine if record["kind"] == "outcome"}
    assert set(intents) == set(outcomes)
    for number, intent in intents.items():
        assert intent["seq"] < outcomes[number]["seq"]
        assert intent["act"] == outcomes[number]["act"]
    acts = [(record["act"], outcomes[record["id"]]["result"]) for record in intents.values()]
    assert acts == [
        ("team.create", "done"), ("agent.spawn", "done"), ("agent.stop", "done"), ("agent.spawn", "failed"),
        ("team.delete", "done"),
    ]  # fmt: skip
    first = next(record for record in intents.values() if record["act"] == "agent.spawn")
    assert (first["actor"], first["agent"], first["detail"]["program"]) == ("uid:0", agent["id"], "sleep")
    assert first["detail"]["secrets"] == ["K"]
    assert "hush!" not in log_of(daemon).read_text()
    assert daemon.post("/v1/audit/verify").json["ok"] is True


def test_an_edit_of_the_file_beneath_a_running_daemon_is_found(own_daemon: RunningDaemon) -> None:
    own_daemon.post("/v1/teams", {"id": "edited"})
    path = log_of(own_daemon)
    original = path.read_bytes()
    assert own_daemon.post("/v1/audit/verify").json["ok"] is True
    path.write_bytes(original.replace(b'"edited"', b'"hidden"'))
    found = own_daemon.post("/v1/audit/verify").json
    assert (found["ok"], "line" in found["problem"]) == (False, True)
    path.write_bytes(original)
    assert own_daemon.post("/v1/audit/verify").json["ok"] is True


def test_a_daemon_does_not_start_on_a_log_that_was_cut(own_daemon: RunningDaemon) -> None:
    own_daemon.post("/v1/teams", {"id": "cut"})
    own_daemon.stop()
    path = log_of(own_daemon)
    original = path.read_bytes()
    path.write_bytes(b"".join(original.splitlines(keepends=True)[:-1]))
    with pytest.raises(AssertionError, match="the daemon ended"):
        own_daemon.start()
    assert "audit_damaged" in own_daemon.log
    assert "Traceback" not in own_daemon.log
    path.write_bytes(original)
    own_daemon.start()
    assert own_daemon.get("/v1/teams/cut").status == 200


def test_a_full_disk_stops_every_act_and_nothing_that_runs(
    own_daemon: RunningDaemon, engine: docker.DockerClient
) -> None:
    running = own_daemon.spawn("sleep", "600", team="full")
    own_daemon.stop()
    folder = log_of(own_daemon).parent
    kept = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", str(folder)], check=True, timeout=10)
    try:
        for name, content in kept.items():
            (folder / name).write_bytes(content)
        own_daemon.start()
        with contextlib.suppress(OSError):
            (folder / "ballast").write_bytes(b"x" * 65536)
        # a page may be left; it is soon used up
        for number in range(40):
            answer = own_daemon.post("/v1/teams", {"id": f"full-{number}"})
            if answer.status != 201:
                break
        assert_problem(answer, 503, "audit_unavailable")
        teams = {item["id"] for item in own_daemon.get("/v1/teams").json["items"]}
        for answer in (
            own_daemon.post("/v1/agents", {"team": "full", "command": ["true"]}),
            own_daemon.delete(f"/v1/agents/{running['id']}"),
            own_daemon.delete("/v1/teams/full"),
        ):
            assert_problem(answer, 503, "audit_unavailable")
        label = {"label": f"isolator.instance={own_daemon.instance}"}
        assert [item.id for item in engine.containers.list(all=True, filters=label)] == [running["container_id"]]
        assert own_daemon.get(f"/v1/agents/{running['id']}").json["state"] == "running"
        assert own_daemon.get("/healthz").status == 200
        (folder / "ballast").unlink()
        assert own_daemon.spawn("true", team="full")["state"] == "running"
        assert {item["id"] for item in own_daemon.get("/v1/teams").json["items"]} == teams
        assert own_daemon.post("/v1/audit/verify").json["ok"] is True
        for team in teams:
            assert own_daemon.delete(f"/v1/teams/{team}").status == 200
    finally:
        own_daemon.stop()
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=10)


def test_killed_at_any_moment_every_container_had_its_intent(
    own_daemon: RunningDaemon, engine: docker.DockerClient
) -> None:
    label = {"label": f"isolator.instance={own_daemon.instance}"}
    seen: set[str] = set()
    own_daemon.post("/v1/teams", {"id": "killed"})

    def spawn_many(daemon: RunningDaemon) -> None:
        with contextlib.suppress(OSError, AssertionError, ValueError):
            for _ in range(20):
                daemon.post("/v1/agents", {"team": "killed", "command": ["sleep", "600"]})

    for delay in (0.05, 0.17, 0.31, 0.6):
        spawners = [threading.Thread(target=spawn_many, args=(own_daemon,)) for _ in range(2)]
        for thread in spawners:
            thread.start()
        time.sleep(delay)
        own_daemon.kill()
        for thread in spawners:
            thread.join(70)
        containers = engine.api.containers(all=True, filters=label)
        seen |= {item["Labels"]["openclaw.agent"] for item in containers if item["Labels"]["openclaw.team"] == "killed"}
        intents = {record["agent"] for record in entries(own_daemon, "agent.spawn", "intent")}
        assert seen <= intents
        assert verify(log_of(own_daemon)).problem is None
        own_daemon.start()
        assert own_daemon.post("/v1/audit/verify").json["ok"] is True
    assert seen
