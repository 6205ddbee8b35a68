"""`doctor`: what of this host is weak or broken, what that means, what to do; daemon or no daemon."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from isolator.cli.progress import Progress
from isolator.cli.session import Session, json_option, pass_session
from isolator.cli.text import escape

if TYPE_CHECKING:
    from isolator.cli.checks.finding import Finding
    from isolator.settings import Settings

_COLOURS: Final = (("ok", "green"), ("weak", "yellow"), ("broken", "red"))
_WIDEST: Final = 110
_TIMEOUT: Final = 10.0


@click.command()
@json_option
@pass_session
@click.pass_context
def doctor(context: click.Context, session: Session) -> None:
    """Check engine, kernel, socket, daemon, network, images and record.

    Every line is ok, weak (works, but something could be better) or broken. Exit 1 if anything is broken.
    """
    from isolator.cli.config import settings_or_failure  # noqa: PLC0415 - with the checks, slow to load

    with Progress("looking at this host", enabled=not session.json):
        findings = examine(settings_or_failure(), session)
    broken = [finding for finding in findings if finding.level == "broken"]
    weak = [finding for finding in findings if finding.level == "weak"]
    answer = {"ok": not broken, "findings": [finding.answer() for finding in findings]}
    summary = f"{len(broken)} broken, {len(weak)} weak, {len(findings) - len(broken) - len(weak)} ok"
    session.show(answer, lambda: "\n".join([*(_line(finding) for finding in findings), "", summary]))
    if broken:
        context.exit(1)


def examine(settings: Settings, session: Session) -> list[Finding]:
    """Every check, in the order a person would mend things."""
    from isolator.cli.checks import engine, holes, host, service  # noqa: PLC0415 - slow to load
    from isolator.cli.checks.finding import Facts  # noqa: PLC0415 - as above
    from isolator.client import IsolatorClientError  # noqa: PLC0415 - as above

    unreached: list[Finding] = []
    version = told = None
    try:
        version = _asked(settings.docker_socket, "/version")
        told = _asked(settings.docker_socket, "/info")
    except IsolatorClientError as error:
        unreached.append(engine.unreachable(settings.docker_socket, error))
    with session.client(timeout=_TIMEOUT) as client:
        info = None
        try:
            info = client.info()
        except IsolatorClientError as error:
            silent = service.unanswered(error)
        facts = Facts(settings, info, version, told)
        return [
            *host.check_kernel(),
            *unreached,
            *engine.check_engine(facts),
            *holes.check_holes(facts),
            *host.check_folders(facts),
            *service.check_access(settings, client.location.path),
            *([silent] if info is None else service.check_daemon(facts)),
            *service.check_images(facts),
            *service.check_record(facts, client),
        ]


def _asked(socket: Path, path: str) -> dict[str, Any]:
    from isolator.cli.checks.engine import ask_engine  # noqa: PLC0415 - as above

    return ask_engine(socket, path)


def _line(finding: Finding) -> str:
    columns = min(_WIDEST, shutil.get_terminal_size((_WIDEST, 24)).columns)
    head = f"{finding.level:<7}"
    text = textwrap.fill(
        f"{escape(finding.name)}: {escape(finding.meaning)}",
        columns,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_on_hyphens=False,
        break_long_words=False,
    )
    coloured = click.style(finding.level, fg=dict(_COLOURS)[finding.level]) if sys.stdout.isatty() else finding.level
    text = coloured + text[len(finding.level) :]
    if finding.action is None:
        return text
    return (
        text
        + "\n"
        + textwrap.fill(
            f"-> {escape(finding.action)}",
            columns,
            initial_indent=" " * len(head),
            subsequent_indent=" " * (len(head) + 3),
            break_on_hyphens=False,
            break_long_words=False,
        )
    )
