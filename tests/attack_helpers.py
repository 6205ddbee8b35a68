"""Runs the programs of tests/attacks inside a box and reads what they printed.

Each program prints one line of JSON as its last line: what it tried and how it went. Judging is the tests' part, so
that the same program shows a "can" in one place and a "cannot" in another.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from conftest import RunningDaemon, wait_for

from isolator.model.agent import Agent
from isolator.store.records import load_agent

PROGRAMS = Path(__file__).parent / "attacks"


def program(name: str, /, *arguments: Any) -> list[str]:
    """The argv that runs a program of tests/attacks; arguments that are no text are given as JSON."""
    words = [item if isinstance(item, str) else json.dumps(item) for item in arguments]
    return ["python3", "-c", (PROGRAMS / f"{name}.py").read_text(), *words]


def attack(daemon: RunningDaemon, attack_name: str, /, *arguments: Any, **body: Any) -> dict[str, Any]:
    """Run a program in a new box to its end; what its last line says."""
    body.setdefault("team", team(daemon))
    ended, output = daemon.run(*program(attack_name, *arguments), **body)
    assert ended["exit"]["reason"] == "exited", (ended["exit"], output)
    assert ended["exit"]["code"] == 0, output
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def team(daemon: RunningDaemon, prefix: str = "attack") -> str:
    """A team's name that no other daemon on this engine uses: networks are the engine's, not the daemon's."""
    return f"{prefix}-{daemon.instance[-8:]}"


def said(daemon: RunningDaemon, agent: dict[str, Any], word: str, seconds: float = 20) -> str:
    """The agent's output once it holds `word`."""

    def look() -> str:
        output = daemon.output(agent)
        return output if word in output else ""

    found: str = wait_for(look, seconds, lambda: f"never said {word!r}: {daemon.output(agent)[-2000:]}")
    return found


def promised(daemon: RunningDaemon, agent_id: str) -> Agent:
    """The record as the daemon's database holds it."""
    with sqlite3.connect(f"file:{daemon.home}/state/isolator.db?mode=ro", uri=True) as connection:
        (text,) = connection.execute("SELECT record FROM agent WHERE id = ?", (agent_id,)).fetchone()
    connection.close()
    return load_agent(text)


def audit_entries(daemon: RunningDaemon) -> list[dict[str, Any]]:
    """Every entry of the daemon's audit log, oldest first."""
    lines = []
    for file in sorted((daemon.home / "state" / "audit").glob("*.jsonl")):
        lines += file.read_text().splitlines()
    return [json.loads(line) for line in lines]
