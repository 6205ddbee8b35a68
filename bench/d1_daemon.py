"""D1: the daemon alone. Memory and CPU while idle, and how long a start takes that has 100 agents to adopt.

There is no raw side; these are absolute, so the fastest start is shown beside the median on a busy machine.
"Ready" is READY=1: the API answers and holds every promised agent. What the engine says is joined beside that,
never before it; its end (`reconciled`) and the network self-test's (`proven`) are shown too.
"""

from __future__ import annotations

import signal
import time

from measure import Samples, Table, milliseconds, verdict
from rig import Rig, running_rig

MOST_RSS, MOST_START, MOST_CPU = 60.0, 1.0, 0.5
_KILLED = signal.SIGKILL


def measure(quick: bool) -> Table:
    agents, restarts, seconds = (20, 3, 5.0) if quick else (100, 10, 20.0)
    empty, full = Samples("start to ready, nothing to adopt"), Samples(f"start to ready, {agents} agents to adopt")
    reconciled, proven = Samples("... to reconciled with the engine"), Samples("... to network proven")
    with running_rig() as rig:
        fresh = rss(rig)
        idle_cpu = cpu_share(rig, seconds)
        for _ in range(restarts):
            rig.end()
            empty.seconds.append(rig.start())
            rig.await_proof()
        for number in range(agents):
            rig.spawn(team=f"bench-{number // 25}")
        settle()
        loaded = rss(rig)
        for _ in range(restarts):
            rig.end(_KILLED)
            began = time.perf_counter()
            full.seconds.append(rig.start())
            await_adopted(rig, agents)
            reconciled.seconds.append(time.perf_counter() - began)
            rig.await_proof()
            proven.seconds.append(time.perf_counter() - began)
            if len(rig.agents()) != agents:
                raise RuntimeError(f"{len(rig.agents())} of {agents} agents run after a restart")
        settle()
        adopted = rss(rig)
        full_cpu = cpu_share(rig, seconds)
        imports = Samples("of which: the interpreter and the daemon's imports")
        for _ in range(restarts):
            imports.timed(rig.import_daemon)
    rows = [
        ("memory of a fresh idle daemon (RSS)", f"{fresh:.1f} MB"),
        (f"memory with {agents} idle agents", f"{loaded:.1f} MB"),
        (f"memory after adopting {agents}", f"{adopted:.1f} MB"),
        (f"CPU while idle over {seconds:.0f} s, no agents", f"{idle_cpu:.2f} % of a core"),
        (f"CPU while idle over {seconds:.0f} s, {agents} agents", f"{full_cpu:.2f} % of a core"),
        *(
            (side.name, f"{milliseconds(side.p50)} ms (fastest {milliseconds(min(side.seconds))})")
            for side in (empty, full, reconciled, proven, imports)
        ),
    ]
    return Table(
        "D1",
        "the daemon alone",
        ("what", "figure"),
        tuple(rows),
        (
            verdict("idle RSS", fresh, MOST_RSS, " MB"),
            verdict(f"start to ready with {agents} agents", full.p50, MOST_START, " s"),
            verdict(f"idle CPU with {agents} agents", full_cpu, MOST_CPU, " %"),
        ),
    )


def rss(rig: Rig) -> float:
    """The daemon's resident memory, MB (10^6 bytes)."""
    return float(rig.daemon.memory_info().rss) / 1e6


def settle() -> None:
    """Let what was asked for last be over."""
    time.sleep(1.0)


def cpu_share(rig: Rig, seconds: float) -> float:
    """Per cent of one core the daemon uses while nobody asks for anything."""
    settle()
    before = rig.daemon.cpu_times()
    time.sleep(seconds)
    after = rig.daemon.cpu_times()
    used = (after.user - before.user) + (after.system - before.system)
    return max(0.0, 100 * used / seconds)


def await_adopted(rig: Rig, agents: int, seconds: float = 60) -> None:
    """Wait for this start's reconcile, which must have found them all.

    It is read from the daemon's log, which costs the daemon nothing while it starts.
    """
    end = time.monotonic() + seconds
    while f"'adopted': {agents}" not in rig.log.rpartition("ready in ")[2]:
        if time.monotonic() > end:
            raise RuntimeError(f"{agents} agents were not adopted:\n{rig.log[-2000:]}")
        time.sleep(0.005)
