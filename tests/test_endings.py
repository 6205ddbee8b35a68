"""How an ending is told: the whole table, since people act on it. Pure."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_store import SPEC

from isolator.agents.endings import decide_exit
from isolator.agents.live import Report, weight_of
from isolator.backends.base import Box
from isolator.model.agent import Exit

GONE = None


def ended_box(code: int | None, *, oom: bool = False) -> Box:
    return Box("id", "agent", "team", "daemon", "spec", "exited", exit_code=code, oom_killed=oom)


@pytest.mark.parametrize(
    ("report", "box", "cause", "expected"),
    [
        # The guest's word counts, whatever the engine says of PID 1.
        (Report(0, 0, 0), ended_box(0), None, (0, None, "exited")),
        (Report(3, 0, 0), ended_box(3), None, (3, None, "exited")),
        (Report(255, 0, 0), ended_box(125), None, (255, None, "exited")),
        (Report(0, 11, 0), ended_box(139), None, (139, 11, "killed")),
        (Report(0, 9, 0), ended_box(137), None, (137, 9, "killed")),
        (Report(0, 9, 0), GONE, None, (137, 9, "killed")),
        # Killed by the kernel for memory, or by a shell that says so in its exit code.
        (Report(0, 9, 1), ended_box(137), None, (137, 9, "oom")),
        (Report(137, 0, 2), ended_box(137), None, (137, 9, "oom")),
        (Report(137, 0, 0), ended_box(137), None, (137, None, "exited")),
        # Children were killed for memory, the command lived on: it exited, and a detail tells of the children.
        (Report(0, 0, 3), ended_box(0), None, (0, None, "exited")),
        (Report(0, 15, 1), ended_box(143), None, (143, 15, "killed")),
        # Without a word of the guest, the engine's.
        (None, ended_box(0), None, (0, None, "exited")),
        (None, ended_box(7), None, (7, None, "exited")),
        (None, ended_box(137), None, (137, 9, "killed")),
        (None, ended_box(137, oom=True), None, (137, 9, "oom")),
        (None, ended_box(128 + 65), None, (193, None, "exited")),
        (None, ended_box(255), None, (255, None, "exited")),
        # What we did ourselves comes first: our own SIGKILL is no memory kill.
        (None, ended_box(137), "wall", (137, 9, "wall")),
        (None, ended_box(137, oom=True), "ttl", (137, 9, "ttl")),
        (Report(0, 0, 0), ended_box(0), "killed", (0, None, "killed")),
        (Report(4, 0, 0), GONE, "killed", (4, None, "killed")),
        # Nobody knows.
        (None, GONE, None, (None, None, "lost")),
        (None, GONE, "ttl", (None, None, "ttl")),
        (None, ended_box(None), None, (None, None, "lost")),
    ],
)
def test_an_ending_is_told_as_it_was(report, box, cause, expected) -> None:
    ending = decide_exit(report, box, cause, None)
    assert (ending.code, ending.signal, ending.reason) == expected


def test_the_detail_says_what_a_person_wants_to_know() -> None:
    assert decide_exit(None, None, None, None) == Exit(None, None, "lost", "The box vanished from the engine.")
    assert decide_exit(Report(0, 9, 1), None, None, None).detail == "It used more memory than its limit."
    assert "killed 3 of its processes" in (decide_exit(Report(0, 0, 3), None, None, None).detail or "")
    assert decide_exit(Report(0, 9, 0), None, "wall", "limits.wall was reached.").detail == "limits.wall was reached."
    assert decide_exit(Report(0, 0, 0), None, None, None).detail is None


def test_a_wide_character_makes_the_whole_text_heavy() -> None:
    """Memory is what 1000 agents could exhaust, and Python takes four bytes a character for the sake of one."""
    narrow = weight_of(replace(SPEC, command=("x" * 100_000,)))
    wide = weight_of(replace(SPEC, command=("x" * 99_999 + "\N{PILE OF POO}",)))
    assert 100_000 < narrow < 110_000
    assert 400_000 < wide < 410_000
