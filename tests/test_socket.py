"""The socket itself: its mode and group, where it may lie, whose it is, and one that systemd opened for us."""

from __future__ import annotations

import grp
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import docker
import pytest
from api_helpers import AsUser, raw_connection
from conftest import RunningDaemon, running_daemon, wait_for

from isolator.api.server import open_socket
from isolator.model.errors import Unavailable

ENGINE = pytest.mark.engine


def test_it_is_born_closed_and_ends_at_0660_of_its_group(tmp_path: Path) -> None:
    path, group = tmp_path / "run" / "isolator.sock", grp.getgrnam("daemon").gr_gid
    with open_socket(path, group):
        facts = path.stat()
        assert stat.S_ISSOCK(facts.st_mode)
        assert stat.S_IMODE(facts.st_mode) == 0o660
        assert (facts.st_uid, facts.st_gid) == (0, group)
        assert stat.S_IMODE(path.parent.stat().st_mode) & 0o022 == 0
        with raw_connection(path):
            pass


def test_without_a_group_it_is_the_daemons_own(tmp_path: Path) -> None:
    with open_socket(tmp_path / "isolator.sock", None):
        facts = (tmp_path / "isolator.sock").stat()
        assert (stat.S_IMODE(facts.st_mode), facts.st_uid, facts.st_gid) == (0o660, 0, 0)


def test_a_socket_left_by_a_dead_daemon_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "isolator.sock"
    open_socket(path, None).close()
    assert path.is_socket()
    with open_socket(path, None), raw_connection(path):
        pass


def test_a_socket_that_answers_is_not_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "isolator.sock"
    with open_socket(path, None):
        with pytest.raises(Unavailable) as caught:
            open_socket(path, None)
        assert caught.value.code == "socket_in_use"
        with raw_connection(path):
            pass


@pytest.mark.parametrize("kind", ["file", "folder", "link", "pipe"])
def test_what_is_no_socket_is_not_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "isolator.sock"
    match kind:
        case "file":
            path.write_text("precious")
        case "folder":
            path.mkdir()
        case "link":
            (tmp_path / "target").write_text("precious")
            path.symlink_to(tmp_path / "target")
        case "pipe":
            os.mkfifo(path)
    before = path.lstat()
    with pytest.raises(Unavailable) as caught:
        open_socket(path, None)
    assert caught.value.code == "socket_unsafe"
    assert path.lstat().st_ino == before.st_ino


@pytest.mark.parametrize(("mode", "uid"), [(0o777, 0), (0o775, 0), (0o757, 0), (0o755, 1000), (0o1777, 1000)])
def test_a_folder_in_which_others_could_swap_it_is_refused(tmp_path: Path, mode: int, uid: int) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    os.chown(folder, uid, uid)
    with pytest.raises(Unavailable) as caught:
        open_socket(folder / "isolator.sock", None)
    assert caught.value.code == "socket_unsafe"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o700, 0o1777])
def test_a_folder_of_roots_is_taken(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    folder.chmod(mode)
    open_socket(folder / "isolator.sock", None).close()


@ENGINE
def test_only_its_group_connects(engine: docker.DockerClient, image_pins: dict[str, str], as_user: AsUser) -> None:
    group = grp.getgrnam("daemon").gr_gid
    with running_daemon(engine, image_pins, ISOLATOR_SOCKET_GROUP="daemon") as daemon:
        assert stat.S_IMODE(daemon.socket.stat().st_mode) == 0o660
        assert daemon.socket.stat().st_gid == group
        with as_user(1000), pytest.raises(PermissionError):
            daemon.get("/healthz")
        with as_user(group):  # a process whose group it is
            assert daemon.get("/healthz").status == 200
        degraded = {item["code"] for item in daemon.get("/v1/info").json["degraded"]}
        assert "socket_group_missing" not in degraded


@ENGINE
def test_a_missing_group_is_told(daemon: RunningDaemon) -> None:
    if any(entry.gr_name == "isolator" for entry in grp.getgrall()):
        pytest.skip("this host has the group")
    degraded = {item["code"]: item["detail"] for item in daemon.get("/v1/info").json["degraded"]}
    assert "isolator" in degraded["socket_group_missing"]
    assert daemon.socket.stat().st_gid == 0


@ENGINE
def test_two_daemons_do_not_share_a_state_folder_or_a_socket(daemon: RunningDaemon) -> None:
    for extra, code in (
        (
            {"ISOLATOR_RUNTIME_DIR": str(daemon.home / "run2"), "ISOLATOR_SOCKET": str(daemon.home / "s2")},
            "state_in_use",
        ),
        ({"ISOLATOR_STATE_DIR": str(daemon.home / "state2")}, "socket_in_use"),
    ):
        second = subprocess.run(
            [sys.executable, "-m", "isolator", "daemon"],
            env={**daemon.environment(), **extra},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert second.returncode != 0
        assert code in second.stderr
        assert "Traceback" not in second.stderr
        assert daemon.get("/healthz").status == 200


@ENGINE
@pytest.mark.parametrize("way", ["systemd-socket-activate", "by hand"])
def test_a_socket_opened_for_it_is_served_and_left_in_place(
    engine: docker.DockerClient, image_pins: dict[str, str], way: str
) -> None:
    with running_daemon(engine, image_pins, start=False) as daemon:
        daemon.socket.parent.mkdir(mode=0o755)
        listener = None
        if way == "by hand":
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(str(daemon.socket))
            listener.listen(8)
            # The process that execs the daemon keeps its pid, which is what LISTEN_PID must name.
            wrapper = (
                "import os, sys\n"
                "os.dup2(int(sys.argv[1]), 3)\n"
                "os.environ['LISTEN_PID'], os.environ['LISTEN_FDS'] = str(os.getpid()), '1'\n"
                "os.execv(sys.executable, [sys.executable, '-m', 'isolator', 'daemon'])\n"
            )
            command = [sys.executable, "-c", wrapper, str(listener.fileno())]
        else:
            variables = [f"--setenv={name}" for name in daemon.environment() if name.startswith("ISOLATOR_")]
            command = ["systemd-socket-activate", *variables, "-l", str(daemon.socket)]
            command += [sys.executable, "-m", "isolator", "daemon"]
        with (daemon.home / "log").open("ab") as log:
            daemon.process = subprocess.Popen(
                command,
                env=daemon.environment(),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                pass_fds=[listener.fileno()] if listener else [],
            )
        if listener:
            listener.close()
        wait_for(daemon.socket.exists, 10)
        born = daemon.socket.stat()
        assert daemon.get("/healthz", timeout=30).status == 200
        wait_for(lambda: daemon.get("/v1/info").json["network"]["status"] == "proven", 60, lambda: daemon.log)
        _, output = daemon.run("echo", "activated", team="activated")
        assert output == "activated\n"
        assert daemon.delete("/v1/teams/activated").status == 200
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(40) == 0
        assert daemon.socket.stat().st_ino == born.st_ino
        assert daemon.leftovers(engine) == []
