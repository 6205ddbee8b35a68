"""`events`: what happens, as it happens; a broken connection is resumed without a gap."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from isolator.cli.reference import AgentReference, TeamReference, find_agent
from isolator.cli.session import Session, json_option, pass_session
from isolator.cli.text import escape, progress

if TYPE_CHECKING:
    from isolator.client import Event


@click.command()
@click.option("--after", type=click.IntRange(min=0), metavar="ID", help="Go on after this event.")
@click.option("--follow/--no-follow", default=True, help="Go on with what happens from now, or end.")
@click.option("--team", type=TeamReference(), help="Only this team's.")
@click.option("--agent", type=AgentReference(), help="Only this agent's.")
@json_option
@pass_session
def events(session: Session, after: int | None, follow: bool, team: str | None, agent: str | None) -> None:
    """Show what happens; with --json one event a line."""
    with session.client() as client:
        identifier = find_agent(client, agent).id if agent else None
        with client.events(after, follow=follow, team=team, agent=identifier) as stream:
            for event in stream:
                click.echo(json.dumps(event.raw) if session.json else _line(event))


def _line(event: Event) -> str:
    where = "/".join(part for part in (event.team, event.agent) if part)
    data = _data(event)
    return "  ".join(escape(part) for part in (str(event.id), event.time, event.type, where, data) if part)


def _data(event: Event) -> str:
    from isolator.client import Progress  # noqa: PLC0415 - loaded with the client anyway

    told = Progress.from_answer(event.data) if event.type == "agent.progress" else None
    if told is not None:
        return progress(told.text, told.fraction, told.elapsed)
    return " ".join(f"{key}={_value(value)}" for key, value in event.data.items() if value is not None)


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
