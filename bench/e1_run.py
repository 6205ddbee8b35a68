"""E1: a small command in a running box. Our side: POST …/run of `/bin/true` until its answer is read, on an open
connection, its audit line durable before it runs.

The raw side: the same through the Docker SDK, `exec_create`, `exec_start` and `exec_inspect` for the exit code, in a
container of the same image and caps, over a connection that is open already.
"""

from __future__ import annotations

from typing import Any

from measure import SIDE_COLUMNS, Samples, Table, side_by_side, verdict
from rig import Rig

TARGET = 1 / 15
COMMAND = ["/bin/true"]
# A run is short beside a spawn: enough of them that one pause of the machine is no figure.
REPEATED = 10


def run(rig: Rig, agent: str) -> None:
    status, answer = rig.api.ask("POST", f"/v1/agents/{agent}/run", {"command": COMMAND})
    if status != 200 or answer["exit_code"] != 0:
        raise RuntimeError(f"the run was answered {status}: {answer}")


def raw_exec(engine: Any, container: str) -> None:
    made = engine.exec_create(container, COMMAND)["Id"]
    engine.exec_start(made)
    if engine.exec_inspect(made)["ExitCode"] != 0:
        raise RuntimeError("the engine's exec failed")


def measure(rig: Rig, rounds: int) -> Table:
    ours, raw = Samples("isolator: run, request to answer"), Samples("raw: docker exec through the SDK")
    agent, container = rig.spawn(), rig.raw.spawn(rig.raw.body())
    try:
        for _ in range(5):
            run(rig, agent)
            raw_exec(rig.engine, container)
        for _ in range(rounds):
            for _ in range(REPEATED):
                ours.timed(run, rig, agent)
            raw.timed(raw_exec, rig.engine, container)
    finally:
        rig.stop(agent)
        rig.raw.remove(container)
    return Table(
        "E1",
        'run ["/bin/true"]',
        SIDE_COLUMNS,
        side_by_side((ours, raw), raw),
        (verdict("p50 over raw p50", ours.p50 / raw.p50, round(TARGET, 4)),),
    )
