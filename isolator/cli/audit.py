"""`audit search`, `audit verify`: read the record of every act, through the daemon or where it lies."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from isolator.cli.progress import Progress
from isolator.cli.reference import TeamReference
from isolator.cli.session import Failure, Session, json_option, pass_session

folder_option = click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Read the log in this folder instead, without the daemon: its own (as root), or a copy.",
)


@click.group()
def audit() -> None:
    """Search and verify the hash-chained record of every act."""


@audit.command("search")
@click.option("--act", help="Only this act, such as agent.spawn; agent finds all that begin with agent.")
@click.option("--actor", metavar="OWNER", help="Only this actor's, such as uid:1000.")
@click.option("--team", type=TeamReference(), help="Only about this team.")
@click.option("--agent", metavar="ID", help="Only about this agent.")
@click.option("--since", metavar="TIME", help="From then on, RFC 3339 in UTC: 2026-01-31T12:00:00Z.")
@click.option("--until", metavar="TIME", help="Up to then.")
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="How many, newest.")
@folder_option
@json_option
@pass_session
def search(session: Session, /, folder: Path | None, **wanted: Any) -> None:
    """Show the newest entries that match, oldest first."""
    if folder is not None:
        entries = _search_folder(folder, **wanted)
    else:
        with session.client(timeout=60) as client:
            entries = [entry.raw for entry in client.audit(**wanted)]
    columns = ("seq", "time", "actor", "kind", "act", "team", "agent", "result")
    rows = [
        (
            *(entry.get(column) for column in columns),
            json.dumps(detail) if (detail := entry.get("detail")) else None,
        )
        for entry in entries
    ]
    session.show_table(
        {"items": entries, "next": None},
        ("SEQ", "TIME", "ACTOR", "KIND", "ACT", "TEAM", "AGENT", "RESULT", "DETAIL"),
        rows,
        flexible=(8,),
        empty="No entry matches.",
    )


@audit.command("verify")
@folder_option
@json_option
@pass_session
@click.pass_context
def verify(context: click.Context, session: Session, folder: Path | None) -> None:
    """Check the log's whole chain; exit 1 if anything was edited, removed or inserted."""
    with Progress("reading the audit log", enabled=not session.json):
        if folder is not None:
            state = _verify_folder(folder)
        else:
            with session.client() as client:
                state = client.verify_audit().raw
    session.show(
        state,
        lambda: (
            f"ok: {state['entries']} entries, head {state['head']}"
            if state["ok"]
            else f"BROKEN after {state['entries']} good entries: {state['problem']}"
        ),
    )
    if not state["ok"]:
        context.exit(1)


def _search_folder(folder: Path, **wanted: Any) -> list[dict[str, Any]]:
    from isolator.audit.log import LOG_FILE  # noqa: PLC0415 - without the daemon only
    from isolator.audit.reading import Query, moment_text  # noqa: PLC0415 - as above
    from isolator.audit.reading import search as search_file  # noqa: PLC0415 - as above

    for name in ("since", "until"):
        if wanted[name] is not None:
            try:
                wanted[name] = moment_text(wanted[name])
            except (ValueError, OverflowError):
                raise click.BadParameter("name a moment such as 2030-01-31T12:00:00Z", param_hint=f"--{name}") from None
    with _readable(folder):
        return search_file(folder / LOG_FILE, Query(**wanted))


def _verify_folder(folder: Path) -> dict[str, Any]:
    from isolator.audit.reading import verify_folder  # noqa: PLC0415 - as above

    with _readable(folder):
        return verify_folder(folder).answer()


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failure(f"The log in {folder} can't be read: {error.strerror}. Are you root?") from error
