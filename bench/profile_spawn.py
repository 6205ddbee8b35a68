"""Where a spawn's and a stop's time goes, step by step, from a daemon whose steps are timed.

Steps nest: a step's own time is what is left when the steps inside it are taken away; the rows show the whole. The
raw side is taken in turn in the same run, so that "beyond raw" is a difference of figures from the same minutes.
The timing itself costs some microseconds a step, which is why no target is judged by this table.
"""

from __future__ import annotations

import json
from pathlib import Path

from measure import Samples, Table, milliseconds
from rig import Rig, running_rig, warm_up


def measure(quick: bool) -> Table:
    rounds = 8 if quick else 40
    with running_rig(start=False) as rig:
        output = rig.home / "steps.jsonl"
        rig.start(rig.instrumented(output))
        rig.await_proof()
        warm_up(rig)
        ours, stop = Samples("spawn, as the client sees it"), Samples("stop, as the client sees it")
        create, start = Samples("raw create"), Samples("raw start")
        steps: dict[tuple[str, str], Samples] = {}
        for _ in range(rounds):
            before = output.stat().st_size
            agent = ours.timed(rig.spawn)
            collect(steps, "spawn", output, before)
            before = output.stat().st_size
            stop.timed(rig.stop, agent)
            collect(steps, "stop", output, before)
            raw(rig, create, start)
    floor = create.p50 + start.p50
    rows = [(side.name, "", milliseconds(side.p50), milliseconds(side.p95)) for side in (ours, create, start, stop)]
    rows += [
        (f"{act}: {side.name}", f"{len(side.seconds) / rounds:.0f}", milliseconds(side.p50), milliseconds(side.p95))
        for (act, _), side in steps.items()
    ]
    return Table(
        "steps",
        "where a spawn's time goes",
        ("step", "times", "p50 ms", "p95 ms"),
        tuple(rows),
        (),
        (f"beyond raw create + start ({milliseconds(floor)} ms): {milliseconds(ours.p50 - floor)} ms",),
    )


def collect(steps: dict[tuple[str, str], Samples], act: str, output: Path, offset: int) -> None:
    """Keep what each step took, in the order the steps began."""
    with output.open() as file:
        file.seek(offset)
        entries = [json.loads(line) for line in file]
    for entry in sorted((entry for entry in entries if "step" in entry), key=lambda entry: entry["at"]):
        steps.setdefault((act, entry["step"]), Samples(entry["step"])).seconds.append(entry["took"])


def raw(rig: Rig, create: Samples, start: Samples) -> None:
    """One raw create and start, timed apart."""
    made = create.timed(rig.engine.create_container_from_config, rig.raw.body())["Id"]
    rig.raw.made.append(made)
    start.timed(rig.engine.start, made)
    rig.raw.remove(made)
