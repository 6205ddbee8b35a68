"""A claimed box is bit for bit as confined as a built one: by the engine's word, and by what both say of themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import docker
import pytest
from attack_helpers import program, promised, said, team
from conftest import RunningDaemon, running_daemon, wait_for
from pool_helpers import claimed, filled, primed

from isolator.backends.docker.compare import compare
from isolator.backends.docker.render import render
from isolator.model.box import WORKSPACE
from isolator.seccomp import load_profile

pytestmark = pytest.mark.engine

# Fields of `docker inspect` in which two boxes of one request may differ, and why. Everything below one is covered.
OF_ANY_TWO = {
    "Created": "a time",
    "State.Pid": "a number of the host",
    "State.StartedAt": "a time",
    "GraphDriver.Data": "each container has a writable layer of its own (and no right to write to it)",
    "NetworkSettings.SandboxID": "each container has a network namespace of its own",
    "NetworkSettings.SandboxKey": "the same",
    "NetworkSettings.Networks.NET.EndpointID": "the same",
    "NetworkSettings.Networks.NET.IPAddress": "an address of the team's subnet",
    "NetworkSettings.Networks.NET.MacAddress": "made from it",
    "NetworkSettings.Networks.NET.Aliases": "the container's short id is one",
}
OF_A_CLAIMED_ONE = {
    "Args": "the command is handed over later, so it is not among PID 1's arguments",
    "Config.Cmd": "the same",
    "Config.Env": "the environment is handed over later",
    "Config.WorkingDir": "the working folder is entered later",
    "Config.Labels": "an engine changes no labels: the pool's, and the blank's digest",
    "HostConfig.Mounts": "the workspace is attached later; the next test compares the others",
    "Mounts": "the same",
}


@pytest.fixture(scope="module")
def daemon(engine: docker.DockerClient, image_pins: dict[str, str]) -> Iterator[RunningDaemon]:
    with running_daemon(engine, image_pins, ISOLATOR_POOL_DEPTH="1") as running:
        yield running


@pytest.fixture(scope="module")
def pair(daemon: RunningDaemon, engine: docker.DockerClient) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same request twice: the first was built, the second claimed."""
    folder = daemon.workspace("both")
    body: dict[str, Any] = {
        "team": team(daemon),
        "workspace": {"source": str(folder)},
        "secrets": [{"name": "token", "value": "v"}, {"name": "key", "value": "w", "as": "env"}],
        "env": {"GIVEN": "1"},
        "limits": {"nofile": 512, "cpus": 0.5, "memory": "128m", "pids": 64, "disk": "8m"},
    }
    stay = "import sys, time\nexec(sys.argv.pop(1))\nsys.stdout.flush()\ntime.sleep(600)"
    source = program("insides")[2]
    cold = daemon.spawn("python3", "-c", stay, source, "an argument", **body)
    (box,) = wait_for(lambda: daemon.get("/v1/pool").json["items"], 20)
    filled(daemon, box["profile"])
    warm = daemon.spawn("python3", "-c", stay, source, "an argument", **body)
    assert (cold["warm"], warm["warm"]) == (False, True)
    name = f"/openclaw-{warm['team']}-{warm['id']}"
    wait_for(lambda: engine.api.inspect_container(warm["container_id"])["Name"] == name, 5)
    return cold, warm


def inspected(engine: docker.DockerClient, agent: dict[str, Any]) -> dict[str, Any]:
    """The engine's word about a box, its own names and ids made equal."""
    text = json.dumps(engine.api.inspect_container(agent["container_id"]))
    text = text.replace(agent["container_id"], "CONTAINER").replace(agent["id"], "ID")
    found: dict[str, Any] = json.loads(text.replace(f"openclaw-team-{agent['team']}", "NET"))
    return found


def differing(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Dotted places at which two documents differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from differing(one.get(key), other.get(key), f"{place}.{key}" if place else key)
    elif one != other:
        yield place


def test_a_difference_would_be_seen() -> None:
    assert list(differing({"a": {"b": 1, "c": [2]}}, {"a": {"b": 1, "c": [3]}, "d": 0})) in (["a.c", "d"], ["d", "a.c"])


def test_the_engine_says_the_same_of_both(pair: tuple[dict[str, Any], dict[str, Any]], engine) -> None:
    cold, warm = (inspected(engine, agent) for agent in pair)
    allowed = (*OF_ANY_TWO, *OF_A_CLAIMED_ONE)
    unexplained = [
        place
        for place in differing(cold, warm)
        if not any(place == name or place.startswith(f"{name}.") for name in allowed)
    ]
    assert unexplained == []
    assert cold["HostConfig"].keys() == warm["HostConfig"].keys()


def test_the_host_config_is_equal_but_for_the_workspace(pair: tuple[dict[str, Any], dict[str, Any]], engine) -> None:
    cold, warm = (inspected(engine, agent)["HostConfig"] for agent in pair)
    workspace = [mount for mount in cold["Mounts"] if mount["Target"] == WORKSPACE]
    assert len(workspace) == 1
    cold["Mounts"].remove(workspace[0])
    assert cold == warm


def test_labels_differ_in_what_is_known_before_the_agent_is(
    pair: tuple[dict[str, Any], dict[str, Any]], engine
) -> None:
    cold, warm = (inspected(engine, agent)["Config"]["Labels"] for agent in pair)
    assert {name for name in cold | warm if cold.get(name) != warm.get(name)} == {"isolator.pool", "isolator.spec"}
    assert set(warm) - set(cold) == {"isolator.pool"}


def test_the_claimed_box_is_what_its_blank_said(
    daemon: RunningDaemon, pair: tuple[dict[str, Any], dict[str, Any]], engine
) -> None:
    """Field by field, as after its creation: claiming changed nothing the engine knows of."""
    cold, warm = (promised(daemon, agent["id"]) for agent in pair)
    assert cold.spec_digest == warm.spec_digest, "both were promised the same"
    found = engine.api.inspect_container(pair[1]["container_id"])
    assert found["Config"]["Labels"]["isolator.spec"] == warm.box_digest != warm.spec_digest
    wanted = render(warm.spec, load_profile().docker_json(), engine.api._version)
    # What was handed over later is not in the engine's books.
    wanted["Cmd"], wanted["Env"], wanted["WorkingDir"] = (found["Config"][n] for n in ("Cmd", "Env", "WorkingDir"))
    wanted["HostConfig"]["Mounts"] = [m for m in wanted["HostConfig"]["Mounts"] if m["Target"] != WORKSPACE]
    compare(wanted, found)


def test_both_say_the_same_of_themselves(daemon: RunningDaemon, pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    cold, warm = (json.loads(said(daemon, agent, "}\n").splitlines()[-1]) for agent in pair)
    unequal = {name: (cold[name], warm[name]) for name in cold if cold[name] != warm[name]}
    assert unequal == {}
    # And what they say is confinement, not two open boxes.
    assert cold["status"]["CapEff"] == ["0" * 16]
    assert cold["status"]["Seccomp"] == ["2"]
    assert set(cold["writable"]) <= {"/run/secrets", "/workspace", "/tmp", "/dev/shm", "/dev/mqueue"}
    assert cold["secret"] == "v"
    assert {cold["pid_one"][name] for name in ("mem", "environ", "cwd", "root", "fd")} <= {"EACCES", "EPERM"}


@pytest.mark.parametrize("battery", ["confinement", "pid_one"])
def test_the_attacks_fare_the_same_in_both(daemon: RunningDaemon, battery: str) -> None:
    crew = team(daemon, battery.replace("_", "-"))
    filled(daemon, primed(daemon, crew, network="none"))
    agents = [
        daemon.spawn(*program(battery), team=crew, network="none", name="cold"),
        claimed(daemon, *program(battery), team=crew, network="none"),
    ]
    for agent in agents:
        daemon.wait(agent)
    told = [json.loads(daemon.output(agent).splitlines()[-1]) for agent in agents]
    # Compared above, without what differs between any two boxes; and how a hang-up shows is a matter of the moment.
    volatile = ("namespaces", "mounts", "hostname", "pids", "status", "forged_exit", "forged_hello", "pid_one_state")
    told = [{name: value for name, value in found.items() if name not in volatile} for found in told]
    assert told[0] == told[1]
    assert "EPERM" in json.dumps(told)
