"""E3: files inside a running agent, against the same file read and written on the host.

Small files count by latency, large ones by throughput. Both sides read into memory that is already there, and write
from it, a MiB at a time; the raw side writes a new file and renames it into place, as ours does. None of them waits
for the disk.
"""

from __future__ import annotations

import os
from pathlib import Path

from measure import SIDE_COLUMNS, Samples, Table, side_by_side, verdict
from rig import Rig

SMALL, LARGE = 4 << 10, 64 << 20
MOST_SMALL_MS, LEAST_SHARE = 3.0, 0.5
_PIECE = 1 << 20


class _Sides:
    """One agent with a workspace, and the workspace on the host."""

    def __init__(self, rig: Rig, workspace: Path, agent: str) -> None:
        self._api = rig.api
        self._workspace = workspace
        self._address = f"/v1/agents/{agent}/files/workspace"
        self._memory = memoryview(bytearray(_PIECE))

    def put(self, name: str, content: bytes) -> None:
        self._api.request("PUT", f"{self._address}/{name}", content)
        response = self._api.getresponse()
        response.read()
        if response.status not in (200, 201):
            raise RuntimeError(f"a write was answered {response.status}")

    def get(self, name: str) -> None:
        self._api.request("GET", f"{self._address}/{name}")
        response = self._api.getresponse()
        if response.status != 200:
            raise RuntimeError(f"a read was answered {response.status}")
        while response.readinto(self._memory):
            pass

    def write(self, name: str, content: bytes) -> None:
        place = self._workspace / f"{name}.new"
        descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        view = memoryview(content)
        for start in range(0, len(content), _PIECE):
            os.write(descriptor, view[start : start + _PIECE])
        os.close(descriptor)
        place.rename(self._workspace / name)

    def read(self, name: str) -> None:
        with (self._workspace / name).open("rb", buffering=0) as file:
            while file.readinto(self._memory):
                pass


def measure(rig: Rig, rounds: int) -> Table:
    """Both sizes, both ways, in turn."""
    workspace = rig.roots / "e3"
    workspace.mkdir()
    os.chown(workspace, 1000, 1000)
    agent = rig.spawn(workspace={"source": str(workspace)})
    sides = _Sides(rig, workspace, agent)
    tables: dict[str, tuple[Samples, Samples]] = {}
    for what, size in (("4 KiB", SMALL), ("64 MiB", LARGE)):
        content = os.urandom(size)
        names = tuple(f"{side}: {act} {what}" for act in ("write", "read") for side in ("isolator", "raw"))
        put, write, get, read = (Samples(name) for name in names)
        tables[f"write {what}"], tables[f"read {what}"] = (put, write), (get, read)
        for _ in range(rounds):
            put.timed(sides.put, "ours", content)
            write.timed(sides.write, "raw", content)
            get.timed(sides.get, "ours")
            read.timed(sides.read, "raw")
    rig.stop(agent)
    rows = tuple(row for ours, raw in tables.values() for row in side_by_side((ours, raw), raw))
    small, large = list(tables)[:2], list(tables)[2:]
    verdicts = [verdict(f"p50 of {name}", tables[name][0].p50 * 1000, MOST_SMALL_MS, " ms") for name in small]
    verdicts += [_share(name, *tables[name]) for name in large]
    return Table("E3", "files of a running agent", SIDE_COLUMNS, rows, tuple(verdicts))


def _share(name: str, ours: Samples, raw: Samples) -> str:
    share = raw.p50 / ours.p50
    word = "reached" if share >= LEAST_SHARE else "missed"
    return f"{word}: {name}, throughput over the host's own {share:.2f}, target at least {LEAST_SHARE:g}"
