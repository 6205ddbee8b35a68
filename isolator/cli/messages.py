"""`send` and `messages`: to an agent, and from it."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from isolator.cli.reference import AgentReference, find_agent
from isolator.cli.session import Session, json_option, pass_session
from isolator.cli.text import escape


@click.command()
@click.argument("agent", type=AgentReference())
@click.argument("kind", metavar="TYPE")
@click.argument("body", metavar="[JSON]", required=False)
@click.option("--ttl", type=click.FloatRange(0, 86_400, min_open=True), metavar="SECONDS", help="How long it is kept.")
@click.option(
    "--wait", type=click.FloatRange(0, 60), default=0.0, metavar="SECONDS", help="Until nothing more becomes of it."
)
@json_option
@pass_session
def send(session: Session, agent: str, kind: str, body: str | None, ttl: float | None, wait: float) -> None:
    """Send a message to an agent; JSON is its body, - reads it from standard input. Prints what became of it."""
    value = None if body is None else _parsed(sys.stdin.read() if body == "-" else body)
    with session.client() as client:
        state = client.send_message(find_agent(client, agent).id, kind, value, ttl=ttl, wait=wait)
    click.echo(json.dumps({"state": state}) if session.json else escape(state))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"The body is no JSON: {error}. A text needs quotes of its own: '\"hello\"'.") from None


@click.command()
@click.argument("agent", type=AgentReference())
@json_option
@pass_session
def messages(session: Session, agent: str) -> None:
    """Show what an agent sends to its gateway, as it comes, until it is removed; with --json one message a line.

    What is shown counts as received, and comes to nobody else.
    """
    with session.client() as client, client.messages(find_agent(client, agent).id) as stream:
        for message in stream:
            if session.json:
                click.echo(json.dumps(message.raw))
            else:
                body = json.dumps(message.body, ensure_ascii=False)
                click.echo("  ".join(escape(part) for part in (message.sent_at, message.type, body)))
