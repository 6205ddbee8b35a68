"""`daemon`: the daemon itself, in the foreground."""

from __future__ import annotations

import os
from pathlib import Path

import click

from isolator.cli.config import misspelt, settings_or_failure
from isolator.cli.session import json_option, note


@click.command()
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Settings file; default: ISOLATOR_CONFIG, else /etc/isolator/isolator.toml.",
)
@json_option
def daemon(config: Path | None) -> int:
    """Run the daemon in the foreground, as its systemd unit does; end it with TERM."""
    if config is not None:
        os.environ["ISOLATOR_CONFIG"] = str(config.absolute())
    settings = settings_or_failure()
    for problem in misspelt():
        note(f"WARNING isolator: {problem}")
    from isolator.daemon import run  # noqa: PLC0415 - no other command needs the daemon's parts

    return run(settings)
