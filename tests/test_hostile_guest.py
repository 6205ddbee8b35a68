"""PID 1 of a foreign image may be anybody's program: it speaks for its own box, and holds up no other.

The guest is replaced before its box starts, on the host, in a daemon of the test's own; all else is real. What it
does once it is released stands in a file of its box: so one box tries every trick in turn.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from api_helpers import assert_problem
from conftest import RunningDaemon, running_daemon, wait_for
from exec_helpers import descriptors, pipes, run

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def switches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def daemon(engine: docker.DockerClient, image_pins: dict[str, str], switches: Path) -> Iterator[RunningDaemon]:
    """A daemon whose boxes have a hostile guest while the switch is on."""
    extra = {"PYTHONPATH": str(Path(__file__).parent / "faults"), "FAULTS": str(switches), "SHORT_WAITS": "1"}
    with running_daemon(engine, image_pins, start=False, **extra) as running:
        running.start(proven=False)
        yield running


@pytest.fixture(scope="module")
def honest(daemon: RunningDaemon) -> dict[str, Any]:
    return daemon.spawn(team="hostile", network="none")


@pytest.fixture
def hostile(daemon: RunningDaemon, switches: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """A box whose PID 1 plays the trick that the test is marked with."""
    (switches / "guest-hostile").touch()
    box = daemon.spawn(team="hostile", network="none", env={"TRICK": request.param})
    (switches / "guest-hostile").unlink()
    assert "class Hostile" in (daemon.home / "run" / "agents" / box["id"] / "guest.py").read_text()
    yield box
    daemon.delete(f"/v1/agents/{box['id']}?grace=0")


def healthy(daemon: RunningDaemon, honest: dict[str, Any]) -> None:
    """Others are served, and soon."""
    for _ in range(5):
        began = time.monotonic()
        assert run(daemon, honest["id"], "echo", "honest").stdout == b"honest\n"
        assert daemon.get("/healthz", timeout=2).status == 200
        assert time.monotonic() - began < 5
    assert "Traceback" not in daemon.log
    assert len(descriptors(daemon)) < 150


@pytest.mark.parametrize(
    "hostile",
    ["answer_for_others", "claim_another_id", "flood", "say_half", "come_and_go", "forge_the_end"],
    indirect=True,
)
def test_a_hostile_guest_harms_nobody_else(
    daemon: RunningDaemon, honest: dict[str, Any], hostile: dict[str, Any]
) -> None:
    before = pipes(daemon)
    answer = daemon.post(f"/v1/agents/{hostile['id']}/run", {"command": ["true"], "timeout": 1}, timeout=40)
    if answer.status == 503:
        assert_problem(answer, 503, "guest_unreachable")
    elif answer.status != 200:
        assert_problem(answer, 409, "agent_not_running")
    healthy(daemon, honest)
    wait_for(lambda: pipes(daemon) == before, 15)
    assert daemon.get(f"/v1/agents/{honest['id']}").json["state"] == "running"


@pytest.mark.parametrize("hostile", ["stay_silent"], indirect=True)
def test_a_guest_that_never_answers_costs_its_caller_a_bounded_time(
    daemon: RunningDaemon, honest: dict[str, Any], hostile: dict[str, Any]
) -> None:
    before = pipes(daemon)
    answer = daemon.post(f"/v1/agents/{hostile['id']}/run", {"command": ["true"]}, timeout=40)
    assert_problem(answer, 503, "guest_unreachable")
    healthy(daemon, honest)
    wait_for(lambda: pipes(daemon) == before, 5)


@pytest.mark.parametrize("hostile", ["never_end"], indirect=True)
def test_a_timeout_holds_where_the_guest_tells_no_end(
    daemon: RunningDaemon, honest: dict[str, Any], hostile: dict[str, Any]
) -> None:
    answer = daemon.post(f"/v1/agents/{hostile['id']}/run", {"command": ["true"], "timeout": 0.2}, timeout=40)
    assert (answer.status, answer.json["timed_out"], answer.json["exit_code"]) == (200, True, 137)
    healthy(daemon, honest)
