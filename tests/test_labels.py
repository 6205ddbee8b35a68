"""`docker ps --filter label=…` is right at any moment: while a box is made, while it runs, after it is gone."""

from __future__ import annotations

import subprocess
import threading
from typing import Any

import pytest
from attack_helpers import promised, team
from conftest import RunningDaemon, wait_for

pytestmark = pytest.mark.engine


def docker_ps(*filters: str, every: bool = True) -> set[str]:
    """Ids, as the operator's own command prints them."""
    argv = ["docker", "ps", "--quiet", "--no-trunc", *(["--all"] if every else [])]
    for item in filters:
        argv += ["--filter", f"label={item}"]
    return set(subprocess.run(argv, check=True, capture_output=True, text=True, timeout=20).stdout.split())


def test_a_container_carries_every_label(daemon: RunningDaemon, engine) -> None:
    agent = daemon.spawn("sleep", "60", team=team(daemon), name="marked", ttl=300)
    labels = engine.api.inspect_container(agent["container_id"])["Config"]["Labels"]
    record = promised(daemon, agent["id"])
    assert {name: value for name, value in labels.items() if name.startswith(("openclaw.", "isolator."))} == {
        "openclaw.managed": "true",
        "openclaw.team": team(daemon),
        "openclaw.agent": agent["id"],
        "openclaw.name": "marked",
        "isolator.instance": daemon.instance,
        "isolator.daemon": labels["isolator.daemon"],
        "isolator.owner": "uid:0",
        "isolator.spec": record.spec_digest,
        "isolator.image": agent["image_digest"],
        "isolator.expires": labels["isolator.expires"],
        "isolator.recipe": labels["isolator.recipe"],
    }
    assert len(labels["isolator.daemon"]) == 16
    assert labels["isolator.expires"][:10] == agent["expires_at"][:10]
    daemon.delete(f"/v1/agents/{agent['id']}?grace=0")


def test_without_an_end_it_never_expires(daemon: RunningDaemon, engine) -> None:
    agent = daemon.spawn("sleep", "60", team=team(daemon))
    labels = engine.api.inspect_container(agent["container_id"])["Config"]["Labels"]
    assert labels["isolator.expires"] == "never"
    daemon.delete(f"/v1/agents/{agent['id']}?grace=0")


def test_a_network_carries_them_and_goes_with_its_team(daemon: RunningDaemon, engine) -> None:
    name = team(daemon, "net")
    assert daemon.post("/v1/teams", {"id": name}).status == 201
    (network,) = engine.api.networks(filters={"label": [f"openclaw.team={name}", "openclaw.managed=true"]})
    assert network["Name"] == f"openclaw-team-{name}"
    assert network["Labels"] == {
        "openclaw.managed": "true",
        "openclaw.team": name,
        "isolator.instance": daemon.instance,
        "isolator.owner": "uid:0",
    }
    assert daemon.delete(f"/v1/teams/{name}").status == 200
    assert engine.api.networks(filters={"label": f"openclaw.team={name}"}) == []


def test_docker_ps_is_right_at_any_moment(daemon: RunningDaemon) -> None:
    """One team's agents are made and removed while another watches: what `docker ps` shows is theirs, always."""
    name, other = team(daemon, "moving"), team(daemon, "still")
    still = daemon.spawn("sleep", "120", team=other)
    seen: list[set[str]] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.append(docker_ps(f"openclaw.team={name}"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    made: list[dict[str, Any]] = []
    try:
        for _ in range(4):
            agent = daemon.spawn("sleep", "120", team=name)
            assert agent["container_id"] in docker_ps(f"openclaw.team={name}", every=False)
            assert docker_ps(f"openclaw.agent={agent['id']}") == {agent["container_id"]}
            made.append(agent)
        for agent in made[:2]:
            daemon.delete(f"/v1/agents/{agent['id']}?grace=0")
            assert docker_ps(f"openclaw.agent={agent['id']}") == set()
        left = {agent["container_id"] for agent in made[2:]}
        assert docker_ps(f"openclaw.team={name}", "openclaw.managed=true") == left
    finally:
        stop.set()
        watcher.join(20)
    assert set().union(*seen) <= {agent["container_id"] for agent in made}
    assert docker_ps(f"openclaw.team={other}") == {still["container_id"]}
    assert daemon.delete(f"/v1/teams/{name}").status == 200
    assert docker_ps(f"openclaw.team={name}") == set()
    assert docker_ps(f"openclaw.team={other}") == {still["container_id"]}


def test_an_ended_agent_is_shown_until_its_grace_is_over(daemon: RunningDaemon) -> None:
    agent = daemon.spawn("true", team=team(daemon), cleanup_grace=2)
    ended = daemon.wait(agent)
    assert docker_ps(f"openclaw.agent={agent['id']}") == {ended["container_id"]}
    assert docker_ps(f"openclaw.agent={agent['id']}", every=False) == set()
    wait_for(lambda: docker_ps(f"openclaw.agent={agent['id']}") == set(), 15)
    assert daemon.get(f"/v1/agents/{agent['id']}").json["state"] == "removed"


@pytest.mark.parametrize("name", ["A", "a.b", "a_b", "-a", "a-", "a/b", "a\0", "\u0430", "a" * 41, ""])
def test_an_id_that_would_be_another_label_is_refused(daemon: RunningDaemon, name: str) -> None:
    for answer in (
        daemon.post("/v1/teams", {"id": name}),
        daemon.post("/v1/agents", {"team": name, "command": ["true"]}),
        daemon.post("/v1/agents", {"team": team(daemon), "name": name, "command": ["true"]}),
    ):
        assert answer.status == 400, answer.content
        assert answer.json["code"] in ("name_invalid", "invalid_request")
