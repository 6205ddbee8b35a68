"""Shared by all tests: a real daemon on a real engine, in folders of its own.

Quick tests (not marked `engine`) need neither. Engine tests are skipped without an engine, unless
ISOLATOR_REQUIRE_DOCKER=1 says that a missing one is a failure.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import docker.errors
import pytest

REQUIRE_DOCKER = os.environ.get("ISOLATOR_REQUIRE_DOCKER") == "1"
IMAGES = ("isolator/agent-python", "isolator/agent-node", "isolator/skill")


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket, as plainly as can be: the tests do not test the client with itself."""

    def __init__(self, path: Path, timeout: float = 60.0) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@dataclass
class Answer:
    """One HTTP answer."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)


@dataclass
class RunningDaemon:
    """A daemon of one test (or module): start, kill, start again, ask."""

    home: Path
    instance: str
    extra: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.home / "run" / "isolator.sock"

    @property
    def roots(self) -> Path:
        """The one workspace root."""
        return self.home / "roots"

    @property
    def log(self) -> str:
        return (self.home / "log").read_text()

    def environment(self) -> dict[str, str]:
        """What the daemon and its CLI run with."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("ISOLATOR_")}
        return {
            **kept,
            "ISOLATOR_STATE_DIR": str(self.home / "state"),
            "ISOLATOR_RUNTIME_DIR": str(self.home / "run"),
            "ISOLATOR_SOCKET": str(self.socket),
            "ISOLATOR_SECRET_DIR": str(self.home / "secrets"),
            "ISOLATOR_INSTANCE": self.instance,
            "ISOLATOR_WORKSPACE_ROOTS": str(self.roots),
            "ISOLATOR_IMAGE_LOCK": str(self.home / "images.json"),
            **self.extra,
        }

    def command(self) -> list[str]:
        """What starts it."""
        return [sys.executable, "-m", "isolator", "daemon"]

    def start(self, *, proven: bool = True) -> None:
        """Start it and wait until it answers; with `proven`, until the network self-test has passed."""
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                env=self.environment(),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        wait_for(self._answers, 20, lambda: f"the daemon did not start:\n{self.log}")
        if proven:
            self.until_proven()

    def until_proven(self) -> None:
        """Wait until the network self-test has passed."""
        wait_for(
            lambda: self.get("/v1/info").json["network"]["status"] == "proven",
            60,
            lambda: f"the network was not proven: {self.get('/v1/info').json['network']}\n{self.log}",
        )

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the daemon ended:\n{self.log}"
        try:
            return self.get("/healthz", timeout=2).status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> None:
        """SIGTERM and wait."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
                raise AssertionError(f"the daemon did not stop:\n{self.log}") from None

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout: float = 60.0,
    ) -> Answer:
        """One request on a connection of its own; a body that is bytes is sent as it is."""
        connection = UnixConnection(self.socket, timeout)
        data = body if isinstance(body, bytes | type(None)) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, headers or {})
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str, **kwargs: Any) -> Answer:
        return self.request("GET", path, **kwargs)

    def post(self, path: str, body: Any = None, **kwargs: Any) -> Answer:
        return self.request("POST", path, body, **kwargs)

    def delete(self, path: str, **kwargs: Any) -> Answer:
        return self.request("DELETE", path, **kwargs)

    def spawn(self, *command: str, team: str = "t", **body: Any) -> dict[str, Any]:
        """Spawn an agent and return it; the answer must be 201."""
        answer = self.post("/v1/agents", {"team": team, "command": list(command), **body})
        assert answer.status == 201, answer.content
        result: dict[str, Any] = answer.json
        return result

    def wait(self, agent: dict[str, Any] | str, seconds: float = 30) -> dict[str, Any]:
        """The agent, once it has ended."""
        agent_id = agent if isinstance(agent, str) else agent["id"]
        record: dict[str, Any] = self.get(f"/v1/agents/{agent_id}?wait={seconds}", timeout=seconds + 30).json
        assert record["state"] in ("exited", "removed", "lost"), record
        return record

    def output(self, agent: dict[str, Any] | str) -> str:
        """Everything the agent wrote so far."""
        agent_id = agent if isinstance(agent, str) else agent["id"]
        return self.get(f"/v1/agents/{agent_id}/logs").content.decode(errors="replace")

    def run(self, *command: str, **body: Any) -> tuple[dict[str, Any], str]:
        """Spawn, wait, and return the ended agent and its output."""
        agent = self.spawn(*command, **body)
        ended = self.wait(agent)
        return ended, self.output(agent)

    def workspace(self, name: str, uid: int = 1000) -> Path:
        """A new folder below the root, owned by `uid`."""
        folder = self.roots / name
        folder.mkdir()
        os.chown(folder, uid, uid)
        return folder

    def leftovers(self, client: docker.DockerClient) -> list[str]:
        """Everything of this instance that is on the engine or the host."""
        label = {"label": f"isolator.instance={self.instance}"}
        found = [f"container {item.name}" for item in client.containers.list(all=True, filters=label)]
        found += [f"network {item.name}" for item in client.networks.list(filters=label)]
        found += [f"mount {line.split()[4]}" for line in mountinfo() if str(self.home / "run") in line.split()[4]]
        for kind in ("agents", "mounts"):
            folder = self.home / "run" / kind
            found += [f"folder {entry}" for entry in (folder.iterdir() if folder.is_dir() else ())]
        return found


def mountinfo() -> list[str]:
    """The host's mounts, a line each."""
    return Path("/proc/self/mountinfo").read_text().splitlines()


def wait_for(condition: Callable[[], Any], seconds: float, message: Callable[[], str] | str = "") -> Any:
    """The first true value of `condition`, within `seconds`."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(message() if callable(message) else message or "it did not come true")
        time.sleep(0.05)


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.DockerClient]:
    """The engine, with our images pinned and present."""
    client = None
    try:
        client = docker.DockerClient(base_url="unix:///var/run/docker.sock", timeout=60)
        client.ping()
    except (docker.errors.DockerException, OSError) as error:
        if REQUIRE_DOCKER:
            pytest.fail(f"ISOLATOR_REQUIRE_DOCKER=1 and no engine answers: {error}")
        pytest.skip("no Docker Engine answers; run scripts/setup as root")
    yield client
    client.close()


@pytest.fixture(scope="session")
def image_pins(engine: docker.DockerClient) -> dict[str, str]:
    """Digests of our images as they are on the engine."""
    pins = {}
    for name in IMAGES:
        try:
            pins[name] = str(engine.images.get(f"{name}:latest").id)
        except docker.errors.ImageNotFound:
            pytest.fail(f"{name} is not built: run scripts/setup --tests")
    return pins


@contextlib.contextmanager
def running_daemon(
    engine: docker.DockerClient, pins: dict[str, str], *, start: bool = True, **extra: str
) -> Iterator[RunningDaemon]:
    """A daemon in folders of its own; afterwards nothing of it may be left."""
    home = Path(tempfile.mkdtemp(prefix="isolator-test-"))
    home.chmod(0o755)
    daemon = RunningDaemon(home, f"test-{secrets.token_hex(4)}", extra)
    daemon.roots.mkdir(mode=0o755)
    lock = home / "images.json"
    lock.write_text(json.dumps(pins))
    lock.chmod(0o644)
    try:
        if start:
            daemon.start()
        yield daemon
        if daemon.process is not None and daemon.process.poll() is None:
            for team in daemon.get("/v1/teams").json["items"]:
                assert daemon.delete(f"/v1/teams/{team['id']}").status == 200
            daemon.stop()
            assert daemon.leftovers(engine) == []
    finally:
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.wait(10)
        _sweep(engine, daemon)


def _sweep(engine: docker.DockerClient, daemon: RunningDaemon) -> None:
    """Remove whatever a failed test left, by its instance's label."""
    label = {"label": f"isolator.instance={daemon.instance}"}
    for container in engine.containers.list(all=True, filters=label):
        with contextlib.suppress(docker.errors.APIError):
            container.remove(force=True)
    for network in engine.networks.list(filters=label):
        with contextlib.suppress(docker.errors.APIError):
            network.remove()
    for line in mountinfo():
        if str(daemon.home) in line.split()[4]:
            subprocess.run(["umount", "-l", line.split()[4]], check=False)
    shutil.rmtree(daemon.home, ignore_errors=True)


@pytest.fixture(scope="module")
def daemon(engine: docker.DockerClient, image_pins: dict[str, str]) -> Iterator[RunningDaemon]:
    """A daemon shared by one module's tests."""
    with running_daemon(engine, image_pins) as running:
        yield running


@pytest.fixture
def own_daemon(engine: docker.DockerClient, image_pins: dict[str, str]) -> Iterator[RunningDaemon]:
    """A daemon of this test alone, which it may kill."""
    with running_daemon(engine, image_pins) as running:
        yield running


@pytest.fixture
def as_user() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """Act as another uid for a while: connections made then carry it."""

    @contextlib.contextmanager
    def switch(uid: int) -> Iterator[None]:
        os.setegid(uid)
        os.seteuid(uid)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(0)

    return switch
