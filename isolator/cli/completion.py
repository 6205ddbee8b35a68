"""`completion`: the script that makes a shell complete commands, options, teams and agents."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from isolator.cli.session import json_option


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the shell's completion script, to be sourced by its start file.

    For bash: echo 'eval "$(isolator completion bash)"' >> ~/.bashrc
    """
    kind = get_completion_class(shell)
    if kind is None:  # pragma: no cover - click has all three
        raise click.UsageError(f"no completion for {shell}")
    click.echo(kind(context.find_root().command, {}, "isolator", "_ISOLATOR_COMPLETE").source())
