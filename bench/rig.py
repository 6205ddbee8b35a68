"""The bench's own daemon in folders of its own, and the removal of all that a run made, whatever ends it."""

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docker
import docker.errors
import psutil
from raw_side import TEAM, RawSide, spawn_body

ENGINE_SOCKET = Path("/var/run/docker.sock")
IMAGES = ("isolator/agent-python", "isolator/agent-node", "isolator/skill")
_KEPT_OPEN = 5.0
_BENCH = Path(__file__).resolve().parent


class Connection(http.client.HTTPConnection):
    """One keep-alive HTTP connection over a Unix socket."""

    def __init__(self, path: Path, timeout: float = 120.0) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path
        self._used = 0.0

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One request; status and JSON of the answer."""
        data = None if body is None else json.dumps(body).encode()
        if time.monotonic() - self._used > _KEPT_OPEN:
            self.close()  # the daemon hangs up on idle connections; the next request opens a new one
        self.request(method, path, data)
        response = self.getresponse()
        content = response.read()
        self._used = time.monotonic()
        return response.status, json.loads(content) if content else None


@dataclass
class Rig:
    """One daemon in folders of its own, and the engine beside it. Use `running_rig`."""

    home: Path
    instance: str
    engine: docker.APIClient
    image: str
    raw: RawSide
    process: subprocess.Popen[bytes] | None = None
    _api: Connection | None = None

    @property
    def socket(self) -> Path:
        return self.home / "run" / "isolator.sock"

    @property
    def roots(self) -> Path:
        """The folder below which agents' workspaces may lie."""
        return self.home / "roots"

    @property
    def log(self) -> str:
        return (self.home / "log").read_text()

    @property
    def api(self) -> Connection:
        """The keep-alive connection the timed requests use."""
        if self._api is None:
            self._api = Connection(self.socket)
        return self._api

    # the daemon

    def environment(self) -> dict[str, str]:
        dropped = ("ISOLATOR_", "PYTHONDONTWRITEBYTECODE")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
        return {
            **kept,
            # As installed: compiled once, by the first start, and not into the checkout.
            "PYTHONPYCACHEPREFIX": str(self.home / "bytecode"),
            "ISOLATOR_STATE_DIR": str(self.home / "state"),
            "ISOLATOR_RUNTIME_DIR": str(self.home / "run"),
            "ISOLATOR_SOCKET": str(self.socket),
            "ISOLATOR_SECRET_DIR": str(self.home / "secrets"),
            "ISOLATOR_INSTANCE": self.instance,
            "ISOLATOR_IMAGE_LOCK": str(self.home / "images.json"),
            "ISOLATOR_WORKSPACE_ROOTS": str(self.roots),
        }

    def start(self, program: list[str] | None = None, **extra: str) -> float:
        """Start the daemon; seconds from its start to its READY=1 (it serves, and holds every promised agent)."""
        notices = self.home / "notify.sock"
        notices.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener, (self.home / "log").open("ab") as log:
            listener.bind(str(notices))
            listener.settimeout(60)
            began = time.perf_counter()
            self.process = subprocess.Popen(
                program or [sys.executable, "-m", "isolator", "daemon"],
                env={**self.environment(), "NOTIFY_SOCKET": str(notices), **extra},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            while b"READY=1" not in listener.recv(4096):
                pass
            took = time.perf_counter() - began
        notices.unlink()
        return took

    def import_daemon(self) -> None:
        """An interpreter that imports what the daemon does, and ends."""
        command = "import isolator.cli.main, isolator.cli.config, isolator.daemon"
        subprocess.run([sys.executable, "-c", command], check=True, cwd="/", env=self.environment())

    def await_proof(self, seconds: float = 90) -> None:
        """Wait until the network self-test has passed: the first networked spawn would wait for it."""
        end = time.monotonic() + seconds
        while (network := self.api.ask("GET", "/v1/info")[1]["network"])["status"] != "proven":
            if time.monotonic() > end:
                raise RuntimeError(f"the network was not proven: {network}\n{self.log}")
            time.sleep(0.1)

    def instrumented(self, output: Path) -> list[str]:
        """The command line of a daemon that also writes its loop's and steps' figures to `output`."""
        return [sys.executable, str(_BENCH / "instrumented_daemon.py"), str(output)]

    def end(self, number: int = signal.SIGTERM) -> None:
        """End the daemon with this signal and wait; its agents go on."""
        if self._api is not None:
            self._api.close()
            self._api = None
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(60)
            self.process = None

    @property
    def daemon(self) -> psutil.Process:
        assert self.process is not None
        return psutil.Process(self.process.pid)

    # our side

    def spawn(self, team: str = TEAM, command: list[str] | None = None, **more: Any) -> str:
        """POST /v1/agents until its 201; the agent's id."""
        status, answer = self.api.ask("POST", "/v1/agents", {**spawn_body(team, command), **more})
        if status != 201 or answer["state"] != "running":
            raise RuntimeError(f"the spawn was answered {status}: {answer}")
        return str(answer["id"])

    def stop(self, agent: str, grace: float | None = 0.0) -> None:
        """DELETE it; removed when this returns."""
        query = "" if grace is None else f"?grace={grace:g}"
        status, answer = self.api.ask("DELETE", f"/v1/agents/{agent}{query}")
        if status != 200 or answer["state"] != "removed":
            raise RuntimeError(f"the stop was answered {status}: {answer}")

    def await_output(self, agent: str, text: bytes, seconds: float = 20) -> None:
        """Wait until the agent has written `text`."""
        end = time.monotonic() + seconds
        while True:
            self.api.request("GET", f"/v1/agents/{agent}/logs")
            if text in self.api.getresponse().read():
                return
            if time.monotonic() > end:
                raise RuntimeError(f"{agent} did not write {text!r}")
            time.sleep(0.05)

    def agents(self, state: str = "running") -> list[str]:
        return [item["id"] for item in self.api.ask("GET", f"/v1/agents?state={state}")[1]["items"]]

    def drop_team(self, team: str) -> None:
        self.api.ask("DELETE", f"/v1/teams/{team}")


@contextlib.contextmanager
def running_rig(*, start: bool = True) -> Iterator[Rig]:
    """A daemon of the bench's own; on the way out, Ctrl-C included, nothing of it stays.

    Raises:
        RuntimeError: the engine or an image is missing; the text says what to do.
    """
    try:
        engine = docker.APIClient(base_url=f"unix://{ENGINE_SOCKET}", version="auto", timeout=120, max_pool_size=32)
        engine.ping()
    except docker.errors.DockerException as error:
        raise RuntimeError(f"no Docker Engine answers at {ENGINE_SOCKET}: {error}") from error
    home = Path(tempfile.mkdtemp(prefix="isolator-bench-"))
    home.chmod(0o755)
    # SIGTERM would skip every `finally`; as an exception it is a Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    instance = f"bench-{secrets.token_hex(4)}"
    rig = Rig(home, instance, engine, "", RawSide(engine, home / "raw", f"{instance}-raw"))
    rig.roots.mkdir()
    try:
        rig.image = rig.raw.image = _write_pins(engine, home / "images.json")
        rig.import_daemon()
        if start:
            rig.start()
            rig.await_proof()
            warm_up(rig)
        yield rig
    finally:
        _clear(rig)
        engine.close()


def _write_pins(engine: docker.APIClient, lock: Path) -> str:
    """Pin our images as the engine has them; the digest of the default one."""
    pins = {}
    for name in IMAGES:
        with contextlib.suppress(docker.errors.ImageNotFound):
            pins[name] = str(engine.inspect_image(f"{name}:latest")["Id"])
    if IMAGES[0] not in pins:
        raise RuntimeError(f"{IMAGES[0]} is not built: run isolator image build first")
    lock.write_text(json.dumps(pins))
    lock.chmod(0o644)
    return pins[IMAGES[0]]


def warm_up(rig: Rig, rounds: int = 3) -> None:
    """Both sides a few times, unmeasured: the team's network, caches, connections."""
    for _ in range(rounds):
        rig.stop(rig.spawn())
        rig.raw.stop(rig.raw.spawn(rig.raw.body(TEAM)))


def _clear(rig: Rig) -> None:
    """Remove the daemon and everything that carries the bench's names; a second Ctrl-C must not stop this."""
    kept = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if rig.process is not None and rig.process.poll() is None:
            rig.process.kill()
            rig.process.wait(20)
        for instance in (rig.instance, rig.raw.instance):
            _remove_labelled(rig.engine, f"isolator.instance={instance}")
        for container in rig.raw.made:
            with contextlib.suppress(docker.errors.APIError):
                rig.engine.remove_container(container, force=True)
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if str(rig.home) in line.split()[4]:
                subprocess.run(["umount", "-l", line.split()[4]], check=False)
        shutil.rmtree(rig.home, ignore_errors=True)
    finally:
        signal.signal(signal.SIGINT, kept)


def _remove_labelled(engine: docker.APIClient, label: str) -> None:
    for container in engine.containers(all=True, filters={"label": label}):
        with contextlib.suppress(docker.errors.APIError):
            engine.remove_container(container["Id"], force=True, v=True)
    for network in engine.networks(filters={"label": label}):
        with contextlib.suppress(docker.errors.APIError):
            engine.remove_network(network["Id"])
