"""Health, readiness and metrics: true at any moment, parseable, and without names or ids in labels."""

from __future__ import annotations

import pytest
from conftest import RunningDaemon, running_daemon, wait_for
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.engine


def figures(daemon: RunningDaemon) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by name and labels; parsing them is part of the test."""
    answer = daemon.get("/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.content.decode())
        for sample in family.samples
    }


def test_health_and_readiness_say_yes(daemon: RunningDaemon) -> None:
    assert (daemon.get("/healthz").status, daemon.get("/healthz").json) == (200, {"status": "ok"})
    ready = daemon.get("/readyz")
    assert (ready.status, ready.json) == (200, {"ready": True, "engine": "up", "network": "proven"})


def test_without_an_engine_it_is_alive_but_not_ready(engine, image_pins, tmp_path_factory) -> None:
    absent = tmp_path_factory.mktemp("engine") / "none.sock"
    with running_daemon(engine, image_pins, start=False, ISOLATOR_DOCKER_SOCKET=str(absent)) as daemon:
        daemon.start(proven=False)
        assert daemon.get("/healthz").status == 200
        ready = daemon.get("/readyz")
        assert (ready.status, ready.json["ready"], ready.json["engine"]) == (503, False, "down")
        assert figures(daemon)["isolator_engine_up", ()] == 0
        degraded = {item["code"] for item in daemon.get("/v1/info").json["degraded"]}
        assert {"engine_unavailable", "network_unproven"} <= degraded
        refused = daemon.post("/v1/agents", {"team": "t", "command": ["true"]}, timeout=90)
        assert (refused.status, refused.json["code"]) == (503, "engine_unavailable")
        assert refused.headers["retry-after"] == str(refused.json["retry_after"])
        assert daemon.get("/v1/teams").json["items"] == []


def test_agents_and_teams_are_counted_by_state(daemon: RunningDaemon) -> None:
    before = figures(daemon)
    running = daemon.spawn("sleep", "60", team="metrics")
    ended = daemon.spawn("true", team="metrics")
    daemon.wait(ended)
    after = figures(daemon)

    def grown(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0)

    assert grown("isolator_agents", state="running") == 1
    assert grown("isolator_agents", state="exited") == 1
    assert grown("isolator_teams") == 1
    assert after["isolator_engine_up", ()] == 1
    assert grown("isolator_spawn_seconds_count") == 2
    assert 0 < grown("isolator_spawn_seconds_sum") < 60
    daemon.delete(f"/v1/agents/{running['id']}")
    wait_for(lambda: figures(daemon)["isolator_agents", (("state", "running"),)] == 0, 10)


def test_requests_are_counted_by_pattern_never_by_name(daemon: RunningDaemon) -> None:
    for number in range(30):
        daemon.get(f"/v1/teams/absent-{number}")
        daemon.get(f"/no/such/{number}")
    found = figures(daemon)
    requests = {
        dict(labels)["route"]: value for (name, labels), value in found.items() if name == "isolator_requests_total"
    }
    assert requests["/v1/teams/{team}"] >= 30
    assert requests["none"] >= 30
    text = daemon.get("/metrics").content.decode()
    assert "absent-" not in text
    assert "/no/such" not in text
    assert len(found) < 300
