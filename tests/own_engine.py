"""An engine of a test's own, to be killed: containerd and dockerd in namespaces and folders of their own.

It can't disturb the machine's engine: other sockets, other roots, its own network namespace with its own firewall
rules, its own cgroup parent. A daemon that shall use it runs in the same namespaces, so that both see the same
mounts and the same host addresses.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import docker.errors
from conftest import RunningDaemon, wait_for

IMAGE = "isolator/skill"
PROGRAMS = ("dockerd", "containerd", "unshare", "nsenter", "ip")


class OwnEngine:
    """One throw-away engine. `start` it, kill its dockerd, start that again, `close` it."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="isolator-engine-"))
        self.socket = self.home / "docker.sock"
        self._cgroup = f"/{self.home.name}"
        self._log = (self.home / "log").open("ab")
        self._holder: subprocess.Popen[bytes] | None = None
        self._containerd: subprocess.Popen[bytes] | None = None
        self.dockerd: subprocess.Popen[bytes] | None = None

    def start(self, machine: docker.DockerClient) -> None:
        """Start it and give it the image the tests use, taken from the machine's engine."""
        (self.home / "daemon.json").write_text("{}")
        (self.home / "containerd.toml").write_text(
            f'version = 2\nroot = "{self.home}/c/root"\nstate = "{self.home}/c/state"\n'
            f'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n[grpc]\naddress = "{self.home}/c/sock"\n'
        )
        self._holder = subprocess.Popen(
            ["unshare", "-m", "-n", "sh", "-c", "ip link set lo up && echo up && exec sleep 86400"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"up\n"
        self._containerd = self._run("containerd", "--config", str(self.home / "containerd.toml"))
        wait_for((self.home / "c/sock").exists, 15, self.log)
        self.start_dockerd()
        with contextlib.closing(self.client()) as client:
            client.images.load(machine.images.get(f"{IMAGE}:latest").save(named=f"{IMAGE}:latest"))

    def start_dockerd(self) -> None:
        """Start dockerd (again) and wait until it answers."""
        self.dockerd = self._run(
            "dockerd",
            *("--config-file", str(self.home / "daemon.json"), "--containerd", str(self.home / "c/sock")),
            *("--data-root", str(self.home / "data"), "--exec-root", str(self.home / "exec")),
            *("-p", str(self.home / "pid"), "-H", f"unix://{self.socket}"),
            *("--bip", "10.214.0.1/24", "--cgroup-parent", self._cgroup),
        )
        wait_for(self._answers, 30, self.log)

    def _answers(self) -> bool:
        try:
            with contextlib.closing(self.client()) as client:
                return bool(client.ping())
        except (docker.errors.DockerException, OSError):
            return False

    def client(self) -> docker.DockerClient:
        """A new client of it."""
        return docker.DockerClient(base_url=f"unix://{self.socket}", timeout=30)

    def kill(self) -> None:
        """kill -9 of dockerd alone, as a crash or an out-of-memory kill would be."""
        assert self.dockerd is not None
        self.dockerd.kill()
        self.dockerd.wait(10)

    def inside(self, *command: str) -> list[str]:
        """A command line that runs a program in the engine's namespaces."""
        assert self._holder is not None
        return [
            "nsenter",
            f"--mount=/proc/{self._holder.pid}/ns/mnt",
            f"--net=/proc/{self._holder.pid}/ns/net",
            *command,
        ]

    def mounts(self) -> list[str]:
        """Mount points in the engine's namespace."""
        assert self._holder is not None
        return [line.split()[4] for line in Path(f"/proc/{self._holder.pid}/mountinfo").read_text().splitlines()]

    def _run(self, *command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.inside(*command), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True
        )

    def log(self) -> str:
        """The end of what both daemons said."""
        return (self.home / "log").read_text(errors="replace")[-4000:]

    def close(self) -> None:
        """End every process of it, each by its pid, and remove its folders and cgroups."""
        with contextlib.suppress(docker.errors.DockerException, OSError, AssertionError):
            if self.dockerd is not None and self.dockerd.poll() is not None:
                self.start_dockerd()
            with contextlib.closing(self.client()) as client:
                for container in client.containers.list(all=True):
                    container.remove(force=True)
        for process in (self.dockerd, self._containerd):
            if process is not None:
                _end(process)
        self._end_the_rest()
        if self._holder is not None:
            self._holder.kill()
            self._holder.wait(10)
            if self._holder.stdout is not None:
                self._holder.stdout.close()
        self._log.close()
        for controller in Path("/sys/fs/cgroup").iterdir():
            for folder in (*(controller / self._cgroup[1:]).glob("*/"), controller / self._cgroup[1:]):
                with contextlib.suppress(OSError):
                    folder.rmdir()
        shutil.rmtree(self.home, ignore_errors=True)

    def _end_the_rest(self) -> None:
        """Shims of the namespace and processes of its containers that outlived their daemons."""
        if self._holder is None:
            return
        namespace = Path(f"/proc/{self._holder.pid}/ns/mnt").readlink()
        for _ in range(50):
            found = [pid for pid in _pids() if pid != self._holder.pid and self._belongs(pid, namespace)]
            if not found:
                return
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def _belongs(self, pid: int, namespace: Path) -> bool:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/ns/mnt").readlink() == namespace:
                return True
            return f"{self._cgroup}/" in Path(f"/proc/{pid}/cgroup").read_text()
        return False


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGCONT)
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)


class InnerDaemon(RunningDaemon):
    """A daemon in the namespaces of an engine of its own."""

    engine: OwnEngine

    def command(self) -> list[str]:
        return self.engine.inside(*super().command())

    def leftovers(self, client: docker.DockerClient) -> list[str]:
        """As its parent's, with the mounts of the engine's namespace."""
        staged = [f"mount {place}" for place in self.engine.mounts() if str(self.home / "run" / "mounts") in place]
        return super().leftovers(client) + staged


@contextlib.contextmanager
def inner_daemon(engine: OwnEngine, pins: dict[str, str], **extra: str) -> Iterator[InnerDaemon]:
    """A daemon, not yet started, in folders of its own, that uses this engine; ended afterwards."""
    home = Path(tempfile.mkdtemp(prefix="isolator-test-"))
    home.chmod(0o755)
    settings = {"ISOLATOR_DOCKER_SOCKET": str(engine.socket), "ISOLATOR_DEFAULT_IMAGE": IMAGE, **extra}
    daemon = InnerDaemon(home, "own-engine", settings)
    daemon.engine = engine
    daemon.roots.mkdir(mode=0o755)
    (home / "images.json").write_text(json.dumps({IMAGE: pins[IMAGE]}))
    (home / "images.json").chmod(0o644)
    try:
        yield daemon
    finally:
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.wait(10)
        for place in engine.mounts():
            if place.startswith(str(home)):
                subprocess.run(engine.inside("umount", "-l", place), check=False)
        shutil.rmtree(home, ignore_errors=True)
