"""Figures and how they are written down: samples, quantiles, ratios, verdicts, tables, facts of the machine.

Machines that run this are noisy, so no figure is printed alone: each is a ratio of two sides that were timed in
turn (A B A B ...) in one run, beside the medians and the 95th percentiles it comes from.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass
class Samples:
    """Times of one side, seconds, in the order they were taken."""

    name: str
    seconds: list[float] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        """The sample below which `share` of all lie (nearest rank), seconds."""
        ranked = sorted(self.seconds)
        return ranked[min(len(ranked) - 1, max(0, round(share * len(ranked) + 0.5) - 1))]

    @property
    def p50(self) -> float:
        """The median, seconds."""
        return statistics.median(self.seconds)

    @property
    def p95(self) -> float:
        """The 95th percentile, seconds."""
        return self.quantile(0.95)

    def timed(self, act: Callable[..., Result], *arguments: Any) -> Result:
        """Run `act(*arguments)`, keep how long it took, return what it returned."""
        # A collection of the bench's own garbage belongs to neither side.
        gc.disable()
        try:
            began = time.perf_counter()
            result = act(*arguments)
            self.seconds.append(time.perf_counter() - began)
        finally:
            gc.enable()
        return result


@dataclass(frozen=True)
class Table:
    """One printed table. `verdicts` are whole lines that start with "reached" or "missed"."""

    key: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    verdicts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The table as a section of results.md."""
        lines = [f"## {self.key}: {self.title}", ""]
        lines.append("| " + " | ".join(self.columns) + " |")
        lines.append("|" + "|".join([" --- ", *[" ---: " for _ in self.columns[1:]]]) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        lines.append("")
        lines += [f"- **{line}**" for line in self.verdicts]
        lines += [f"- {line}" for line in self.notes]
        return "\n".join(lines) + "\n"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, three digits that matter."""
    value = seconds * 1000
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def side_by_side(sides: Sequence[Samples], raw: Samples) -> tuple[tuple[str, ...], ...]:
    """A row a side: name, rounds, p50, p95, and the ratio of its p50 to the raw side's."""
    return tuple(
        (
            side.name,
            str(len(side.seconds)),
            milliseconds(side.p50),
            milliseconds(side.p95),
            f"{side.p50 / raw.p50:.2f}x",
        )
        for side in sides
    )


SIDE_COLUMNS = ("side", "rounds", "p50 ms", "p95 ms", "p50 / raw p50")


def verdict(name: str, value: float, most: float, unit: str = "x") -> str:
    """`reached` or `missed`, with the figure and the target."""
    word = "reached" if value <= most else "missed"
    return f"{word}: {name} {value:.2f}{unit}, target at most {most:g}{unit}"


def machine_facts(engine_version: str) -> list[str]:
    """What a reader needs to judge absolute times: cores, kernel, engine, load."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    return [
        f"{os.cpu_count()} cores ({model}), {memory:.0f} GiB, Linux {platform.release()}",
        f"Docker Engine {engine_version}, Python {platform.python_version()}",
        f"load average when this was written: {load}",
    ]
