"""Hundreds of teams: the engine's own address pools end at about thirty, ours must not; and an end that is told."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import Answer, RunningDaemon, running_daemon

pytestmark = [pytest.mark.engine, pytest.mark.timeout(420)]

TEAMS = 500
POOL = ipaddress.IPv4Network("10.196.0.0/15")


def at_once(work: Callable[[Any], Answer], items: Iterable[Any]) -> list[Answer]:
    """Eight requests at a time."""
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(work, items))


def test_five_hundred_teams_come_and_go(engine, image_pins) -> None:
    with running_daemon(engine, image_pins, ISOLATOR_SUBNET_POOL=str(POOL)) as daemon:
        names = [f"{daemon.instance[-8:]}-{number}" for number in range(TEAMS)]
        began = time.monotonic()
        answers = at_once(lambda name: daemon.post("/v1/teams", {"id": name}, timeout=120), names)
        made = time.monotonic() - began
        assert {answer.status for answer in answers} == {201}, [a.content for a in answers if a.status != 201][:3]
        subnets = [ipaddress.IPv4Network(answer.json["subnet"]) for answer in answers]
        assert len(set(subnets)) == TEAMS
        assert all(subnet.subnet_of(POOL) for subnet in subnets)

        label = {"label": f"isolator.instance={daemon.instance}"}
        networks = engine.api.networks(filters=label)
        assert {network["Name"] for network in networks} == {f"openclaw-team-{name}" for name in names}
        assert all(network["Internal"] for network in networks)

        began = time.monotonic()
        ended, output = daemon.run("echo", "room for one", team=names[-1])
        assert (ended["exit"]["code"], output) == (0, "room for one\n")
        spawned = time.monotonic() - began
        began = time.monotonic()
        gone = at_once(lambda name: daemon.delete(f"/v1/teams/{name}", timeout=120), names)
        print(
            f"made in {made:.1f} s, one agent among them in {spawned:.2f} s, gone in {time.monotonic() - began:.1f} s"
        )
        assert {answer.status for answer in gone} == {200}
        assert daemon.leftovers(engine) == []


@pytest.fixture
def small(engine, image_pins) -> Iterable[RunningDaemon]:
    """A daemon whose pool has eight pieces."""
    with running_daemon(
        engine, image_pins, ISOLATOR_SUBNET_POOL="10.195.0.0/24", ISOLATOR_SUBNET_PREFIX="27"
    ) as running:
        yield running


def test_the_end_of_the_pool_is_told_and_a_deleted_team_makes_room(small: RunningDaemon) -> None:
    names = [f"{small.instance[-8:]}-{number}" for number in range(8)]
    assert {small.post("/v1/teams", {"id": name}).status for name in names} == {201}
    ninth = f"{small.instance[-8:]}-8"
    refused = small.post("/v1/teams", {"id": ninth})
    assert (refused.status, refused.json["code"]) == (429, "subnets_exhausted")
    assert "ISOLATOR_SUBNET_POOL" in refused.json["detail"]
    spawn = small.post("/v1/agents", {"team": ninth, "command": ["true"]})
    assert (spawn.status, spawn.json["code"]) == (429, "subnets_exhausted")
    assert small.get(f"/v1/teams/{ninth}").status == 404
    freed = small.get(f"/v1/teams/{names[3]}").json["subnet"]
    assert small.delete(f"/v1/teams/{names[3]}").status == 200
    assert small.post("/v1/teams", {"id": ninth}).json["subnet"] == freed


def test_a_subnet_somebody_else_took_is_passed_over(small: RunningDaemon, engine) -> None:
    import docker.types

    pool = docker.types.IPAMPool(subnet="10.195.0.0/26")
    other = engine.networks.create(
        f"isolator-test-{small.instance}", internal=True, ipam=docker.types.IPAMConfig(pool_configs=[pool])
    )
    try:
        answer = small.post("/v1/teams", {"id": f"{small.instance[-8:]}-a"})
        assert answer.status == 201
        assert answer.json["subnet"] == "10.195.0.64/27"
    finally:
        other.remove()
