"""S2: a warm spawn. Ours: POST /v1/agents, with a workspace and a secret, until the 201 that says the command runs.

The pool is filled again between rounds, so every measured spawn finds a box. Two other sides, in turn with ours: the
Docker SDK's create and start of the same HostConfig, the workspace's mount included, on the same network; and a bare
process sandbox, `bwrap --unshare-all` from its start to the end of `true` in it, with the host's root read-only: no
caps, no filter, no network, no secrets, nothing checked, nothing kept.
"""

from __future__ import annotations

import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

from measure import SIDE_COLUMNS, Samples, Table, side_by_side, verdict
from rig import Rig, running_rig, warm_up

RATIO, RATIO_P95, SANDBOX = 2.0, 4.0, 0.8
_SECRETS = [{"name": "token", "value": "0123456789abcdef"}]


def measure(quick: bool) -> Table:
    rounds = 5 if quick else 30
    with running_rig(start=False) as rig:
        rig.start(ISOLATOR_POOL_DEPTH="1")
        rig.await_proof()
        warm_up(rig)
        workspace = make_workspace(rig)
        more = {"workspace": {"source": str(workspace)}, "secrets": _SECRETS}
        ours, raw = Samples("isolator: request to 201, from the pool"), Samples("raw: create + start")
        sandbox = Samples("bare bubblewrap: start to the end of `true`")
        bubblewrap = shutil.which("bwrap")
        for number in range(rounds + 3):
            await_pool(rig)
            sides = (ours, raw, sandbox) if number >= 3 else (Samples(""), Samples(""), Samples(""))
            agent = sides[0].timed(partial(rig.spawn, **more))
            must_be_warm(rig, agent)
            rig.stop(agent)
            rig.raw.remove(sides[1].timed(rig.raw.spawn, with_workspace(rig, workspace)))
            if bubblewrap is not None:
                sides[2].timed(run_sandbox, bubblewrap)
    compared = [ours, raw] + ([sandbox] if sandbox.seconds else [])
    verdicts = [
        verdict("p50 over raw p50", 100 * ours.p50 / raw.p50, RATIO, " %"),
        verdict("p95 over raw p95", 100 * ours.p95 / raw.p95, RATIO_P95, " %"),
    ]
    notes = [f"raw p50 over ours: {raw.p50 / ours.p50:.0f}"]
    if sandbox.seconds:
        verdicts.append(verdict("p50 over bare bubblewrap's", ours.p50 / sandbox.p50, SANDBOX))
    else:
        notes.append("no bwrap on this machine: apt-get install bubblewrap")
    return Table(
        "S2",
        "warm spawn, hardened, team network, workspace and secret",
        SIDE_COLUMNS,
        side_by_side(compared, raw),
        tuple(verdicts),
        tuple(notes),
    )


def make_workspace(rig: Rig) -> Path:
    """A folder of the agents' uid below the root."""
    folder = rig.roots / "warm"
    folder.mkdir()
    os.chown(folder, 10001, 10001)
    return folder


def with_workspace(rig: Rig, workspace: Path) -> dict[str, Any]:
    """The raw body with the workspace's mount."""
    body = rig.raw.body()
    mounts = body["HostConfig"]["Mounts"]
    mounts.append({**mounts[0], "Source": str(workspace), "Target": "/workspace", "ReadOnly": False})
    return body


def await_pool(rig: Rig, seconds: float = 20) -> None:
    """Wait until a box waits for the next spawn, and the machine is quiet again."""
    end = time.monotonic() + seconds
    while not rig.api.ask("GET", "/v1/pool")[1]["items"]:
        if time.monotonic() > end:
            raise RuntimeError(f"the pool was not filled\n{rig.log[-2000:]}")
        time.sleep(0.05)
    time.sleep(0.2)


def must_be_warm(rig: Rig, agent: str) -> None:
    if not rig.api.ask("GET", f"/v1/agents/{agent}")[1]["warm"]:
        raise RuntimeError("a spawn found no box; the figure would be another's")


def run_sandbox(program: str) -> None:
    """As a program would start it that wants no more of it."""
    argv = [program, "--unshare-all", "--ro-bind", "/", "/", "true"]
    if os.waitpid(os.posix_spawn(program, argv, os.environ), 0)[1] != 0:
        raise RuntimeError("bubblewrap could not start")
