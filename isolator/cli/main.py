"""`isolator`: the entry point, the list of commands, and the one place where failures become exit codes.

A command's module is loaded when the command is called, so that `isolator ps` does not wait for what only
`doctor` needs. The one-line helps stand here for the same reason.

Exit codes: 0 done; 1 a check found something (`doctor`, `config check`, `audit verify`); 125 isolator's own
failure, wrong usage included; 128+N ended by signal N; `spawn --wait` exits as the agent did, `exec` as its command.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NoReturn

import click

from isolator import __version__
from isolator.cli.session import OWN_FAILURE, Failure, Session
from isolator.cli.text import escape

_COMMANDS: Final = MappingProxyType(
    {
        "daemon": ("daemon", "Run the daemon in the foreground."),
        "info": ("info", "Show the daemon, its guarantees, and who you are to it."),
        "doctor": ("doctor", "Check this host: what is weak, what is broken, what to do."),
        "spawn": ("spawn", "Start an agent."),
        "exec": ("exec", "Run a command in an agent's box, as if it ran here."),
        "ps": ("agents", "List agents."),
        "inspect": ("agents", "Show one agent and its receipt."),
        "logs": ("agents", "Show an agent's output."),
        "send": ("messages", "Send a message to an agent."),
        "messages": ("messages", "Show what an agent sends to its gateway."),
        "stop": ("agents", "Stop agents and remove their boxes."),
        "cp": ("files", "Copy a file into, out of, or between agents' mounts."),
        "ls": ("files", "List a folder in an agent's mounts."),
        "top": ("top", "Show what running agents use, live."),
        "events": ("events", "Show what happens, as it happens."),
        "team": ("team", "Create, list and remove teams."),
        "image": ("image", "Build and list the agents' images."),
        "config": ("config", "Show and check the settings."),
        "audit": ("audit", "Search and verify the audit log."),
        "completion": ("completion", "Print the shell's completion script."),
    }
)
_INTERRUPTED: Final = 130
_PIPE_CLOSED: Final = 141


class Program(click.Group):
    """The group of all commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order of the table above."""
        del ctx
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, its module loaded now."""
        del ctx
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"isolator.cli.{_COMMANDS[cmd_name][0]}")
        command = getattr(module, cmd_name)
        return command if isinstance(command, click.Command) else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in `--help`, without loading any of them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in _COMMANDS.items()])

    def main(self, args: Sequence[str] | None = None, *more: Any, **extra: Any) -> NoReturn:
        """Run, and exit with the code the module's docstring lists."""
        session = Session()
        extra["standalone_mode"] = False
        try:
            result = super().main(args, *more, obj=session, **extra)
            code = result if isinstance(result, int) else 0
            sys.stdout.flush()
        except click.Abort:
            code = _INTERRUPTED
        except KeyboardInterrupt:
            code = _INTERRUPTED
        except BrokenPipeError:
            # What is still buffered would fail again, loudly, when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = _PIPE_CLOSED
        except Exception as error:  # noqa: BLE001 - what is no known failure is raised again
            code = _report(error, session)
        sys.exit(code)


def _report(error: Exception, session: Session) -> int:
    """Tell a failure on standard error: a sentence, or JSON for programs. The exit code; raises what is a defect."""
    from isolator.model.errors import IsolatorError  # noqa: PLC0415 - a success needs none of it

    if isinstance(error, click.UsageError) and not session.json:
        error.show()
        return OWN_FAILURE
    if isinstance(error, click.ClickException):
        problem = {"code": "usage", "detail": error.format_message()}
        if isinstance(error, Failure):
            problem = {**error.members, "code": error.code, "detail": error.message}
    elif isinstance(error, IsolatorError):
        problem = error.problem()
    else:
        problem = _client_problem(error)
    if session.json:
        click.echo(json.dumps(problem), err=True)
    else:
        hint = problem["code"] if problem["code"] not in ("cli_failure", "usage") else ""
        click.echo(
            f"isolator: {escape(problem['detail'], keep=chr(10))}" + (f" [{escape(hint)}]" if hint else ""),
            err=True,
        )
    return error.exit_code if isinstance(error, Failure) else OWN_FAILURE


def _client_problem(error: Exception) -> dict[str, Any]:
    from isolator.client.errors import IsolatorClientError  # noqa: PLC0415 - as above

    if not isinstance(error, IsolatorClientError):
        raise error
    return error.answer()


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--socket",
    type=click.Path(path_type=Path),
    help="The daemon's socket; default: ISOLATOR_SOCKET, the configuration, /run/isolator.",
)
@click.version_option(__version__, prog_name="isolator", message="%(prog)s %(version)s")
@click.pass_obj
def main(session: Session, socket: Path | None) -> None:
    """Runs AI agents in hardened containers, and proves afterwards what happened."""
    session.socket = socket
