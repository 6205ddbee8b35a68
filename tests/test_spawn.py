"""The main job, through the API, on a real engine."""

from __future__ import annotations

import pytest
from conftest import RunningDaemon, running_daemon

pytestmark = pytest.mark.engine


def test_a_spawned_agent_runs_and_its_output_is_read(daemon: RunningDaemon) -> None:
    ended, output = daemon.run("python3", "-c", "print('hello from inside')", team="hello", name="first")
    assert output == "hello from inside\n"
    assert ended["state"] == "exited"
    assert ended["exit"] == {"code": 0, "signal": None, "reason": "exited", "detail": None}


def test_docker_ps_finds_it_by_label(daemon: RunningDaemon, engine) -> None:
    agent = daemon.spawn("sleep", "60", team="labels", name="seen")
    found = engine.containers.list(filters={"label": "openclaw.team=labels"})
    assert [item.id for item in found] == [agent["container_id"]]
    assert found[0].labels["openclaw.agent"] == agent["id"]
    assert found[0].labels["openclaw.managed"] == "true"
    assert daemon.delete(f"/v1/agents/{agent['id']}").json["state"] == "removed"
    assert engine.containers.list(all=True, filters={"label": "openclaw.team=labels"}) == []


def test_an_agent_counts_as_held_until_it_is_removed(engine, image_pins) -> None:
    with running_daemon(engine, image_pins, ISOLATOR_MAX_AGENTS="1") as daemon:
        ended, _ = daemon.run("true", team="counted", network="none")
        assert ended["state"] == "exited"
        refused = daemon.post("/v1/agents", {"team": "counted", "command": ["true"], "network": "none"})
        assert (refused.status, refused.json["code"]) == (429, "agents_exhausted")
        assert daemon.delete(f"/v1/agents/{ended['id']}").status == 200
        daemon.spawn("true", team="counted", network="none")
