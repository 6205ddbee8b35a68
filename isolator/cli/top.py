"""`top`: what running agents use of their limits, live on a terminal, or once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import click

from isolator.cli.ending import end_by
from isolator.cli.reference import TeamReference
from isolator.cli.session import Session, json_option, note, pass_session
from isolator.cli.text import age, cut, duration, escape, progress, table, terminal_columns, width
from isolator.model.sizes import format_size

if TYPE_CHECKING:
    from isolator.client import AgentStats, AllStats, Use

_INTERVAL: Final = 2.0
_TIMEOUT: Final = 10.0
_HEADERS: Final = ("NAME", "TEAM", "STATE", "AGE", "CPU", "MEMORY", "PIDS", "TMP", "LEFT", "PROGRESS")
# The first to be cut where the terminal is narrow, and the first to be left out where that is not enough.
_CUT_FIRST: Final = ("PROGRESS", "NAME", "TEAM")
_LEFT_OUT_FIRST: Final = ("STATE", "AGE", "TMP", "TEAM", "LEFT", "PIDS", "PROGRESS")
_NARROWEST: Final = 8
_GAP: Final = 2
_HEAD: Final = 2


@click.command()
@click.option("--team", type=TeamReference(), help="Only this team's.")
@click.option(
    "--interval",
    type=click.FloatRange(0.2, 3600),
    metavar="S",
    help=f"Seconds from one look to the next; default: {_INTERVAL:g}.",
)
@click.option("--once", is_flag=True, help="One table, and end; also where standard output is no terminal.")
@json_option
@pass_session
def top(session: Session, team: str | None, interval: float | None, once: bool) -> None:
    """Show what running agents use of their limits, most CPU first. q or Ctrl-C ends it.

    CPU is a share of the agent's cap. With --json: the API's answer, once; with --interval too, one a line until
    interrupted.
    """
    from isolator.cli.screen import Ended, usable  # noqa: PLC0415 - not for `--help`

    with session.client(timeout=_TIMEOUT) as client:
        look = _look(client.all_stats, team)
        if session.json and interval is not None and not once:
            _print_samples(look, interval)
        elif once or session.json or not usable():
            _print_once(session, look())
        else:
            try:
                _watch(look, interval or _INTERVAL)
            except Ended as ended:
                end_by(ended.number)


def _look(all_stats: Callable[..., AllStats], team: str | None) -> Callable[[], AllStats]:
    return lambda: all_stats(team=team)


def _print_samples(look: Callable[[], AllStats], interval: float) -> None:
    while True:
        click.echo(json.dumps(look().raw))
        time.sleep(interval)


def _print_once(session: Session, stats: AllStats) -> None:
    if not stats.items and not session.json:
        note("No agent runs.")
        return
    session.show(stats.raw, lambda: _table(stats, terminal_columns()))
    if stats.truncated and not session.json:
        note(f"These are {len(stats.items)}; there are more.")


def _watch(look: Callable[[], AllStats], interval: float) -> None:
    """Until q is pressed; a daemon that went away is waited for."""
    from isolator.cli.screen import Screen  # noqa: PLC0415 - as above
    from isolator.client import AnswerTimeout, ConnectionLost, SocketNotFound  # noqa: PLC0415 - loaded anyway

    stats, trouble = look(), ""
    with Screen() as screen:
        due = time.monotonic() + interval
        while True:
            screen.draw(_page(stats, trouble, interval, *screen.size()))
            if "q" in screen.wait(due - time.monotonic()).lower():
                return
            if time.monotonic() < due:
                continue
            try:
                stats, trouble = look(), ""
            except (AnswerTimeout, ConnectionLost, SocketNotFound) as error:
                trouble = error.detail
            due = time.monotonic() + interval


def _page(stats: AllStats, trouble: str, interval: float, columns: int, rows: int) -> list[str]:
    """The screen's lines."""
    number = len(stats.items)
    cores = sum(each.uses["cpu"].used or 0 for each in stats.items)
    head = f"{number}{' and more' if stats.truncated else ''} agent{'' if number == 1 else 's'}, {cores:.2f} cores used"
    head += f"  |  {trouble}" if trouble else f"  |  every {interval:g} s, q quits"
    lines = _table(stats, columns).splitlines() if stats.items else ["No agent runs."]
    if len(lines) > rows - _HEAD:
        over = len(lines) - (rows - _HEAD) + 1
        lines = [*lines[: max(0, rows - _HEAD - 1)], f"… and {over} more"]
    return [cut(escape(line), columns) for line in (head, "", *lines)]


def _table(stats: AllStats, columns: int | None) -> str:
    ordered = sorted(stats.items, key=lambda each: (-(each.uses["cpu"].share or 0), each.team, each.name))
    rows = [_row(each) for each in ordered]
    shown = _fitting(rows, columns)
    headers = [_HEADERS[index] for index in shown]
    flexible = [headers.index(name) for name in _CUT_FIRST if name in headers]
    return table(headers, [[row[index] for index in shown] for row in rows], flexible=flexible, columns=columns)


def _fitting(rows: Sequence[Sequence[str | None]], columns: int | None) -> list[int]:
    """Places of the columns that fit, some of them cut; the less telling ones are left out first."""
    widths = [max([width(header), *(width(escape(row[i])) for row in rows)]) for i, header in enumerate(_HEADERS)]
    shown = list(range(len(_HEADERS)))
    for name in ("", *_LEFT_OUT_FIRST):
        shown = [index for index in shown if _HEADERS[index] != name]
        least = [min(widths[i], _NARROWEST) if _HEADERS[i] in _CUT_FIRST else widths[i] for i in shown]
        if columns is None or sum(least) + _GAP * (len(least) - 1) <= columns:
            break
    return shown


def _row(stats: AgentStats) -> tuple[str | None, ...]:
    uses, told = stats.uses, stats.progress
    return (
        stats.name or stats.agent,
        stats.team,
        stats.state,
        age(stats.started_at),
        _percent(uses["cpu"]),
        " ".join(part for part in (_sizes(uses["memory"]), _percent(uses["memory"])) if part),
        _counts(uses["pids"]),
        _sizes(uses["disk"]),
        _left(uses),
        None if told is None else progress(told.text, told.fraction, told.elapsed),
    )


def _percent(use: Use) -> str | None:
    return None if use.share is None else f"{use.share:.0%}"


def _sizes(use: Use) -> str | None:
    if use.used is None:
        return None
    used = format_size(int(use.used))
    return used if use.limit is None else f"{used}/{format_size(int(use.limit))}"


def _counts(use: Use) -> str | None:
    if use.used is None:
        return None
    return f"{use.used:.0f}" if use.limit is None else f"{use.used:.0f}/{use.limit:.0f}"


def _left(uses: dict[str, Use]) -> str | None:
    """What ends first, and when."""
    ends = [(left, name) for name in ("wall", "ttl") if (left := uses[name].left) is not None]
    return f"{duration(min(ends)[0])} {min(ends)[1]}" if ends else None
