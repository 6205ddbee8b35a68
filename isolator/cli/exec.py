"""`exec`: one more command in a running agent's box, as if it ran here."""

from __future__ import annotations

import base64
import json
import os
import sys
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import click

from isolator.cli.ending import end_by
from isolator.cli.reference import AgentReference, find_agent
from isolator.cli.session import OWN_FAILURE, Failure, Session, json_option, note, pass_session
from isolator.cli.spawn_options import parse_environment

if TYPE_CHECKING:
    from isolator.client import ExecStatus

# What `timeout` exits with.
_TIMED_OUT: Final = 124


class _NotExecutable(Failure):
    exit_code = 126  # what shells, `env` and `docker` exit with, and below


class _NotFound(Failure):
    exit_code = 127


_REFUSALS: Final = MappingProxyType({"command_not_found": _NotFound, "command_not_executable": _NotExecutable})


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.option("--interactive", "-i", is_flag=True, help="Accepted for habit: open standard input is always passed.")
@click.option("--tty", "-t", is_flag=True, help="Give it a terminal of its own, which takes over ours.")
@click.option("--env", "-e", multiple=True, metavar="K[=V]", help="Environment variable; K alone takes ours.")
@click.option("--cwd", "-w", metavar="DIR", help="Its folder in the box; default: the agent's own.")
@click.option("--timeout", type=float, metavar="S", help="Seconds until all of it is killed; exits with 124 then.")
@click.argument("agent", type=AgentReference())
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="[--] COMMAND...")
@json_option
@pass_session
def exec(  # noqa: A001 - named as the command is
    session: Session,
    interactive: bool,
    tty: bool,
    env: tuple[str, ...],
    cwd: str | None,
    timeout: float | None,
    agent: str,
    command: tuple[str, ...],
) -> None:
    """Run a command in a running agent's box, as if it ran here.

    Standard input, output, errors and signals are passed, and its end is ours: the same exit code, or the same
    signal. COMMAND is run as it stands, by no shell. Whatever ends this ends it too.

    With --json each piece of output is a line {"stream", "data"}, data in base64, and the last line is how it ended.
    """
    from isolator.cli.mirror import Mirror, keep_standard_streams, raw_output  # noqa: PLC0415 - not for `--help`
    from isolator.cli.terminal import Terminal  # noqa: PLC0415 - as above
    from isolator.client import ProblemError  # noqa: PLC0415 - as above

    del interactive
    closed = keep_standard_streams()
    if tty and not os.isatty(0):
        raise Failure("-t needs a terminal as standard input. Leave it out, or call this in a terminal.", "no_terminal")
    terminal = Terminal() if tty else None
    if command[:1] == ("--",):
        command = command[1:]
    with session.client() as client:
        try:
            execution = client.exec(
                find_agent(client, agent).id,
                command,
                env=parse_environment(env, dict(os.environ)),
                cwd=cwd,
                timeout=timeout,
                tty=tty,
                size=None if terminal is None else terminal.size(),
                stdin=0 not in closed,
            )
        except ProblemError as problem:
            if (refusal := _REFUSALS.get(problem.code)) is None:
                raise
            raise refusal(problem.detail, problem.code, **problem.fields) from problem
        with execution:
            status = Mirror(execution, _json_output if session.json else raw_output, terminal).run(
                stdin=0 not in closed
            )
    if session.json:
        _print_status(status)
    _end(status, timeout)


def _end(status: ExecStatus, timeout: float | None) -> None:
    """End as the command did; what ended it against its will is told on standard error."""
    if status.timed_out:
        note(f"isolator: the command was killed: its timeout of {timeout or 0:g} s was over.")
        sys.exit(_TIMED_OUT)
    if status.oom_killed:
        note("isolator: the command was killed: the box was out of memory.")
    elif status.reason == "AgentEnded":
        note("isolator: the command was killed: its agent has ended.")
    if status.signal is not None:
        end_by(status.signal)
    sys.exit(OWN_FAILURE if status.exit_code is None else status.exit_code)


def _json_output(stream: int, data: bytes) -> None:
    name = "stdout" if stream == 1 else "stderr"
    click.echo(json.dumps({"stream": name, "data": base64.b64encode(data).decode()}))


def _print_status(status: ExecStatus) -> None:
    names = ("exit_code", "signal", "timed_out", "oom_killed", "truncated", "reason")
    click.echo(json.dumps({name: getattr(status, name) for name in names}))
