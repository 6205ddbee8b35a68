"""Questions that several tests of the API ask: is this a proper refusal, and did it leave a trace."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
from conftest import Answer, RunningDaemon

AsUser = Callable[[int], contextlib.AbstractContextManager[None]]


def traces(daemon: RunningDaemon, engine: docker.DockerClient) -> dict[str, Any]:
    """Everything a spawn could leave behind, as seen by an admin, on the engine and on the host."""
    label = {"label": f"isolator.instance={daemon.instance}"}
    return {
        "agents": sorted(item["id"] for item in daemon.get("/v1/agents?all=1").json["items"]),
        "teams": sorted(item["id"] for item in daemon.get("/v1/teams").json["items"]),
        "containers": sorted(item["Id"] for item in engine.api.containers(all=True, filters=label)),
        "networks": sorted(item["Id"] for item in engine.api.networks(filters=label)),
        "folders": sorted(
            str(entry) for kind in ("agents", "mounts") for entry in (daemon.home / "run" / kind).iterdir()
        ),
    }


def assert_problem(answer: Answer, status: int, code: str) -> dict[str, Any]:
    """The answer is an RFC 9457 problem of this status and code, with words for a person; returns it."""
    assert (answer.status, answer.json.get("code")) == (status, code), answer.content[:600]
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json
    assert problem["status"] == status
    assert problem["type"] == f"urn:isolator:error:{code}"
    assert problem["title"]
    assert re.match(r"[\w/.'?<-].{10,}", problem["detail"], re.DOTALL), problem["detail"]
    assert "Traceback" not in answer.content.decode()
    return problem


def open_to_everybody(daemon: RunningDaemon) -> None:
    """Let any uid connect, as a wide socket group would: what is tested then is the daemon's own judgement."""
    daemon.socket.chmod(0o666)


@contextlib.contextmanager
def raw_connection(path: Path, seconds: float = 20) -> Iterator[socket.socket]:
    """A bare connection to the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(seconds)
        connection.connect(str(path))
        yield connection


def read_to_end(connection: socket.socket) -> bytes:
    """Everything until the other side closes."""
    data = b""
    while chunk := connection.recv(65536):
        data += chunk
    return data
