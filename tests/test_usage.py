"""What a box uses, read from trees of both cgroup versions as real kernels write them, and from odd ones."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_store import SPEC

from isolator.agents import stats
from isolator.agents.live import LiveAgent
from isolator.agents.stats import Stats, describe
from isolator.host import cgroups, usage
from isolator.host.cgroups import Cgroup
from isolator.host.usage import Usage, read_usage
from isolator.model.agent import Agent
from isolator.model.errors import TooMany, Unavailable

MIB = 1 << 20
V1 = {
    "cpuacct/docker/box/cpuacct.usage": "2500000000\n",
    "cpu/docker/box/cpu.stat": "nr_periods 30\nnr_throttled 22\nthrottled_time 723602937\nnr_bursts 0\nburst_time 0\n",
    "cpu/docker/box/cpu.cfs_quota_us": "50000\n",
    "cpu/docker/box/cpu.cfs_period_us": "100000\n",
    "memory/docker/box/memory.usage_in_bytes": f"{100 * MIB}\n",
    "memory/docker/box/memory.max_usage_in_bytes": f"{120 * MIB}\n",
    "memory/docker/box/memory.limit_in_bytes": f"{512 * MIB}\n",
    "memory/docker/box/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
    "memory/docker/box/memory.stat": f"cache 9\ninactive_file 1\ntotal_cache 9\ntotal_inactive_file {30 * MIB}\n",
    "pids/docker/box/pids.current": "7\n",
    "pids/docker/box/pids.max": "64\n",
}
V2 = {
    "docker.slice/box/cpu.stat": "usage_usec 2500000\nuser_usec 1\nnr_throttled 22\nthrottled_usec 723602\n",
    "docker.slice/box/cpu.max": "50000 100000\n",
    "docker.slice/box/memory.current": f"{100 * MIB}\n",
    "docker.slice/box/memory.peak": f"{120 * MIB}\n",
    "docker.slice/box/memory.max": f"{512 * MIB}\n",
    "docker.slice/box/memory.events": "low 0\nhigh 0\nmax 9\noom 3\noom_kill 3\noom_group_kill 0\n",
    "docker.slice/box/memory.stat": f"anon 5\nfile 9\nactive_file 4\ninactive_file {30 * MIB}\n",
    "docker.slice/box/pids.current": "7\n",
    "docker.slice/box/pids.max": "64\n",
}
PLACES = {
    "v1": "9:name=systemd:/docker/box\n8:pids:/docker/box\n4:memory:/docker/box\n3:cpu,cpuacct:/docker/box\n0::/\n",
    "v2": "0::/docker.slice/box\n",
}
TREES = {"v1": V1, "v2": V2}


def tree(root: Path, version: str, **changes: str | None) -> Cgroup:
    """The tree; `changes` by a file's name with _ for its dots, None takes it away."""
    for name, usual in TREES[version].items():
        path = root / name
        content = changes.get(path.name.replace(".", "_"), usual)
        if content is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    # Version 1's cpu and cpuacct are one mount with two names.
    return Cgroup(PLACES[version], root)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_every_figure_of_both_versions(tmp_path: Path, version: str) -> None:
    cgroup = tree(tmp_path, version)
    assert cgroup.cpu_seconds() == 2.5
    assert cgroup.throttled_seconds() == pytest.approx(0.7236, abs=1e-4)
    assert cgroup.cores() == 0.5
    assert (cgroup.memory_used(), cgroup.memory_peak(), cgroup.memory_cap()) == (70 * MIB, 120 * MIB, 512 * MIB)
    assert cgroup.oom_kills() == 3
    assert (cgroup.number("pids", "pids.current"), cgroup.number("pids", "pids.max")) == (7, 64)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_what_the_kernel_does_not_say_is_none(tmp_path: Path, version: str) -> None:
    names = {Path(name).name.replace(".", "_"): None for name in TREES[version]}
    cgroup = tree(tmp_path, version, **names)
    assert [cgroup.cpu_seconds(), cgroup.throttled_seconds(), cgroup.cores()] == [None] * 3
    assert [cgroup.memory_used(), cgroup.memory_peak(), cgroup.memory_cap(), cgroup.oom_kills()] == [None] * 4


def test_a_cache_that_grew_between_two_files_makes_nothing_negative(tmp_path: Path) -> None:
    assert tree(tmp_path, "v2", memory_current="4096\n").memory_used() == 0
    assert tree(tmp_path / "b", "v2", memory_stat=None).memory_used() == 100 * MIB
    assert tree(tmp_path / "c", "v2", memory_max="max\n").memory_cap() is None


def test_the_network_is_all_interfaces_but_loopback() -> None:
    head = "Inter-|   Receive  |  Transmit\n face |bytes packets errs | bytes\n"
    table = head + "    lo: 99 1 0 0 0 0 0 0 99 1 0 0 0 0 0 0\n  eth0:1586 19 0 0 0 0 0 0 42 1 0 0 0 0 0 0\n torn\n"
    assert usage._network(table) == (1586, 42)
    assert usage._network(head) == (0, 0)
    assert usage._network(None) is None


def counted(tmp_path: Path, pids: list[int]) -> tuple[int | None, bool]:
    folder = tmp_path / "pids/docker/box"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
    return usage._most_open_files(Cgroup(PLACES["v1"], tmp_path))


@pytest.mark.parametrize("told", [True, False])
def test_open_files_are_those_of_the_process_that_has_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    if not told:
        monkeypatch.setattr(usage, "_told_by_kernel", lambda _: 0)  # as kernels before 6.2
    before, whole = counted(tmp_path, [os.getpid(), 2**22 + 1])
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(50)]
    try:
        after, _ = counted(tmp_path, [2**22 + 1, os.getpid()])
    finally:
        for descriptor in opened:
            os.close(descriptor)
    assert whole
    assert before is not None
    assert after is not None
    assert 45 <= after - before <= 55
    assert counted(tmp_path, []) == (None, True)


def test_counting_open_files_is_bounded_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MOST_PROCESSES", 2)
    assert counted(tmp_path, [os.getpid()] * 3)[1] is False
    monkeypatch.setattr(usage, "_told_by_kernel", lambda _: 0)
    monkeypatch.setattr(usage, "MOST_COUNTED", 3)
    assert counted(tmp_path, [os.getpid()])[1] is False


def test_a_pid_that_is_gone_or_somebody_elses_tells_nothing() -> None:
    assert read_usage(2**22 + 1, "c" * 64) is None
    assert read_usage(os.getpid(), "c" * 64) is None


def test_a_process_that_ends_in_the_middle_of_a_reading_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cgroup's text is read through the first descriptor, so no later process of that pid can answer."""
    child = subprocess.Popen(["sleep", "60"])
    place = Path(f"/proc/{child.pid}/cgroup").read_text().splitlines()[0].rpartition(":")[2] or "/"
    assert read_usage(child.pid, place) is not None

    def end(_: Cgroup) -> tuple[int, bool]:
        child.kill()
        child.wait(10)
        return 1, True

    monkeypatch.setattr(usage, "_most_open_files", end)
    try:
        assert read_usage(child.pid, place) is None
    finally:
        child.kill()
        child.wait(10)


# the daemon's side


def reading(moment: float, seconds: float) -> Usage:
    nothing: dict[str, Any] = dict.fromkeys(Usage.__dataclass_fields__)
    return Usage(**{**nothing, "at": moment, "moment": moment, "cpu_seconds": seconds, "every_process": True})


class Kernel:
    """Readings that a test can count, and a clock that goes by itself only while somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads = 0
        self.gone = False
        self.clock = 1000.0
        monkeypatch.setattr(stats, "read_usage", self._read)
        monkeypatch.setattr(stats, "time", SimpleNamespace(monotonic=lambda: self.clock))
        monkeypatch.setattr(stats, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": self._sleep}))

    async def _sleep(self, seconds: float) -> None:
        self.clock += seconds

    def _read(self, pid: int, container_id: str) -> Usage | None:
        del pid, container_id
        self.reads += 1
        return None if self.gone else reading(self.clock, self.clock / 2)


def running(number: int = 1) -> LiveAgent:
    record = Agent(f"a{number}", SPEC, "running", 1.0, "docker", "sha256:0", 2.0, pid=4, container_id="c" * 64)
    return LiveAgent(record)


async def test_the_share_of_cpu_is_between_two_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, desk, live = Kernel(monkeypatch), Stats(), running()
    assert await desk.refresh([live]) == [live]
    assert kernel.reads == 2  # the first time a moment apart
    assert describe(live)["cpu"]["used"] == 0.5
    assert await desk.refresh([live]) == [live]
    assert kernel.reads == 2  # fresh enough
    kernel.clock += 4
    await desk.refresh([live])
    assert kernel.reads == 3  # against the one before
    assert describe(live)["cpu"] == {"used": 0.5, "over": 4.0, "limit": None, "seconds": 502.125, "throttled": None}
    kernel.clock += 100
    await desk.refresh([live])
    assert kernel.reads == 5  # that one was too old
    assert describe(live)["cpu"]["over"] == stats._SAMPLE
    desk.close()


async def test_a_box_that_is_gone_is_left_out_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, desk, live = Kernel(monkeypatch), Stats(), running()
    other = running(2)
    other.record = other.record.changed(pid=None)
    assert await desk.refresh([live, other]) == [live]
    kernel.gone = True
    kernel.clock += 3
    assert await desk.refresh([live]) == []
    assert (live.usage, live.usage_before) == (None, None)
    desk.close()


async def test_a_kernel_that_hangs_holds_up_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(stats, "read_usage", lambda *_: released.wait(30) and None)
    monkeypatch.setattr(stats, "PATIENCE", 0.05)
    monkeypatch.setattr(stats, "MOST_WAITING", 1)
    desk = Stats()
    try:
        for _ in range(stats.WORKERS + 1):
            with pytest.raises(Unavailable):
                await desk.refresh([running()])
        with pytest.raises(TooMany):
            await desk.refresh([running()])
    finally:
        released.set()
    for _ in range(100):
        if desk._under_way == 0:
            break
        await asyncio.sleep(0.02)
    assert await desk.refresh([running()]) == []
    desk.close()


def test_cgroups_keep_their_old_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cgroup, "of", lambda _: tree(tmp_path, "v2"))
    assert (cgroups.oom_kills(1), cgroups.cpu_seconds(1)) == (3, 2.5)
    monkeypatch.setattr(Cgroup, "of", lambda _: Cgroup("", tmp_path))
    assert (cgroups.oom_kills(1), cgroups.cpu_seconds(1)) == (0, None)
