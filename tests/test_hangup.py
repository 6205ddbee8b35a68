"""Callers who hang up, dawdle, or never finish a sentence: nothing stays of them, and nobody waits for them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import docker
import pytest
from conftest import RunningDaemon, running_daemon, wait_for
from engine_helpers import containers_of, knock, spawn_bytes, streaming

pytestmark = pytest.mark.engine

BODY: dict[str, Any] = {"network": "none", "command": ["sleep", "600"]}


@pytest.fixture(scope="module")
def strict(engine: docker.DockerClient, image_pins: dict[str, str]) -> Iterator[RunningDaemon]:
    """A daemon with short patience and few connections."""
    settings = {"ISOLATOR_REQUEST_TIMEOUT": "1", "ISOLATOR_MAX_CONNECTIONS": "8"}
    with running_daemon(engine, image_pins, start=False, **settings) as daemon:
        daemon.start(proven=False)
        yield daemon


def traces(daemon: RunningDaemon, engine: docker.DockerClient, team: str) -> list[str]:
    """Whatever there is of a team that should have left nothing."""
    found = [f"agent {item['id']}" for item in daemon.get(f"/v1/agents?team={team}&all").json["items"]]
    found += [f"team {item['id']}" for item in daemon.get("/v1/teams").json["items"] if item["id"] == team]
    label = {"label": f"openclaw.team={team}"}
    found += [f"container {item.name}" for item in engine.containers.list(all=True, filters=label, ignore_removed=True)]
    found += [f"network {item.name}" for item in engine.networks.list(filters=label)]
    return found + [f"folder {item.name}" for item in (daemon.home / "run" / "mounts").iterdir()]


def hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@pytest.mark.parametrize("delay", [0.0, 0.005, 0.02, 0.05, 0.1, 0.15])
def test_a_caller_who_hangs_up_mid_spawn_leaves_no_trace(daemon: RunningDaemon, engine, delay: float) -> None:
    folder = daemon.workspace(f"hang-{delay}")
    team = f"hu-{int(delay * 1000)}"
    body = {"team": team, **BODY, "workspace": {"source": str(folder)}, "secrets": [{"name": "s", "value": "v"}]}

    def answered(connection: socket.socket) -> bool:
        connection.settimeout(delay or 0.001)
        with contextlib.suppress(TimeoutError):
            return bool(connection.recv(1))
        return False

    connection = knock(daemon)
    connection.sendall(spawn_bytes(body))
    assert not answered(connection), "the spawn was over before the caller hung up; the delay proves nothing"
    hang_up(connection)
    wait_for(lambda: not traces(daemon, engine, team), 10, lambda: str(traces(daemon, engine, team)))
    # The twin: a caller who stays gets the agent.
    assert daemon.post("/v1/agents", body).status == 201
    assert daemon.delete(f"/v1/teams/{team}").status == 200


def test_many_who_hang_up_at_once_leave_no_trace(daemon: RunningDaemon, engine) -> None:
    connections = [knock(daemon) for _ in range(12)]
    for connection in connections:
        connection.sendall(spawn_bytes({"team": "hu-many", **BODY}))
    wait_for(lambda: daemon.get("/v1/agents?team=hu-many&state=creating").json["items"], 10)
    for connection in connections:
        hang_up(connection)
    wait_for(lambda: not traces(daemon, engine, "hu-many"), 30, lambda: str(traces(daemon, engine, "hu-many")))
    assert containers_of(engine, daemon.instance) == {}


def test_hanging_up_is_in_the_audit_log(daemon: RunningDaemon) -> None:
    connection = knock(daemon)
    connection.sendall(spawn_bytes({"team": "hu-told", **BODY}))
    agent = wait_for(lambda: daemon.get("/v1/agents?team=hu-told&state=creating").json["items"], 10)[0]["id"]
    hang_up(connection)
    wait_for(lambda: daemon.get(f"/v1/agents/{agent}").status == 404, 10)
    acts = [(item["act"], item["kind"]) for item in daemon.get(f"/v1/audit?agent={agent}").json["items"]]
    assert {("agent.spawn", "intent"), ("agent.spawn", "outcome"), ("agent.stop", "outcome")} <= set(acts)


def test_a_caller_who_hangs_up_on_a_stop_has_still_asked_for_it(daemon: RunningDaemon, engine) -> None:
    agent = daemon.spawn("sleep", "600", team="hu-stop", network="none")
    connection = knock(daemon)
    connection.sendall(f"DELETE /v1/agents/{agent['id']}?grace=1 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    wait_for(lambda: daemon.get(f"/v1/agents/{agent['id']}").json["state"] != "running", 5)
    hang_up(connection)
    wait_for(lambda: daemon.get(f"/v1/agents/{agent['id']}").json["state"] == "removed", 10)
    assert containers_of(engine, daemon.instance) == {}


def test_followers_who_hang_up_free_their_place(engine, image_pins) -> None:
    with running_daemon(engine, image_pins, start=False, ISOLATOR_MAX_FOLLOWERS="2") as daemon:
        daemon.start(proven=False)
        agent = daemon.spawn("sleep", "600", team="hu-follow", network="none")
        path = f"/v1/agents/{agent['id']}/logs?follow"
        for kind in (path, "/v1/events", path):
            wait_for(lambda kind=kind: _both_places_are_had(daemon, kind), 10)


def _both_places_are_had(daemon: RunningDaemon, path: str) -> bool:
    """Two streams are served and a third is refused; False while whoever hung up just now still has a place."""
    with streaming(daemon, path) as first, streaming(daemon, path) as second:
        if (first.status, second.status) != (200, 200):
            return False
        refused = daemon.get(path)
        assert (refused.status, refused.json["code"]) == (429, "followers_exhausted")
        return True


HALVES = {
    "nothing": b"",
    "half a line": b"POST /v1/age",
    "half the headers": b"POST /v1/agents HTTP/1.1\r\nHost: x\r\nContent-",
    "no body": b"POST /v1/agents HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n",
    "half a body": b'POST /v1/agents HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{"team": "hu-half", ',
    "half a chunk": b"POST /v1/agents HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n20\r\n{",
}


@pytest.mark.parametrize("half", HALVES)
def test_half_a_request_and_silence_is_cut_off_at_its_bound(strict: RunningDaemon, half: str) -> None:
    with contextlib.closing(knock(strict, timeout=8)) as connection:
        connection.sendall(HALVES[half])
        answer = everything(connection)
    assert not answer or b" 408 " in answer.split(b"\r\n", 1)[0] or b" 400 " in answer.split(b"\r\n", 1)[0], answer
    if "body" in half:
        assert b"request_timeout" in answer
    assert strict.get("/v1/agents?all").json["items"] == []


def everything(connection: socket.socket) -> bytes:
    """All that comes until the other side hangs up; fails after the socket's timeout."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            received += piece
    return received


def test_a_slow_but_whole_request_within_the_bound_is_served(strict: RunningDaemon) -> None:
    with contextlib.closing(knock(strict)) as connection:
        for piece in (b"GET /heal", b"thz HTTP/1.1\r\n", b"Host: x\r\n", b"\r\n"):
            connection.sendall(piece)
            time.sleep(0.1)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("stage", ["headers", "body"])
def test_dripping_a_request_is_cut_off_too(strict: RunningDaemon, stage: str) -> None:
    """A byte now and then is no progress: the bound is for the whole request."""
    start = b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: "
    if stage == "body":
        start = b"POST /v1/agents HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
    with contextlib.closing(knock(strict, timeout=0.05)) as connection:
        connection.sendall(start)

        def cut_off() -> bool:
            try:
                connection.sendall(b"1")
                return connection.recv(65536)[:12] in (b"", b"HTTP/1.1 408", b"HTTP/1.1 400")
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        wait_for(cut_off, 6, "a request that drips was never cut off")


def test_an_idle_connection_after_an_answer_is_closed(strict: RunningDaemon) -> None:
    with contextlib.closing(knock(strict, timeout=8)) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert everything(connection).startswith(b"HTTP/1.1 200")


def test_one_connection_too_many_is_closed_and_the_places_come_back(strict: RunningDaemon) -> None:
    wait_for(lambda: strict.get("/healthz").status == 200, 5)
    held = [knock(strict, timeout=5) for _ in range(8)]
    for connection in held:
        connection.sendall(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 200"
    extra = knock(strict, timeout=5)
    with contextlib.suppress(ConnectionError):
        assert extra.recv(1) == b"", "a ninth connection is closed unanswered"
    extra.close()
    for connection in held:
        connection.close()
    wait_for(lambda: _answers(strict), 5)


def _answers(daemon: RunningDaemon) -> bool:
    try:
        return daemon.get("/healthz").status == 200
    except (OSError, EOFError):
        return False


def test_dawdlers_on_many_connections_do_not_stop_others(daemon: RunningDaemon) -> None:
    dawdlers = [knock(daemon) for _ in range(100)]
    try:
        for number, connection in enumerate(dawdlers):
            connection.sendall(
                b"POST /v1/agents HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"[: 20 + number % 40]
            )
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: daemon.get("/v1/teams", timeout=5).status, range(40)))
        assert set(answers) == {200}
        agent = daemon.spawn("true", team="hu-dawdle", network="none")
        assert daemon.wait(agent)["exit"]["code"] == 0
    finally:
        for connection in dawdlers:
            connection.close()
