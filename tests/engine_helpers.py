"""What tests of life, crashes and lost engines share: looking, listening, and an engine of one's own to kill."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import docker
import docker.errors
from conftest import RunningDaemon, UnixConnection, mountinfo, wait_for


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


def lives(pid: int) -> bool:
    """Whether a process of the host runs."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def children_of(pid: int) -> list[str]:
    """Pids of a process's children."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return []


def settled(daemon: RunningDaemon, seconds: float = 20) -> None:
    """Wait until the daemon has reconciled since it started or last lost its engine."""

    def done() -> bool:
        log = daemon.log
        since = max(log.rfind("isolator: ready in"), log.rfind("engine.down"))
        return "daemon.reconciled" in log[since:]

    wait_for(done, seconds, lambda: f"it did not reconcile:\n{daemon.log[-3000:]}")


def assert_joined(daemon: RunningDaemon, engine: docker.DockerClient) -> list[dict[str, Any]]:
    """What the daemon lists, what runs and what is on the host are the same; the agents."""
    agents = daemon.get("/v1/agents").json["items"]

    def differing() -> list[str]:
        ids = {agent["id"] for agent in agents}
        own = {
            e for e in containers_of(engine, daemon.instance) if e not in ids and not of_self_test(engine, daemon, e)
        }
        found = [f"container {e}" for e in own]
        for kind, allowed in (("agents", ids), ("mounts", set())):
            folder = daemon.home / "run" / kind
            found += [
                f"{kind} {e.name}"
                for e in folder.iterdir()
                if e.name not in allowed and not of_self_test(engine, daemon, e.name)
            ]
        found += [line for line in mountinfo() if f"{daemon.home}/run/mounts" in line]
        teams = {f"openclaw-team-{team['id']}" for team in daemon.get("/v1/teams").json["items"]}
        networks = engine.networks.list(filters={"label": f"isolator.instance={daemon.instance}"})
        names = {item.name for item in networks if "selftest" not in item.name}
        return found + sorted(names ^ teams)

    wait_for(lambda: not differing(), 5, lambda: f"{differing()}\n{daemon.log[-3000:]}")
    assert {agent["state"] for agent in agents} <= {"running"}
    running = {e: box.status for e, box in containers_of(engine, daemon.instance).items()}
    for agent in agents:
        assert running[agent["id"]] == "running"
    return agents


def of_self_test(engine: docker.DockerClient, daemon: RunningDaemon, agent: str) -> bool:
    boxes = containers_of(engine, daemon.instance)
    return agent in boxes and "selftest" in boxes[agent].labels["openclaw.team"]


class GatedSocket:
    """A Unix socket in front of another that lets nothing through while its gate is closed: an engine that hangs."""

    def __init__(self, path: Path, target: str) -> None:
        self.path = path
        self._target = target
        self._gate = threading.Event()
        self._gate.set()
        self._ended = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close_gate(self) -> None:
        """From now on nothing is passed on, either way."""
        self._gate.clear()

    def open_gate(self) -> None:
        """Pass on what has waited, and all the rest."""
        self._gate.set()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                far.connect(self._target)
            except OSError:
                near.close()
                continue
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                while not self._gate.wait(0.2):
                    if self._ended.is_set():
                        break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.path.unlink(missing_ok=True)
