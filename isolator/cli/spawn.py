"""`spawn`: one agent from options, and with `--wait` its whole life."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from isolator.cli.attach import run_to_end
from isolator.cli.progress import Progress
from isolator.cli.reference import TeamReference
from isolator.cli.session import Session, json_option, note, pass_session
from isolator.cli.spawn_options import (
    parse_environment,
    parse_mount,
    parse_secrets,
    parse_workspace,
    read_source,
)
from isolator.cli.text import escape

if TYPE_CHECKING:
    from isolator.client.spawning import Options

_LIMITS: Final = ("cpus", "memory", "pids", "disk", "nofile", "wall")
_PLAIN: Final = ("image", "network", "session", "parent", "ttl", "idle_ttl", "cleanup_grace")


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--team", required=True, type=TeamReference(), help="Its team; created if absent.")
@click.option("--name", help="Its name, unique in the team; default: its id.")
@click.option("--image", help="Image; default: the daemon's default_image.")
@click.option("--workspace", metavar="DIR[:ro]", help="Host folder to appear as /workspace, read-write.")
@click.option("--mount", multiple=True, metavar="SRC:DST[:rw]", help="One more folder or file, read-only.")
@click.option("--env", "-e", multiple=True, metavar="K[=V]", help="Environment variable; K alone takes ours.")
@click.option(
    "--secret",
    multiple=True,
    metavar="NAME[=@FILE|=-]",
    help="Secret as /run/secrets/NAME; bare: the host's.",
)
@click.option("--secret-env", multiple=True, metavar="NAME[=VAR][=@FILE|=-]", help="Secret as environment variable.")
@click.option("--skill", "skills", multiple=True, metavar="NAME", help="Skill to load.")
@click.option("--cpus", type=float, metavar="N", help="CPU cores at most.")
@click.option("--memory", metavar="SIZE", help="Memory at most, such as 512m.")
@click.option("--pids", type=int, metavar="N", help="Processes and threads at most.")
@click.option("--disk", metavar="SIZE", help="Size of /tmp.")
@click.option("--nofile", type=int, metavar="N", help="Open files a process at most.")
@click.option("--wall", type=float, metavar="S", help="Seconds its command may run.")
@click.option("--ttl", type=float, metavar="S", help="Seconds it may live.")
@click.option("--idle-ttl", type=float, metavar="S", help="Seconds it may be idle.")
@click.option("--network", type=click.Choice(["team", "none"]), help="Its team's network, or loopback only.")
@click.option("--session", metavar="KEY", help="The conversation it works for.")
@click.option("--parent", metavar="ID", help="The agent that asked for it.")
@click.option("--cleanup-grace", type=float, metavar="S", help="Seconds its box and logs stay after its end.")
@click.option("--no-create-team", is_flag=True, help="Refuse if the team is absent.")
@click.option("--idempotency-key", metavar="KEY", help="A retry with this key gets the first answer.")
@click.option("--wait", is_flag=True, help="Show its output, wait for its end, exit as it does.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[--] COMMAND...")
@json_option
@pass_session
def spawn(run: Session, /, command: tuple[str, ...], **given: Any) -> None:
    """Start an agent and print its id.

    COMMAND is run as it stands, by no shell. Without one the box stays up and waits.

    With --wait, exits as the agent did (128+N if a signal ended it), and Ctrl-C stops the agent.
    """
    options = _options(given)
    with run.client() as client:
        with Progress(f"starting an agent in team {given['team']}", enabled=not run.json):
            agent = client.spawn(
                given["team"],
                command,
                name=given["name"],
                idempotency_key=given["idempotency_key"],
                **options,
            )
        if not run.json:
            for warning in agent.warnings:
                note(f"isolator: warning: {warning.get('detail') or warning.get('code')}")
        if not given["wait"]:
            run.show(agent.raw, lambda: escape(agent.id))
            return
        final, code = run_to_end(client, agent, copy=not run.json)
    if run.json and final is not None:
        click.echo(json.dumps(final.raw, indent=2))
    sys.exit(code)


def _options(given: dict[str, Any]) -> Options:
    """What was said, in the API's words; what was not said is absent."""
    options: dict[str, Any] = {key: given[key] for key in _PLAIN if given[key] is not None}
    if limits := {key: given[key] for key in _LIMITS if given[key] is not None}:
        options["limits"] = limits
    if given["workspace"] is not None:
        options["workspace"] = parse_workspace(given["workspace"])
    if given["mount"]:
        options["mounts"] = [parse_mount(text) for text in given["mount"]]
    if given["env"]:
        options["env"] = parse_environment(given["env"], dict(os.environ))
    if secrets := parse_secrets(given["secret"], given["secret_env"], read_source):
        options["secrets"] = secrets
    if given["skills"]:
        options["skills"] = list(given["skills"])
    if given["no_create_team"]:
        options["create_team"] = False
    return options  # type: ignore[return-value] # keys are the options' own names
