"""`ps`, `inspect`, `logs`, `stop`: agents that are there already."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from isolator.cli.output import Style, copy_output
from isolator.cli.progress import Progress
from isolator.cli.reference import AgentReference, TeamReference, find_agent
from isolator.cli.session import Session, json_option, note, pass_session
from isolator.cli.text import age, escape, fields, table, terminal_columns
from isolator.model.sizes import format_size

if TYPE_CHECKING:
    from isolator.client import Agent


def describe_state(agent: Agent) -> str:
    """State and, for one that ended, how: `running`, `exited (0)`, `exited (oom)`, `removed (signal 9)`."""
    if agent.exit is None:
        return agent.state
    if agent.exit.reason != "exited":
        how = agent.exit.reason
    elif agent.exit.signal:
        how = f"signal {agent.exit.signal}"
    else:
        how = str(agent.exit.code)
    return f"{agent.state} ({how})"


@click.command()
@click.option("--team", type=TeamReference(), help="Only this team's.")
@click.option(
    "--state",
    type=click.Choice(["creating", "running", "exited", "stopping", "removed", "lost"]),
    help="Only those in this state.",
)
@click.option("--session", "conversation", metavar="KEY", help="Only those of this session.")
@click.option("-a", "--all", "removed", is_flag=True, help="Removed ones too.")
@click.option("--pool", is_flag=True, help="Instead of agents, boxes that wait for one.")
@click.option("-q", "--quiet", is_flag=True, help="Ids only.")
@json_option
@pass_session
def ps(
    session: Session,
    team: str | None,
    state: str | None,
    conversation: str | None,
    removed: bool,
    pool: bool,
    quiet: bool,
) -> None:
    """List agents."""
    if pool:
        if state or conversation or removed:
            raise click.UsageError("--pool goes with --team and --quiet only: a box that waits has nothing else.")
        _list_pool(session, team, quiet=quiet)
        return
    with session.client() as client:
        agents = client.agents(team=team, state=state, session=conversation, removed=removed)
    if quiet and not session.json:
        for agent in agents:
            click.echo(escape(agent.id))
        return
    rows = [
        (
            agent.id,
            agent.name if agent.name != agent.id else None,
            agent.team,
            describe_state(agent),
            age(agent.created_at),
            agent.image,
            " ".join(agent.command),
        )
        for agent in agents
    ]
    session.show_table(
        {"items": [agent.raw for agent in agents], "next": None},
        ("ID", "NAME", "TEAM", "STATE", "AGE", "IMAGE", "COMMAND"),
        rows,
        flexible=(6, 5, 1, 2),
        empty="No agents. Start one: isolator spawn --team T -- COMMAND",
    )


def _list_pool(session: Session, team: str | None, *, quiet: bool) -> None:
    with session.client() as client:
        boxes = [box for box in client.pool() if team in (None, box.team)]
    if quiet and not session.json:
        for box in boxes:
            click.echo(escape(box.id))
        return
    session.show_table(
        {"items": [box.raw for box in boxes], "next": None},
        ("ID", "TEAM", "PROFILE", "AGE", "IMAGE", "CONTAINER"),
        [(box.id, box.team, box.profile, age(box.created_at), box.image, box.container_id[:12]) for box in boxes],
        flexible=(4, 1),
        empty="No boxes wait. The setting pool_depth says how many do, once a team has spawned an agent.",
    )


@click.command()
@click.argument("agent", type=AgentReference())
@json_option
@pass_session
def inspect(session: Session, agent: str) -> None:
    """Show one agent: what it was given, how it ended, and what its box enforces."""
    with session.client() as client:
        found = find_agent(client, agent)
    session.show(found.raw, lambda: _describe(found))


def _describe(agent: Agent) -> str:
    limits = agent.limits
    sizes = {key: format_size(value) for key, value in limits.items() if key in ("memory", "disk") and value}
    caps = ", ".join(f"{key} {sizes.get(key, value)}" for key, value in limits.items() if value is not None)
    whole = fields(
        [
            ("id", agent.id),
            ("name", agent.name),
            ("team", agent.team),
            ("owner", agent.owner),
            ("session", agent.session),
            ("parent", agent.parent),
            ("state", describe_state(agent)),
            ("ended", agent.exit.detail if agent.exit else None),
            ("command", " ".join(agent.command) or "(none: the box waits)"),
            ("image", f"{agent.image} ({agent.image_digest})"),
            ("backend", agent.backend),
            ("container", agent.container_id),
            ("box", "waited for it (warm)" if agent.raw.get("warm") else "was built for it (cold)"),
            ("pid", agent.pid),
            ("uid", agent.raw.get("uid")),
            ("network", agent.network),
            ("limits", caps),
            ("created", agent.created_at),
            ("started", agent.started_at),
            ("finished", agent.finished_at),
            ("expires", agent.expires_at),
        ]
    )
    parts = [whole]
    columns = terminal_columns()
    if agent.mounts:
        rows = [(each.get("target"), each.get("mode"), each.get("source")) for each in agent.mounts]
        parts.append(table(("MOUNT", "MODE", "FROM"), rows, columns=columns))
    if secrets := agent.raw.get("secrets"):
        parts.append(table(("SECRET", "AS"), [(each.get("name"), each.get("as")) for each in secrets]))
    if agent.receipt:
        receipt = [(name, "held" if each.held else "NOT HELD", each.how) for name, each in agent.receipt.items()]
        parts.append(table(("GUARANTEE", "", "HOW"), receipt, flexible=(2,), columns=columns))
    parts.extend(f"warning: {escape(each.get('detail') or each.get('code'))}" for each in agent.warnings)
    return "\n\n".join(parts)


@click.command()
@click.argument("agent", type=AgentReference())
@click.option("-f", "--follow", is_flag=True, help="Go on until it ends.")
@click.option("-n", "--tail", type=click.IntRange(min=0), metavar="LINES", help="Only the last lines.")
@click.option("--escape", "escaped", is_flag=True, help="Show control characters as codes: for hostile output.")
@json_option
@pass_session
def logs(session: Session, agent: str, follow: bool, tail: int | None, escaped: bool) -> None:
    """Show an agent's output: its stdout on stdout, its stderr on stderr, bytes unchanged.

    With --json each piece is a line {"stream", "data"}, data in base64.
    """
    with session.client() as client:
        found = find_agent(client, agent)
        style: Style = "json" if session.json else "escaped" if escaped else "raw"
        copy_output(client.logs(found.id, follow=follow, tail=tail), style)


@click.command()
@click.argument("agents", type=AgentReference(), nargs=-1, required=True, metavar="AGENT...")
@click.option("--grace", type=click.FloatRange(min=0), metavar="S", help="Seconds between asking and killing.")
@json_option
@pass_session
def stop(session: Session, agents: tuple[str, ...], grace: float | None) -> None:
    """Stop agents: ask, wait for the grace, kill, remove the box."""
    with session.client() as client:
        # All are looked up first, so that a misspelt one stops nothing.
        found = {agent.id: agent for agent in (find_agent(client, text) for text in agents)}
        stopped = []
        for agent in found.values():
            with Progress(f"stopping {agent.name or agent.id}", enabled=not session.json):
                stopped.append(client.stop(agent.id, grace))
            if not session.json:
                click.echo(escape(agent.id))
    if session.json:
        session.show({"items": [agent.raw for agent in stopped], "next": None}, str)
    for agent in stopped:
        if agent.live:
            note(f"{agent.id} is still {agent.state}.")
