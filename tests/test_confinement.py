"""An agent finds nothing to hold on to: the box is what its spec says, seen from the engine and from inside."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from attack_helpers import attack, program, promised, said, team
from conftest import RunningDaemon

from isolator.backends.docker.compare import compare
from isolator.backends.docker.render import render
from isolator.seccomp import load_profile

pytestmark = pytest.mark.engine

STANDARD_DEVICES = {
    "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty",
    "urandom", "zero",
}  # fmt: skip


@pytest.fixture(scope="module")
def seen(daemon: RunningDaemon) -> dict[str, Any]:
    """What one agent with default limits saw of its box."""
    return attack(daemon, "confinement", name="looker", limits={"nofile": 512})


def test_inspect_equals_the_spec_field_by_field(daemon: RunningDaemon, engine) -> None:
    folder = daemon.workspace("inspected")
    agent = daemon.spawn(
        "sleep", "60", team=team(daemon), workspace={"source": str(folder)}, env={"A": "b"}, limits={"cpus": 0.5}
    )
    found = engine.api.inspect_container(agent["container_id"])
    profile = load_profile()
    spec = promised(daemon, agent["id"]).spec
    compare(render(spec, profile.docker_json(), engine.api._version), found)
    assert spec.digest() == agent["spec_digest"] == found["Config"]["Labels"]["isolator.spec"]

    host, config = found["HostConfig"], found["Config"]
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"] == ["/usr/bin/python3", "-I", "-S", "/run/isolator/guest.py"]
    assert config["Cmd"] == ["sleep", "60"]
    assert found["Image"] == agent["image_digest"]
    assert host["NanoCpus"] == 500_000_000
    assert host["Memory"] == host["MemorySwap"] == 512 * 1024**2
    assert host["PidsLimit"] == 256
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert host["Privileged"] is False
    assert host["ReadonlyRootfs"] is True
    assert sorted(host["SecurityOpt"]) == sorted(["no-new-privileges:true", f"seccomp={profile.docker_json()}"])
    assert host["IpcMode"] == "private"
    assert host["CgroupnsMode"] == "private"
    assert host["PidMode"] == host["UTSMode"] == host["UsernsMode"] == ""
    assert not host["Devices"]
    assert not host["Binds"]
    assert host["RestartPolicy"] == {"Name": "no", "MaximumRetryCount": 0}
    assert host["NetworkMode"] == f"openclaw-team-{team(daemon)}"
    assert {"Name": "core", "Hard": 0, "Soft": 0} in host["Ulimits"]
    assert set(host["Tmpfs"]) == {"/tmp", "/run/secrets"}
    assert all("noexec,nosuid,nodev,size=" in options for options in host["Tmpfs"].values())
    assert {mount["Target"]: mount.get("ReadOnly", False) for mount in host["Mounts"]} == {
        "/run/isolator": True,
        "/workspace": False,
    }


def test_no_capabilities_a_filter_and_no_way_up(seen: dict[str, Any]) -> None:
    status = seen["status"]
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert status[name] == ["0" * 16], name
    assert status["Seccomp"] == ["2"]
    assert status["NoNewPrivs"] == ["1"]
    assert status["Uid"] == status["Gid"] == ["10001"] * 4
    assert set(status["Groups"]) <= {"10001"}
    assert {seen[name] for name in ("chown", "setuid", "chroot", "mknod")} == {"EPERM"}
    assert seen["lower_oom_score"] == "EACCES"


def test_only_the_scratch_places_are_writable(seen: dict[str, Any]) -> None:
    writable = {path for path, outcome in seen["writes"].items() if outcome == "done"}
    assert writable == {"/tmp/new", "/dev/shm/new"}
    # Of mounts in one place the last covers the others.
    covering = {mount[4]: mount[5].split(",") for mount in seen["mounts"]}
    kernels = {place for place in covering if place.startswith(("/proc", "/dev"))}
    assert {place for place, options in covering.items() if "rw" in options} - kernels == {"/tmp", "/run/secrets"}
    for place in ("/", "/proc/sys", "/sys", "/run/isolator"):
        assert "ro" in covering[place], place


def test_what_was_written_can_not_be_executed(seen: dict[str, Any]) -> None:
    assert seen["original"] == 0
    assert seen["original_mmap"] == 0
    for folder in ("/tmp", "/dev/shm"):
        tried = seen["exec"][folder]
        assert tried["binary"] == 13, tried
        assert tried["script"] == 13, tried
        assert tried["mmap"] == 1, tried


def test_the_host_kernel_is_masked(seen: dict[str, Any]) -> None:
    assert seen["reads"].pop("/proc/version").startswith("Linux")
    assert all(text == "" or text.startswith("errno") for text in seen["reads"].values()), seen["reads"]
    assert seen["listings"]
    assert set(seen["listings"].values()) == {0}
    assert set(seen["devices"]) <= STANDARD_DEVICES


def test_namespaces_are_its_own(seen: dict[str, Any]) -> None:
    for name in ("cgroup", "ipc", "mnt", "net", "pid", "uts"):
        assert seen["namespaces"][name] != str(Path(f"/proc/self/ns/{name}").readlink()), name
    assert all(line.split(":", 2)[2] == "/" for line in seen["cgroup"]), seen["cgroup"]
    assert seen["hostname"] == "looker"
    assert seen["pids"][0] == 1
    assert len(seen["pids"]) <= 3


def test_ulimits(seen: dict[str, Any]) -> None:
    assert seen["core"] == [0, 0]
    assert seen["nofile"] == [512, 512]


def test_pid_one_is_closed_to_the_agent_and_its_report_can_not_be_forged(daemon: RunningDaemon) -> None:
    agent = daemon.spawn(*program("pid_one"), team=team(daemon), env={"STAY": "1"})
    tried = json.loads(said(daemon, agent, "}").splitlines()[-1])
    assert tried["read_own_child"] == "done"
    assert set(tried["read"].values()) <= {"EACCES", "EPERM"}, tried["read"]
    assert tried["fds"] == tried["root"] == "EACCES"
    assert tried["pid_one_state"] in ("S", "R")
    assert tried["ptrace"] == tried["ptrace_own_child"] == "EPERM"
    assert tried["vm_read"] == "EPERM"
    assert {tried[name] for name in ("guest_program", "guest_rename", "socket_unlink", "socket_chmod")} <= {
        "EROFS",
        "EACCES",
        "EPERM",
    }
    assert tried["socket_replace"] == "EADDRINUSE"
    # Taken for a visitor, whose words are messages or nonsense: a guest would have been sent BYE for its end.
    for name in ("forged_exit", "forged_hello", "listens_for_nothing"):
        said_back = tried[name]
        assert said_back in ("", "EPIPE", "ECONNRESET", "timeout") or b"400" in bytes.fromhex(said_back)[:16], name
    assert daemon.get(f"/v1/agents/{agent['id']}").json["state"] == "running"
    assert daemon.delete(f"/v1/agents/{agent['id']}").json["exit"]["reason"] == "killed"


def test_a_flood_on_its_socket_disturbs_nobody(daemon: RunningDaemon) -> None:
    flooder = daemon.spawn(*program("socket_flood", 1000, "60"), team=team(daemon))
    slowest = 0.0
    for _ in range(10):
        began = time.monotonic()
        assert daemon.get("/healthz").status == 200
        slowest = max(slowest, time.monotonic() - began)
    ended, output = daemon.run("echo", "undisturbed", team=team(daemon))
    assert (ended["exit"]["code"], output) == (0, "undisturbed\n")
    tried = json.loads(said(daemon, flooder, "}").splitlines()[-1])
    assert tried["tried"] == sum(tried["outcomes"].values()) == 1000
    assert tried["outcomes"]["connected"] > 0
    assert tried["outcomes"].get("EAGAIN", 0) > 500, "the daemon never stopped answering the knocks"
    assert slowest < 2
    process = daemon.process
    assert process is not None
    assert len(list(Path(f"/proc/{process.pid}/fd").iterdir())) < 200
    assert daemon.get(f"/v1/agents/{flooder['id']}").json["state"] == "running"
    # Its own guest still reports through the same socket.
    assert daemon.delete(f"/v1/agents/{flooder['id']}?grace=5").json["exit"]["signal"] == 15
