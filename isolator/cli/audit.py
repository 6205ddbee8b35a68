"""`audit search`, `audit verify`: read the record of every act."""

from __future__ import annotations

import json

import click

from isolator.cli.progress import Progress
from isolator.cli.reference import TeamReference
from isolator.cli.session import Session, json_option, pass_session


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
@json_option
@pass_session
def search(session: Session, /, **wanted: str | int | None) -> None:
    """Show the newest entries that match, oldest first."""
    with session.client(timeout=60) as client:
        entries = client.audit(**wanted)  # type: ignore[arg-type] # the options' names are the arguments'
    rows = [
        (
            entry.sequence,
            entry.time,
            entry.actor,
            entry.raw.get("kind"),
            entry.act,
            entry.raw.get("team"),
            entry.raw.get("agent"),
            entry.raw.get("result"),
            json.dumps(detail) if (detail := entry.raw.get("detail")) else None,
        )
        for entry in entries
    ]
    session.show_table(
        {"items": [entry.raw for entry in entries], "next": None},
        ("SEQ", "TIME", "ACTOR", "KIND", "ACT", "TEAM", "AGENT", "RESULT", "DETAIL"),
        rows,
        flexible=(8,),
        empty="No entry matches.",
    )


@audit.command("verify")
@json_option
@pass_session
@click.pass_context
def verify(context: click.Context, session: Session) -> None:
    """Check the log's whole chain; exit 1 if anything was edited, removed or inserted."""
    with session.client() as client, Progress("reading the audit log", enabled=not session.json):
        state = client.verify_audit()
    session.show(
        state.raw,
        lambda: (
            f"ok: {state.entries} entries, head {state.head}"
            if state.ok
            else f"BROKEN after {state.entries} good entries: {state.problem}"
        ),
    )
    if not state.ok:
        context.exit(1)
