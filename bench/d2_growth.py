"""D2: what an idle agent costs the daemon, and whether many of them slow the next spawn.

The daemon runs under instrumented_daemon.py, which adds nothing per agent and writes timers and tasks on request.
The spawns at 10 and at 200 agents lie minutes apart, so each is taken in turn with raw spawns on the same network:
the second ratio divides by what the engine itself got slower by.
"""

from __future__ import annotations

import json
import signal
import time
from dataclasses import dataclass

from d1_daemon import rss, settle
from measure import Samples, Table, milliseconds, verdict
from raw_side import TEAM
from rig import Rig, running_rig, warm_up

MOST_GROWTH, MOST_SLOWER = 100.0, 1.15
FEW = 10
_TEAM_SIZE = 25


@dataclass(frozen=True)
class Footprint:
    """What the daemon holds: memory in MB, and counts."""

    rss: float
    threads: int
    files: int
    timers: int
    tasks: int


def measure(quick: bool) -> Table:
    many, rounds = (40, 5) if quick else (200, 30)
    with running_rig(start=False) as rig:
        rig.start(rig.instrumented(rig.home / "steps.jsonl"))
        rig.await_proof()
        warm_up(rig)
        # Caches, thread pools and the allocator grow with the first spawns, not with agents: fill them first.
        for _ in range(2 * FEW):
            rig.stop(rig.spawn())
        grow(rig, 0, FEW)
        few = footprint(rig)
        ours_few, raw_few = spawns(rig, rounds, f"at {FEW} agents")
        grow(rig, FEW, many)
        lots = footprint(rig)
        ours_many, raw_many = spawns(rig, rounds, f"at {many} agents")
        after = footprint(rig)
    added = many - FEW
    growth = 1000 * (lots.rss - few.rss) / added
    ratio, engine_ratio = ours_many.p50 / ours_few.p50, raw_many.p50 / raw_few.p50
    rows = [
        (
            f"{side.name}",
            f"{milliseconds(side.p50)} ms",
            f"{milliseconds(side.p95)} ms",
            f"{side.p50 / first.p50:.2f}x",
        )
        for side, first in (
            (ours_few, ours_few),
            (ours_many, ours_few),
            (raw_few, raw_few),
            (raw_many, raw_few),
        )
    ]
    rows += [
        ("RSS", f"{few.rss:.1f} MB", f"{lots.rss:.1f} MB", f"{growth:.0f} kB an agent"),
        ("threads", str(few.threads), str(lots.threads), per_agent(lots.threads - few.threads, added)),
        ("open files", str(few.files), str(lots.files), per_agent(lots.files - few.files, added)),
        ("timers of the loop", str(few.timers), str(lots.timers), per_agent(lots.timers - few.timers, added)),
        ("tasks of the loop", str(few.tasks), str(lots.tasks), per_agent(lots.tasks - few.tasks, added)),
    ]
    return Table(
        "D2",
        f"growth from {FEW} to {many} idle agents",
        ("what", f"p50, or at {FEW}", f"p95, or at {many}", "growth"),
        tuple(rows),
        (
            verdict("memory an idle agent", growth, MOST_GROWTH, " kB"),
            verdict(f"spawn p50 at {many} over the one at {FEW}", ratio, MOST_SLOWER),
            verdict("threads an idle agent", (lots.threads - few.threads) / added, 0, ""),
            verdict("timers an idle agent", (lots.timers - few.timers) / added, 0, ""),
            verdict(
                "open files an idle agent (its socket: listening and connected)",
                (lots.files - few.files) / added,
                2,
                "",
            ),
        ),
        (
            f"of which the engine itself (raw spawns): {engine_ratio:.2f}x; without it {ratio / engine_ratio:.2f}x",
            f"RSS after another {rounds} spawns and stops: {after.rss:.1f} MB",
        ),
    )


def grow(rig: Rig, have: int, want: int) -> None:
    """Idle agents, from `have` to `want`, in teams of a size people have."""
    for number in range(have, want):
        rig.spawn(team=f"{TEAM}-idle-{number // _TEAM_SIZE}")
    settle()


def spawns(rig: Rig, rounds: int, when: str) -> tuple[Samples, Samples]:
    """Our spawns and raw ones in turn."""
    ours, raw = Samples(f"isolator spawn {when}"), Samples(f"raw spawn {when}")
    for _ in range(rounds):
        rig.stop(ours.timed(rig.spawn))
        rig.raw.remove(raw.timed(rig.raw.spawn, rig.raw.body()))
    return ours, raw


def footprint(rig: Rig) -> Footprint:
    """What the daemon holds now."""
    settle()
    loop = loop_state(rig)
    daemon = rig.daemon
    return Footprint(rss(rig), daemon.num_threads(), daemon.num_fds(), loop["timers"], loop["tasks"])


def loop_state(rig: Rig, seconds: float = 10) -> dict[str, int]:
    """Timers and tasks of the daemon's loop, as it says on SIGUSR2."""
    output = rig.home / "steps.jsonl"
    size = output.stat().st_size
    rig.daemon.send_signal(signal.SIGUSR2)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with output.open() as file:
            file.seek(size)
            for line in file:
                if line.endswith("\n") and "timers" in (found := json.loads(line)):
                    return dict(found)
        time.sleep(0.02)
    raise RuntimeError("the daemon did not write its loop's state")


def per_agent(grown: int, agents: int) -> str:
    return f"{grown / agents:+.2f} an agent"
