"""OpenSandbox's server (PyPI `opensandbox-server`) beside ours on S1 and S4, on the same engine and the same image.

It is no dependency of ours: install it into a virtual environment of its own and name that one,

    python -m venv /tmp/opensandbox && /tmp/opensandbox/bin/pip install opensandbox-server==1.1.1
    ISOLATOR_BENCH_OPENSANDBOX=/tmp/opensandbox/bin/opensandbox-server python bench/run.py --peer

How it is set up, so that the comparison is fair and can be repeated:
- its packaged Docker configuration, with another port, state file and port range, and no API key on loopback;
- its helper image (`execd`), which needs a registry, is replaced by a stub: our Python image with a script that runs
  the command at the place of its bootstrap, and an execd that only sleeps. A real execd would start more, not less;
- its boxes are less confined than ours (root, writable rootfs, 11 capabilities, one shared bridge with a way out), and
  its network is Docker's default bridge, because it has no closed one: a raw create and start of a plain container on
  that bridge is therefore timed in the same turns, as its own floor.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import secrets
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker.errors
import psutil
from measure import SIDE_COLUMNS, Samples, Table, side_by_side
from rig import Rig

VARIABLE = "ISOLATOR_BENCH_OPENSANDBOX"
_HOST = "127.0.0.1"
_STUBS = {
    "execd": "#!/bin/sh\nexec sleep 3600\n",
    "bootstrap.sh": '#!/bin/sh\nexec "$@"\n',
}


def measure(rig: Rig, rounds: int) -> Table:
    with running_server(rig) as server:
        ours, peer = Samples("spawn: isolator"), Samples("spawn: OpenSandbox")
        raw, floor = Samples("spawn: raw, our body and network"), Samples("spawn: raw, plain box on the default bridge")
        our_stop, peer_stop, raw_stop = Samples("stop: isolator"), Samples("stop: OpenSandbox"), Samples("stop: raw")
        for _ in range(2):
            server.delete(server.create(rig.image))
        for _ in range(rounds):
            our_stop.timed(rig.stop, ours.timed(rig.spawn))
            peer_stop.timed(server.delete, peer.timed(server.create, rig.image))
            raw_stop.timed(rig.raw.stop, raw.timed(rig.raw.spawn, rig.raw.body()))
            rig.raw.remove(floor.timed(_plain_box, rig))
        memory = sum(item.memory_info().rss for item in server.processes()) / 1e6
        ours_memory = rig.daemon.memory_info().rss / 1e6
    return Table(
        "peer",
        "OpenSandbox's server beside ours, in turn",
        SIDE_COLUMNS,
        side_by_side((ours, peer, raw, floor), raw) + side_by_side((our_stop, peer_stop, raw_stop), raw_stop),
        (),
        (
            f"OpenSandbox over ours: spawn {peer.p50 / ours.p50:.1f}x, stop {peer_stop.p50 / our_stop.p50:.1f}x",
            f"OpenSandbox over a plain box on the same bridge: {peer.p50 / floor.p50:.1f}x",
            f"memory of the server (RSS): OpenSandbox {memory:.0f} MB, isolator {ours_memory:.0f} MB",
            "its execd is a stub; bench/peer_opensandbox.py says how both were set up",
        ),
    )


class Server:
    """The running peer: one keep-alive connection, as our side has."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self._process = process
        self._connection = http.client.HTTPConnection(_HOST, port, timeout=120)

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        for last in (False, True):
            try:
                self._connection.request(method, path, data, {"Content-Type": "application/json"})
                response = self._connection.getresponse()
                content = response.read()
                return response.status, json.loads(content) if content else None
            except OSError:
                # An idle connection it has closed, or a server that does not listen yet: the next try opens anew.
                self._connection.close()
                if last:
                    raise
        raise AssertionError

    def create(self, image: str) -> str:
        """POST /v1/sandboxes until it says running; it answers after the container was started."""
        status, answer = self.ask(
            "POST",
            "/v1/sandboxes",
            {
                "image": {"uri": image},
                "entrypoint": ["sleep", "3600"],
                "timeout": 3600,
                "resourceLimits": {"cpu": "1000m", "memory": "64Mi"},
            },
        )
        if status not in (200, 201, 202):
            raise RuntimeError(f"OpenSandbox answered {status}: {answer}")
        return str(answer["id"])

    def delete(self, sandbox: str) -> None:
        status, answer = self.ask("DELETE", f"/v1/sandboxes/{sandbox}")
        if status not in (200, 202, 204):
            raise RuntimeError(f"OpenSandbox answered {status}: {answer}")

    def processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self._process.pid)
        return [parent, *parent.children(recursive=True)]


@contextlib.contextmanager
def running_server(rig: Rig) -> Iterator[Server]:
    """The peer's server with a stub of its helper image; both are gone afterwards, and its sandboxes too.

    Raises:
        RuntimeError: it is not installed, or does not start.
    """
    program = os.environ.get(VARIABLE)
    if not program:
        raise RuntimeError(f"{VARIABLE} names no opensandbox-server; bench/peer_opensandbox.py says how to install it")
    folder = rig.home / "opensandbox"
    folder.mkdir()
    before = {item["Id"] for item in rig.engine.containers(all=True)}
    image = _stub_image(rig)
    port = _free_port()
    config = folder / "config.toml"
    config.write_text(_config(image, port, folder))
    process = None
    try:
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [program, "--config", str(config)],
                env={**os.environ, "OPENSANDBOX_INSECURE_SERVER": "YES", "HOME": str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        server = Server(process, port)
        _await_answer(server, process, folder / "log")
        yield server
    finally:
        if process is not None:
            process.kill()
            process.wait(20)
        for item in rig.engine.containers(all=True):
            if item["Id"] not in before and any(label.startswith("opensandbox") for label in item["Labels"]):
                rig.raw.remove(item["Id"])
        with contextlib.suppress(docker.errors.APIError):
            rig.engine.remove_image(image, force=True)


def _stub_image(rig: Rig) -> str:
    """Commit our Python image plus the stubs under a name of this run's; the name."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, text in _STUBS.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text), 0o755
            tar.addfile(entry, io.BytesIO(text.encode()))
    made = rig.engine.create_container(rig.image, ["true"])["Id"]
    try:
        rig.engine.put_archive(made, "/", archive.getvalue())
        repository, tag = "bench-opensandbox-execd", secrets.token_hex(4)
        rig.engine.commit(made, repository=repository, tag=tag)
    finally:
        rig.engine.remove_container(made, force=True)
    return f"{repository}:{tag}"


def _config(image: str, port: int, folder: Path) -> str:
    return f"""
[server]
host = "{_HOST}"
port = {port}
[log]
level = "WARNING"
[runtime]
type = "docker"
execd_image = "{image}"
[store]
type = "sqlite"
path = "{folder}/store.db"
[docker]
network_mode = "bridge"
port_range_min = 42000
port_range_max = 46000
publish_host = "{_HOST}"
drop_capabilities = [
    "AUDIT_WRITE", "MKNOD", "NET_ADMIN", "NET_RAW", "SYS_ADMIN", "SYS_MODULE", "SYS_PTRACE", "SYS_TIME",
    "SYS_TTY_CONFIG",
]
no_new_privileges = true
pids_limit = 4096
[ingress]
mode = "direct"
"""


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as listener:
        return int(listener.getsockname()[1])


def _await_answer(server: Server, process: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            if server.ask("GET", "/health")[0] == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"OpenSandbox's server did not start:\n{log.read_text()[-2000:]}")


def _plain_box(rig: Rig) -> str:
    """A container without any of our options, on the default bridge."""
    made = str(rig.engine.create_container(rig.image, ["sleep", "3600"], entrypoint="")["Id"])
    rig.raw.made.append(made)
    rig.engine.start(made)
    return made
