"""Faults that a healthy engine and disk do not show: nothing acknowledged is lost, nothing refused stays."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from conftest import RunningDaemon, running_daemon, wait_for
from engine_helpers import containers_of, knock, spawn_bytes

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]

BODY: dict[str, Any] = {"network": "none", "command": ["sleep", "600"]}


class Faults:
    """Switches of tests/faults."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on(self, name: str) -> None:
        (self.folder / name).touch()

    def off(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


@pytest.fixture
def faults(tmp_path: Path) -> Faults:
    return Faults(tmp_path)


@pytest.fixture
def daemon(engine: docker.DockerClient, image_pins: dict[str, str], faults: Faults) -> Iterator[RunningDaemon]:
    path = str(Path(__file__).parent / "faults")
    extra = {"PYTHONPATH": path, "FAULTS": str(faults.folder), "ISOLATOR_SPAWN_TIMEOUT": "3"}
    with running_daemon(engine, image_pins, start=False, **extra) as running:
        running.start(proven=False)
        yield running
        for fault in faults.folder.iterdir():
            fault.unlink()


def test_a_lying_pid_one_does_not_outstay_its_time(daemon: RunningDaemon, faults: Faults, engine) -> None:
    """PID 1 of a foreign image may say ten thousand times that the command ended, and go on."""
    faults.on("guest-lies")
    agent = daemon.spawn("sleep", "600", team="ft-lies", network="none", limits={"wall": 2})
    began = time.monotonic()
    wait_for(lambda: daemon.get(f"/v1/agents/{agent['id']}").json["state"] == "exited", 15)
    assert time.monotonic() - began < 12, "its wall time is 2 s"
    assert daemon.get("/healthz", timeout=2).status == 200
    untimed = daemon.spawn("sleep", "600", team="ft-lies", network="none")
    wait_for(lambda: daemon.get(f"/v1/agents/{untimed['id']}").json["state"] == "exited", 25)
    assert containers_of(engine, daemon.instance)[untimed["id"]].status == "exited"


def test_a_repeated_request_survives_the_first_callers_hang_up(daemon: RunningDaemon) -> None:
    """Two callers wait under one key; the first gives up. What the second is told stays true."""
    for delay in (0.02, 0.08, 0.15, 0.2, 0.25, 0.3, 0.35):
        key = f"hang-{delay}"
        body = {"team": "ft-key", **BODY}
        first = knock(daemon)
        first.sendall(spawn_bytes(body, f"Idempotency-Key: {key}"))
        headers = {"Idempotency-Key": key}
        with concurrent.futures.ThreadPoolExecutor(1) as second:
            told = second.submit(daemon.request, "POST", "/v1/agents", body, headers=headers)
            time.sleep(delay)
            first.close()
            answer = told.result(20)
        assert answer.status == 201, answer.content
        time.sleep(1)
        assert daemon.get(f"/v1/agents/{answer.json['id']}").json["state"] == "running", delay


def test_a_full_disk_leaves_no_phantom(daemon: RunningDaemon, faults: Faults) -> None:
    body, headers = {"team": "ft-disk", "name": "one", **BODY}, {"Idempotency-Key": "k"}
    faults.on("disk-full")
    for _ in range(2):
        answer = daemon.request("POST", "/v1/agents", body, headers=headers)
        assert (answer.status, answer.json["code"]) == (503, "store_unavailable"), answer.content
    faults.off("disk-full")

    def again() -> bool:
        return daemon.request("POST", "/v1/agents", body, headers=headers).status == 201

    wait_for(again, 15)
    assert [item["state"] for item in daemon.get("/v1/agents?team=ft-disk").json["items"]] == ["running"]


def test_a_removal_that_was_refused_is_done_later(daemon: RunningDaemon, faults: Faults, engine) -> None:
    agent = daemon.spawn("sleep", "600", team="ft-stuck", network="none")
    faults.on("box-stuck")
    answer = daemon.delete(f"/v1/agents/{agent['id']}?grace=0")
    assert (answer.status, answer.json["code"]) == (502, "engine_refused")
    faults.off("box-stuck")
    wait_for(lambda: daemon.get(f"/v1/agents/{agent['id']}").json["state"] == "removed", 15)
    assert containers_of(engine, daemon.instance) == {}


def test_one_box_that_can_not_be_removed_keeps_nobody_waiting(
    daemon: RunningDaemon, faults: Faults, engine: docker.DockerClient
) -> None:
    """An orphan that the engine does not let go of: the networks are proven all the same, and it goes later."""
    daemon.stop()
    labels = {"openclaw.managed": "true", "isolator.instance": daemon.instance, "openclaw.agent": "orphan"}
    image = "isolator/agent-python:latest"
    orphan = engine.containers.create(image, entrypoint=["sleep"], command=["600"], labels=labels)
    faults.on("box-stuck")
    daemon.start(proven=False)
    wait_for(lambda: "stays for now" in daemon.log, 10, lambda: daemon.log)
    # The self-test removes boxes too, so only now.
    faults.off("box-stuck")
    wait_for(lambda: daemon.get("/v1/info").json["network"]["status"] == "proven", 30)
    wait_for(lambda: orphan.id not in [item.id for item in engine.containers.list(all=True)], 45)


def test_a_network_made_too_late_is_unmade(daemon: RunningDaemon, faults: Faults, engine) -> None:
    wait_for(lambda: daemon.get("/v1/info").json["network"]["status"] == "proven", 30)
    faults.on("network-slow")
    threading.Timer(5, lambda: faults.off("network-slow")).start()
    answer = daemon.post("/v1/agents", {"team": "ft-late", "command": ["sleep", "600"]}, timeout=30)
    assert (answer.status, answer.json["code"]) == (503, "spawn_timeout"), answer.content
    time.sleep(4)  # by now it was made, if somebody let it
    assert daemon.get("/v1/teams/ft-late").status == 404
    assert engine.networks.list(filters={"label": "openclaw.team=ft-late"}) == []
    assert daemon.spawn("sleep", "600", team="ft-late")["state"] == "running"
