"""What tests of life, crashes and lost engines share: looking, listening, and an engine of one's own to kill."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any

import docker
import docker.errors
from conftest import RunningDaemon, UnixConnection, wait_for


def shown(daemon: RunningDaemon, agent: dict[str, Any] | str) -> dict[str, Any]:
    """The agent as the API shows it now."""
    agent_id = agent if isinstance(agent, str) else agent["id"]
    answer = daemon.get(f"/v1/agents/{agent_id}")
    assert answer.status == 200, answer.content
    result: dict[str, Any] = answer.json
    return result


def gone(client: docker.DockerClient, agent: dict[str, Any]) -> None:
    """Assert that the agent's container is no more."""
    try:
        client.containers.get(agent["container_id"])
    except docker.errors.NotFound:
        return
    raise AssertionError(f"the container of {agent['id']} is still there")


def frames_of(content: bytes) -> list[tuple[int, bytes]]:
    """(stream number, payload) of each frame."""
    frames = []
    while content:
        length = int.from_bytes(content[4:8], "big")
        frames.append((content[0], content[8 : 8 + length]))
        assert len(frames[-1][1]) == length, "a torn frame"
        content = content[8 + length :]
    return frames


@contextlib.contextmanager
def streaming(daemon: RunningDaemon, path: str, timeout: float = 30.0) -> Iterator[http.client.HTTPResponse]:
    """An answer that is read while it comes."""
    connection = UnixConnection(daemon.socket, timeout)
    try:
        connection.request("GET", path)
        yield connection.getresponse()
    finally:
        connection.close()


def knock(daemon: RunningDaemon, timeout: float = 20.0) -> socket.socket:
    """A bare connection to the daemon's socket."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    connection.connect(str(daemon.socket))
    return connection


def spawn_bytes(body: dict[str, Any], *headers: str) -> bytes:
    """A whole spawn request, to be sent by hand."""
    content = json.dumps(body).encode()
    lines = ["POST /v1/agents HTTP/1.1", "Host: x", f"Content-Length: {len(content)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def events_of(daemon: RunningDaemon, after: int = 0) -> list[dict[str, Any]]:
    """Every event kept."""
    text = daemon.get(f"/v1/events?follow=false&after={after}").content.decode()
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


def containers_of(client: docker.DockerClient, instance: str) -> dict[str, Any]:
    """This instance's containers in any state, by the id of their agent."""
    found = client.containers.list(all=True, filters={"label": f"isolator.instance={instance}"}, ignore_removed=True)
    return {item.labels["openclaw.agent"]: item for item in found}


def settled(daemon: RunningDaemon, seconds: float = 20) -> None:
    """Wait until this run of the daemon has reconciled."""
    begun = max((e["id"] for e in events_of(daemon) if e["type"] == "engine.up"), default=None)

    def done() -> bool:
        ups = [event["id"] for event in events_of(daemon) if event["type"] == "engine.up"]
        joined = [event["id"] for event in events_of(daemon) if event["type"] == "daemon.reconciled"]
        return bool(ups) and bool(joined) and max(joined) > max(ups) >= (begun or 0)

    wait_for(done, seconds, lambda: f"it did not reconcile:\n{daemon.log[-3000:]}")
