"""`team create`, `team ls`, `team rm`."""

from __future__ import annotations

import click

from isolator.cli.progress import Progress
from isolator.cli.reference import TeamReference
from isolator.cli.session import Session, json_option, pass_session
from isolator.cli.text import age, escape


@click.group()
def team() -> None:
    """Create, list and remove teams: agents that share one network and one owner."""


@team.command("create")
@click.argument("name")
@json_option
@pass_session
def create(session: Session, name: str) -> None:
    """Create a team; it is yours."""
    with session.client(timeout=90) as client, Progress(f"creating team {name}", enabled=not session.json):
        created = client.create_team(name)
    session.show(created.raw, lambda: escape(created.id))


@team.command("ls")
@json_option
@pass_session
def ls(session: Session) -> None:
    """List your teams."""
    with session.client() as client:
        teams = client.teams()
    session.show_table(
        {"items": [each.raw for each in teams], "next": None},
        ("TEAM", "OWNER", "AGENTS", "SUBNET", "NETWORK", "AGE"),
        [(each.id, each.owner, _count(each.agents), each.subnet, each.network, age(each.created_at)) for each in teams],
        flexible=(4,),
        empty="No teams. A spawn creates the one it names, or: isolator team create NAME",
    )


@team.command("rm")
@click.argument("names", nargs=-1, required=True, type=TeamReference(), metavar="TEAM...")
@json_option
@pass_session
def rm(session: Session, names: tuple[str, ...]) -> None:
    """Remove teams with all their agents and their networks."""
    removed = {}
    with session.client() as client:
        for name in names:
            with Progress(f"removing team {name} and its agents", enabled=not session.json):
                removed[name] = client.remove_team(name)
            if not session.json:
                agents = len(removed[name])
                click.echo(f"{escape(name)} ({agents} agent{'' if agents == 1 else 's'} removed)")
    if session.json:
        items = [{"id": name, "removed_agents": agents} for name, agents in removed.items()]
        session.show({"items": items, "next": None}, str)


def _count(agents: object) -> str | None:
    return str(len(agents)) if isinstance(agents, list) else None if agents is None else str(agents)
