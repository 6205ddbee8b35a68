"""What one run of the command line knows: which daemon, and whether a program or a person reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from isolator.cli.text import escape, table, terminal_columns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from isolator.client import Client

OWN_FAILURE: Final = 125
"""Exit code of isolator's own failure, as opposed to an agent's: the same as `docker run` has."""

Command = TypeVar("Command", bound=Callable[..., Any])


class Failure(click.ClickException):
    """A failure of ours, told in a sentence that says what to do."""

    exit_code = OWN_FAILURE

    def __init__(self, message: str, code: str = "cli_failure", **members: Any) -> None:
        super().__init__(message)
        self.code = code
        self.members = members


@dataclass
class Session:
    """One run: the socket that was named, if any, and whether `--json` was said."""

    socket: Path | None = None
    json: bool = False

    def client(self, timeout: float = 30.0) -> Client:
        """A client of the daemon; connects at its first call."""
        from isolator.client import Client  # noqa: PLC0415 - `--help` should not wait for it

        return Client(self.socket, timeout=timeout)

    def show(self, answer: Any, text: Callable[[], str]) -> None:
        """Print `answer` as JSON for programs, else `text()` for people (nothing if it is empty)."""
        if self.json:
            click.echo(json.dumps(answer, indent=2, ensure_ascii=sys.stdout.encoding.lower() != "utf-8"))
        elif shown := text():
            click.echo(shown)

    def show_table(
        self,
        answer: Any,
        headers: Sequence[str],
        rows: Sequence[Sequence[Any]],
        *,
        flexible: Sequence[int] = (),
        empty: str = "",
    ) -> None:
        """Print `answer` as JSON for programs, else the rows; `empty` goes to stderr where there are none."""
        if not rows and not self.json:
            note(empty)
            return
        self.show(answer, lambda: table(headers, rows, flexible=flexible, columns=terminal_columns()))


def note(message: str) -> None:
    """A line for people on standard error, escaped; an empty one is not printed."""
    if message:
        click.echo(escape(message, keep="\n"), err=True)


def _say_json(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Session).json = True


def json_option(command: Command) -> Command:
    """`--json`, on every command."""
    return click.option(
        "--json", is_flag=True, expose_value=False, is_eager=True, callback=_say_json, help="Answer in JSON."
    )(command)


pass_session = click.make_pass_decorator(Session, ensure=True)
