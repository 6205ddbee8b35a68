"""Runs the tables and writes bench/results.md: `python bench/run.py [--quick] [--only S1,S4] [--peer]`.

Needs root, a Docker Engine and our images. Every table has a daemon of the bench's own on the engine; what it makes
carries the bench's name and is removed on the way out, Ctrl-C included.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import d1_daemon
import d2_growth
import e1_run
import e2_stream
import e3_files
import m1_messages
import peer_opensandbox
import profile_spawn
import s1_cold_spawn
import s2_warm_spawn
import s3_burst
import s4_stop
from measure import Table, machine_facts
from rig import Rig, running_rig

RESULTS = Path(__file__).resolve().parent / "results.md"
ROUNDS, QUICK_ROUNDS = 30, 5
# Name, table, share of the rounds it makes when quick: a burst or a restart is long.
SPAWNS: dict[str, Callable[[Rig, int], Table]] = {
    "S1": s1_cold_spawn.measure,
    "S3": s3_burst.measure,
    "S4": s4_stop.measure,
    "E1": e1_run.measure,
    "E2": e2_stream.measure,
    "E3": e3_files.measure,
}
WHOLE: dict[str, Callable[[bool], Table]] = {
    "S2": s2_warm_spawn.measure,
    "M1": m1_messages.measure,
    "D1": d1_daemon.measure,
    "D2": d2_growth.measure,
    "steps": profile_spawn.measure,
}


def main() -> int:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description="isolator's figures, each a ratio inside one run.")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds instead of {ROUNDS}, fewer agents")
    parser.add_argument("--only", default="", help=f"comma-separated, of {', '.join([*SPAWNS, *WHOLE])}")
    parser.add_argument("--peer", action="store_true", help="OpenSandbox's server beside ours; see peer_opensandbox.py")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the file to write")
    chosen = parser.parse_args()
    wanted = {name.strip() for name in chosen.only.split(",") if name.strip()} or {*SPAWNS, *WHOLE}
    if unknown := wanted - {*SPAWNS, *WHOLE}:
        parser.error(f"there is no table {', '.join(sorted(unknown))}")
    rounds = QUICK_ROUNDS if chosen.quick else ROUNDS
    tables: list[Table] = []
    facts: list[str] = []
    try:
        if wanted & SPAWNS.keys() or chosen.peer:
            with running_rig() as rig:
                for name in [name for name in SPAWNS if name in wanted]:
                    say(f"measuring {name}, {rounds} rounds")
                    show(tables, SPAWNS[name](rig, rounds))
                if chosen.peer:
                    say(f"measuring OpenSandbox beside ours, {rounds} rounds")
                    show(tables, peer_opensandbox.measure(rig, rounds))
        for name in [name for name in WHOLE if name in wanted]:
            say(f"measuring {name}")
            show(tables, WHOLE[name](chosen.quick))
        with running_rig(start=False) as rig:
            facts = machine_facts(str(rig.engine.version()["Version"]))
    except RuntimeError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted; what was made is removed, results.md is as it was")
        return 130
    chosen.output.write_text(document(tables, facts, quick=chosen.quick))
    say(f"written to {chosen.output}")
    return 0


def say(text: str) -> None:
    """Progress, beside the tables."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def show(tables: list[Table], table: Table) -> None:
    """Keep and print."""
    tables.append(table)
    print(table.markdown(), flush=True)


def document(tables: list[Table], facts: list[str], *, quick: bool) -> str:
    """The whole of results.md."""
    kind = "quick run: too few rounds to be quoted" if quick else "full run"
    written = f"Written by `bench/run.py` on {time.strftime('%Y-%m-%d')} ({kind})."
    meaning = "docs/performance.md says what each figure means. Ratios are between sides timed in turn in this run."
    head = ["# Results", "", f"{written} {meaning}", "", *(f"- {fact}" for fact in facts), ""]
    return "\n".join(head) + "\n" + "\n".join(table.markdown() for table in tables)


if __name__ == "__main__":
    sys.exit(main())
