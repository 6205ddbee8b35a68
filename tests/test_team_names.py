"""A team is its whole name: one whose name is part of another's is somebody else."""

from __future__ import annotations

import docker
import pytest
from conftest import RunningDaemon

pytestmark = pytest.mark.engine

NAMES = ("web", "web-2", "web2", "my-web")


def networks_of(daemon: RunningDaemon, engine: docker.DockerClient) -> set[str]:
    found = engine.networks.list(filters={"label": f"isolator.instance={daemon.instance}"})
    return {network.name.removeprefix("openclaw-team-") for network in found}


def test_deleting_a_team_leaves_those_with_longer_names(daemon: RunningDaemon, engine: docker.DockerClient) -> None:
    for name in NAMES:
        assert daemon.post("/v1/teams", {"id": name}).status == 201
    busy = daemon.spawn("sleep", "60", team="web2")
    assert networks_of(daemon, engine) == set(NAMES)
    assert daemon.delete("/v1/teams/web").status == 200
    assert networks_of(daemon, engine) == set(NAMES) - {"web"}
    assert daemon.get(f"/v1/agents/{busy['id']}").json["state"] == "running"
    ended, output = daemon.run("echo", "still here", team="my-web")
    assert (ended["exit"]["code"], output) == (0, "still here\n")
    assert sorted(item["id"] for item in daemon.get("/v1/teams").json["items"]) == sorted(set(NAMES) - {"web"})


def test_listing_and_filtering_go_by_the_whole_name(daemon: RunningDaemon, engine: docker.DockerClient) -> None:
    for name in ("pair", "pair-b"):
        daemon.spawn("sleep", "60", team=name)
    for name in ("pair", "pair-b"):
        (agent,) = daemon.get(f"/v1/agents?team={name}").json["items"]
        assert agent["team"] == name
        (container,) = engine.containers.list(filters={"label": f"openclaw.team={name}"})
        assert container.labels["openclaw.team"] == name
