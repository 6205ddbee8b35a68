"""Bombs die inside their box, with the right reason, and nobody else notices. Each cap has a "can" below it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from attack_helpers import attack, program, said, team
from conftest import RunningDaemon, running_daemon, wait_for

pytestmark = pytest.mark.engine

MEBIBYTE = 1024 * 1024


def cgroup(controller: str, container: str, name: str) -> str:
    """A file of the container's cgroup, v1 or v2."""
    places = (
        Path(f"/sys/fs/cgroup/{controller}/docker/{container}/{name}"),
        Path(f"/sys/fs/cgroup/system.slice/docker-{container}.scope/{name}"),
        Path(f"/sys/fs/cgroup/docker/{container}/{name}"),
    )
    for place in places:
        if place.exists():
            return place.read_text().strip()
    raise AssertionError(f"no {name} of {container}")


def test_processes_end_at_the_cap(daemon: RunningDaemon) -> None:
    tried = attack(daemon, "limits", "processes", limits={"pids": 40})
    # PID 1 and the bomb itself are the other two.
    assert tried == {"made": 38, "error": "EAGAIN"}
    assert attack(daemon, "limits", "threads", limits={"pids": 40})["made"] == 38
    assert attack(daemon, "limits", "processes", limits={"pids": 80})["made"] == 78


def test_a_fork_bomb_disturbs_nobody_and_dies_with_its_box(daemon: RunningDaemon) -> None:
    bystander = daemon.spawn("sleep", "60", team=team(daemon))
    bomb = daemon.spawn(*program("limits", "fork_bomb"), team=team(daemon), limits={"pids": 64, "cpus": 0.5})
    said(daemon, bomb, "bombing")
    wait_for(lambda: int(cgroup("pids", bomb["container_id"], "pids.current")) == 64, 10)
    ended, output = daemon.run("echo", "still served", team=team(daemon))
    assert (ended["exit"]["code"], output) == (0, "still served\n")
    began = time.monotonic()
    assert daemon.delete(f"/v1/agents/{bomb['id']}?grace=0").json["state"] == "removed"
    assert time.monotonic() - began < 10
    assert daemon.get(f"/v1/agents/{bystander['id']}").json["state"] == "running"
    daemon.delete(f"/v1/agents/{bystander['id']}?grace=0")


@pytest.mark.parametrize("bomb", ["memory", "shared_memory"])
def test_a_memory_bomb_is_told_apart(daemon: RunningDaemon, engine, bomb: str) -> None:
    agent = daemon.spawn(
        *program("limits", bomb), team=team(daemon), limits={"memory": "96m", "disk": "512m"}, cleanup_grace=30
    )
    host = engine.api.inspect_container(agent["container_id"])["HostConfig"]
    assert host["Memory"] == host["MemorySwap"] == 96 * MEBIBYTE
    ended = daemon.wait(agent)
    assert ended["exit"]["reason"] == "oom", ended["exit"]
    assert ended["exit"]["code"] == 137
    assert ended["exit"]["signal"] == 9
    reached = [int(line) for line in daemon.output(agent).split() if line.isdigit()]
    assert all(size < 96 for size in reached)


def test_memory_below_the_cap_is_no_bomb(daemon: RunningDaemon) -> None:
    ended, output = daemon.run(
        "python3", "-c", "print(len(bytearray(100 * 1024**2)))", team=team(daemon), limits={"memory": "160m"}
    )
    assert (ended["exit"]["reason"], output) == ("exited", f"{100 * MEBIBYTE}\n")


def test_a_kill_that_is_not_for_memory_is_not_called_so(daemon: RunningDaemon) -> None:
    ended, _ = daemon.run("python3", "-c", "import os; os.kill(os.getpid(), 9)", team=team(daemon))
    assert (ended["exit"]["reason"], ended["exit"]["signal"]) == ("killed", 9)


def test_cpu_is_capped_by_quota(daemon: RunningDaemon) -> None:
    agent = daemon.spawn("sleep", "30", team=team(daemon), limits={"cpus": 0.3})
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        quota, period = cgroup("cpu", agent["container_id"], "cpu.max").split()
    else:
        quota, period = (cgroup("cpu", agent["container_id"], f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    assert int(quota) == round(0.3 * int(period))
    daemon.delete(f"/v1/agents/{agent['id']}?grace=0")
    assert attack(daemon, "limits", "cpu", limits={"cpus": 0.3})["cores"] < 0.5


def test_a_disk_flood_ends_at_the_cap_of_each_scratch_place(daemon: RunningDaemon) -> None:
    tried = attack(daemon, "limits", "disk", limits={"disk": "3m"})
    for folder in ("/tmp", "/dev/shm"):
        assert tried[folder] == {"size": 3 * MEBIBYTE, "error": "ENOSPC"}, folder


def test_an_inode_flood_ends(daemon: RunningDaemon) -> None:
    tried = attack(daemon, "limits", "inodes")
    assert tried["error"] == "ENOSPC"
    assert 1000 < tried["made"] <= 65_536


def test_descriptors_end_at_the_cap_and_it_can_not_be_raised(daemon: RunningDaemon) -> None:
    tried = attack(daemon, "limits", "descriptors", limits={"nofile": 64})
    assert tried["error"] == "EMFILE"
    assert 50 < tried["made"] < 64
    assert "maximum" in tried["raised"]


def test_a_crash_leaves_no_core(daemon: RunningDaemon) -> None:
    assert attack(daemon, "limits", "core") == {"signal": 6, "dumped": False, "files": []}


def test_a_log_flood_keeps_the_newest_up_to_the_cap(engine, image_pins) -> None:
    with running_daemon(engine, image_pins, ISOLATOR_LOG_MAX_BYTES="2m") as small:
        agent = small.spawn(*program("limits", "output"), team=team(small))
        assert small.wait(agent)["exit"]["code"] == 0
        kept = small.get(f"/v1/agents/{agent['id']}/logs").content
        assert kept.splitlines()[-1] == b"{}"
        assert kept.splitlines()[-2].split()[0] == b"40959"
        assert MEBIBYTE // 4 < len(kept) <= 2 * MEBIBYTE
        folder = Path(engine.info()["DockerRootDir"]) / "containers" / agent["container_id"]
        kept_files = [file.stat().st_size for file in folder.rglob("*") if "log" in file.name and file.is_file()]
        assert kept_files
        assert sum(kept_files) <= 2.2 * MEBIBYTE


def test_wall_time_ends_it(daemon: RunningDaemon) -> None:
    agent = daemon.spawn("sleep", "60", team=team(daemon), limits={"wall": 0.7})
    ended = daemon.wait(agent, 20)
    assert (ended["exit"]["reason"], ended["exit"]["signal"]) == ("wall", 9)
    in_time, _ = daemon.run("sleep", "0.1", team=team(daemon), limits={"wall": 20})
    assert in_time["exit"]["reason"] == "exited"


def test_ttl_ends_it_even_if_it_ignores_signals(daemon: RunningDaemon) -> None:
    stubborn = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]; time.sleep(60)"
    agent = daemon.spawn("python3", "-c", stubborn, team=team(daemon), ttl=1.0)
    assert agent["expires_at"] is not None
    assert daemon.wait(agent, 20)["exit"]["reason"] == "ttl"


def test_idle_ttl_ends_the_idle_and_not_the_busy(daemon: RunningDaemon) -> None:
    idle = daemon.spawn("sleep", "60", team=team(daemon), idle_ttl=1.5)
    busy = daemon.spawn("python3", "-c", "while True: pass", team=team(daemon), idle_ttl=1.5, limits={"cpus": 0.3})
    assert daemon.wait(idle, 20)["exit"]["reason"] == "ttl"
    time.sleep(2.5)
    assert daemon.get(f"/v1/agents/{busy['id']}").json["state"] == "running"
    daemon.delete(f"/v1/agents/{busy['id']}?grace=0")


@pytest.mark.parametrize(
    "limits",
    [{"cpus": 0}, {"cpus": -1}, {"memory": 0}, {"memory": -1}, {"pids": 0}, {"pids": -1}, {"disk": 0}, {"nofile": 0},
     {"wall": 0}, {"wall": -1}, {"memory": "4k"}, {"pids": 10**9}, {"cpus": 10**6}],
    ids=json.dumps,
)  # fmt: skip
def test_no_number_means_unlimited(daemon: RunningDaemon, limits: dict[str, object]) -> None:
    answer = daemon.post("/v1/agents", {"team": team(daemon), "command": ["true"], "limits": limits})
    assert answer.status == 400, answer.content
    assert answer.json["code"] in ("limit_out_of_range", "invalid_request")
