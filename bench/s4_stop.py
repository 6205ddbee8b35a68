"""S4: stop and remove a running agent. Our side: DELETE /v1/agents/{id} until its 200 (removed).

The target's raw side kills and removes in two calls; beside it stands one forced remove. Our side is shown without
a grace, as the raw sides have none, and with the default grace for a command that ends at SIGTERM and for one that
ignores it: the last is bounded by the grace, never by the engine's 10 s.
"""

from __future__ import annotations

from measure import SIDE_COLUMNS, Samples, Table, side_by_side, verdict
from rig import Rig

TARGET = 1.10
NEVER = 10.0
_STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(3600)"


def measure(rig: Rig, rounds: int) -> Table:
    ours, raw = Samples("isolator: DELETE ?grace=0"), Samples("raw: kill, then remove")
    forced, polite = Samples("raw: one forced remove"), Samples("isolator: DELETE, command obeys SIGTERM")
    stubborn = Samples("isolator: DELETE, command ignores SIGTERM")
    for _ in range(rounds):
        ours.timed(rig.stop, rig.spawn())
        raw.timed(rig.raw.stop, rig.raw.spawn(rig.raw.body()))
        polite.timed(rig.stop, rig.spawn(), None)
        forced.timed(rig.raw.remove, rig.raw.spawn(rig.raw.body()))
    for _ in range(3):
        agent = rig.spawn(command=["python3", "-c", _STUBBORN])
        rig.await_output(agent, b"up")
        stubborn.timed(rig.stop, agent, None)
    longest = max(stubborn.seconds + polite.seconds + ours.seconds)
    return Table(
        "S4",
        "stop and remove",
        SIDE_COLUMNS,
        side_by_side((ours, raw, forced, polite, stubborn), raw),
        (
            verdict("p50 over raw p50", ours.p50 / raw.p50, TARGET),
            verdict("longest stop of any kind", longest, NEVER, " s"),
        ),
        (f"over one forced remove: {ours.p50 / forced.p50:.2f}x",),
    )
