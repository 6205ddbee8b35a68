"""A stranger's image, allowed by digest: its tricks are taken away or it is refused, each with a stable code.

The images are made from our own by changing only their configuration, so nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import docker
import pytest
from attack_helpers import attack, team
from conftest import RunningDaemon, running_daemon

pytestmark = pytest.mark.engine

TRICKS: dict[str, dict[str, Any]] = {
    "steering": {
        "Entrypoint": ["/bin/sh", "-c", "echo image entrypoint ran"],
        "Cmd": ["echo", "image command ran"],
        "User": "0:0",
        "WorkingDir": "/proc/self/fd/8",
        "Healthcheck": {"Test": ["CMD-SHELL", "touch /tmp/healthcheck-ran"], "Interval": 1_000_000_000},
        "StopSignal": "SIGSTOP",
        "Env": ["PATH=/usr/bin:/bin", "FROM_IMAGE=1", "HOME=/root"],
        "ExposedPorts": {"80/tcp": {}},
        "OnBuild": ["RUN true"],
        "Shell": ["/bin/evil"],
        "Labels": {"maintainer": "somebody"},
    },
    "volume": {"Volumes": {"/data": {}}},
    "loader": {"Env": ["PATH=/usr/bin:/bin", "LD_PRELOAD=/evil.so"]},
    "glibc": {"Env": ["GLIBC_TUNABLES=glibc.malloc.check=3"]},
    "team-label": {"Labels": {"openclaw.team": "victim"}},
    "own-label": {"Labels": {"isolator.instance": "victim"}},
    "own-variable": {"Env": ["ISOLATOR_TEAM=victim"]},
}


@pytest.fixture(scope="module")
def images(engine: docker.DockerClient, image_pins) -> Iterator[dict[str, str]]:
    """Digest of an image for each trick; removed afterwards."""
    container = engine.api.create_container(image_pins["isolator/agent-python"], ["true"], labels={})["Id"]
    made = {}
    try:
        for name, config in TRICKS.items():
            labels = {"isolator.recipe": "x", **config.get("Labels", {})}
            answer = engine.api.commit(container, "isolator-test-foreign", name, conf={**config, "Labels": labels})
            made[name] = engine.api.inspect_image(answer["Id"])["Id"]
        yield made
    finally:
        engine.api.remove_container(container, force=True)
        for name in made:
            engine.api.remove_image(f"isolator-test-foreign:{name}", force=True)


@pytest.fixture(scope="module")
def allowing(engine, image_pins, images: dict[str, str]) -> Iterator[RunningDaemon]:
    """A daemon whose operator allows all of them."""
    with running_daemon(engine, image_pins, ISOLATOR_ALLOWED_IMAGES=json.dumps(list(images.values()))) as running:
        yield running


def test_a_foreign_image_is_refused_unless_its_digest_is_allowed(daemon: RunningDaemon, images: dict[str, str]) -> None:
    body = {"team": team(daemon), "image": "isolator-test-foreign:steering", "command": ["true"]}
    answer = daemon.post("/v1/agents", body)
    assert (answer.status, answer.json["code"]) == (403, "image_not_allowed")
    assert answer.json["digest"] == images["steering"]
    assert daemon.leftovers(docker.from_env()) == [], "not even the team's network may be left"


def test_entrypoint_user_workdir_and_healthcheck_are_taken_away(allowing: RunningDaemon, engine) -> None:
    image = "isolator-test-foreign:steering"
    agent = allowing.spawn("sleep", "60", team=team(allowing), image=image)
    found = engine.api.inspect_container(agent["container_id"])["Config"]
    assert found["Entrypoint"][-1] == "/run/isolator/guest.py"
    assert found["Cmd"] == ["sleep", "60"]
    assert found["User"] == "10001:10001"
    assert found["WorkingDir"] == "/tmp"
    assert found["Healthcheck"]["Test"] == ["NONE"]
    assert found["StopSignal"] == "SIGTERM"
    assert "Health" not in engine.api.inspect_container(agent["container_id"])["State"]
    seen = attack(allowing, "confinement", team=team(allowing), image=image)
    assert seen["status"]["Uid"] == ["10001"] * 4
    assert set(seen["status"]["CapBnd"]) == {"0" * 16}
    allowing.delete(f"/v1/agents/{agent['id']}?grace=0")


def test_without_a_command_the_image_has_no_say_either(allowing: RunningDaemon, engine) -> None:
    agent = allowing.spawn(team=team(allowing), image="isolator-test-foreign:steering")
    assert not engine.api.inspect_container(agent["container_id"])["Config"]["Cmd"]
    stopped = allowing.get(f"/v1/agents/{agent['id']}?wait=1").json
    assert stopped["state"] == "running"
    assert allowing.output(agent) == ""
    allowing.delete(f"/v1/agents/{agent['id']}?grace=0")


def test_by_digest_it_runs_too(allowing: RunningDaemon, images: dict[str, str]) -> None:
    ended, output = allowing.run("sh", "-c", "echo $FROM_IMAGE", team=team(allowing), image=images["steering"])
    assert (ended["exit"]["code"], output) == (0, "1\n")


@pytest.mark.parametrize(
    ("trick", "code"),
    [
        ("volume", "image_unsafe"),
        ("loader", "image_unsafe"),
        ("glibc", "image_unsafe"),
        ("team-label", "image_unsafe"),
        ("own-label", "image_unsafe"),
        ("own-variable", "env_name_refused"),
    ],
)
def test_what_can_not_be_taken_away_is_refused(allowing: RunningDaemon, engine, trick: str, code: str) -> None:
    body = {"team": team(allowing, trick), "image": f"isolator-test-foreign:{trick}", "command": ["true"]}
    answer = allowing.post("/v1/agents", body)
    assert (answer.status, answer.json["code"]) == (403, code), answer.content
    assert not engine.networks.list(names=[f"openclaw-team-{team(allowing, trick)}"])


def test_our_own_names_never_mean_a_tag(allowing: RunningDaemon, engine, images: dict[str, str]) -> None:
    """Whoever may tag images on the engine must not choose what runs under our names."""
    engine.api.tag(images["steering"], "isolator/agent-evil")
    try:
        body = {"team": team(allowing), "image": "isolator/agent-evil", "command": ["true"]}
        answer = allowing.post("/v1/agents", body)
        assert (answer.status, answer.json["code"]) == (404, "image_not_found")
    finally:
        engine.api.remove_image("isolator/agent-evil", noprune=True)
