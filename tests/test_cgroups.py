"""Caps and use as the kernel's cgroup files say them: trees of both versions, whole, false and unreadable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_store import SPEC

from isolator.agents.receipt import receipt
from isolator.backends.base import Guarantee
from isolator.host import cgroups
from isolator.host.cgroups import Cgroup, check_limits
from isolator.model.errors import BoxFailed
from isolator.model.limits import Limits

LIMITS = Limits(cpus=1.5, memory=512 << 20, pids=64, disk=1 << 20, nofile=1024, wall=None)
BOTH = {
    1: {
        "memory/box/memory.limit_in_bytes": 512 << 20,
        "memory/box/memory.memsw.limit_in_bytes": 512 << 20,
        "memory/box/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2",
        "pids/box/pids.max": 64,
        "cpu/box/cpu.cfs_quota_us": 150_000,
        "cpu/box/cpu.cfs_period_us": 100_000,
        "cpuacct/box/cpuacct.usage": 2_500_000_000,
    },
    2: {
        "box/memory.max": 512 << 20,
        "box/memory.swap.max": 0,
        "box/memory.events": "low 0\noom 3\noom_kill 2",
        "box/pids.max": 64,
        "box/cpu.max": "150000 100000",
        "box/cpu.stat": "usage_usec 2500000\nuser_usec 1",
    },
}
PLACES = {1: "9:memory:/box\n4:cpu,cpuacct:/box\n3:pids:/box\n0::/", 2: "0::/box"}


def tree(root: Path, version: int, **changes: Any) -> Cgroup:
    """A tree of that version; `changes` by a file's name, None takes it away."""
    for name, usual in BOTH[version].items():
        path = root / name
        value = changes.get(path.name.replace(".", "_"), usual)
        if value is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")
    return Cgroup(PLACES[version], root)


@pytest.mark.parametrize("version", [1, 2])
def test_caps_as_asked_are_confirmed(tmp_path: Path, version: int) -> None:
    assert check_limits(tree(tmp_path, version), LIMITS) is True


@pytest.mark.parametrize(
    ("version", "change", "field"),
    [
        (1, {"memory_limit_in_bytes": 9223372036854771712}, "memory"),
        (1, {"memory_limit_in_bytes": None}, "memory"),
        (1, {"memory_memsw_limit_in_bytes": 1024 << 20}, "memory"),
        (1, {"pids_max": "max"}, "pids"),
        (1, {"pids_max": None}, "pids"),
        (1, {"cpu_cfs_quota_us": -1}, "cpus"),
        (1, {"cpu_cfs_quota_us": 200_000}, "cpus"),
        (1, {"cpu_cfs_period_us": 0}, "cpus"),
        (2, {"memory_max": "max"}, "memory"),
        (2, {"memory_swap_max": "max"}, "memory"),
        (2, {"memory_swap_max": 1}, "memory"),
        (2, {"pids_max": 65}, "pids"),
        (2, {"cpu_max": "max 100000"}, "cpus"),
        (2, {"cpu_max": "160000 100000"}, "cpus"),
        (2, {"cpu_max": None}, "cpus"),
    ],
)
def test_a_cap_that_is_missing_or_too_wide_is_named(
    tmp_path: Path, version: int, change: dict[str, Any], field: str
) -> None:
    with pytest.raises(BoxFailed) as refusal:
        check_limits(tree(tmp_path, version, **change), LIMITS)
    assert (refusal.value.code, refusal.value.fields["field"]) == ("box_mismatch", f"limits.{field}")


def test_a_process_that_is_gone_confirms_nothing() -> None:
    with pytest.raises(BoxFailed):
        check_limits(Cgroup.of(2**22 + 1), LIMITS)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("swaps", [True, False])
def test_swap_that_is_not_counted_is_said_where_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, swaps: bool
) -> None:
    table = tmp_path / "swaps"
    table.write_text("Filename\tType\tSize\n" + "/dev/sda2 partition 1\n" * swaps)
    monkeypatch.setattr(cgroups, "_SWAPS", table)
    uncounted = tree(tmp_path, version, memory_memsw_limit_in_bytes=None, memory_swap_max=None)
    assert check_limits(uncounted, LIMITS) is not swaps


@pytest.mark.parametrize("version", [1, 2])
def test_what_it_used_and_what_was_killed(tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cgroup, "of", lambda _: tree(tmp_path, version))
    assert cgroups.oom_kills(1) == 2
    assert cgroups.cpu_seconds(1) == 2.5


def test_the_receipt_says_what_was_measured() -> None:
    promised = {"memory-cap": Guarantee(True, "cgroup limit, swap included")}
    assert receipt(SPEC, promised, swap_capped=True)["memory-cap"]["held"] is True
    weaker = receipt(SPEC, promised, swap_capped=False)["memory-cap"]
    assert weaker["held"] is False
    assert "does not count swap" in weaker["how"]
