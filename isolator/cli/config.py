"""`config show`, `config check`: every setting, what it is, and where its value comes from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from isolator.cli.session import Failure, Session, json_option, pass_session
from isolator.cli.text import escape, table, terminal_columns

if TYPE_CHECKING:
    from isolator.settings import Settings

_PREFIX: Final = "ISOLATOR_"
# Variables of ours that are no settings: which file to read, and what an agent finds in its box.
_NO_SETTINGS: Final = frozenset({"CONFIG", "AGENT", "TEAM", "AGENT_SOCKET"})


def settings_or_failure() -> Settings:
    """The effective settings.

    Raises:
        Failure: `settings_invalid`, with every flaw by its key.
    """
    try:
        return _load()
    except _Flawed as flawed:
        raise Failure(
            "The settings can't be used:\n" + "\n".join(f"  {flaw}" for flaw in flawed.flaws),
            "settings_invalid",
            problems=flawed.flaws,
        ) from flawed


class _Flawed(Exception):
    def __init__(self, flaws: list[str]) -> None:
        super().__init__("; ".join(flaws))
        self.flaws = flaws


def _load() -> Settings:
    from pydantic import ValidationError  # noqa: PLC0415 - slow to load; few commands need settings

    from isolator.settings import load_settings  # noqa: PLC0415 - as above

    try:
        return load_settings()
    except ValidationError as error:
        raise _Flawed([_flaw(each) for each in error.errors(include_url=False, include_input=False)]) from error
    except OSError as error:
        raise _Flawed([str(error)]) from error
    except ValueError as error:  # not TOML, or a variable that is not the JSON it must be
        raise _Flawed([f"{_file()}: {error}" if "TOML" in type(error).__name__ else str(error)]) from error


def _flaw(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"]) or "settings"
    if error["type"] == "extra_forbidden":
        return f"{name}: unknown key; see: isolator config show --all"
    return f"{name}: {str(error['msg']).removeprefix('Value error, ')}"


def _file() -> Path:
    from isolator.settings import DEFAULT_CONFIG  # noqa: PLC0415 - as above

    return Path(os.environ.get("ISOLATOR_CONFIG") or DEFAULT_CONFIG)


def _file_keys() -> set[str]:
    import tomllib  # noqa: PLC0415 - as above

    try:
        return set(tomllib.loads(_file().read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return set()


def _environment_names() -> dict[str, str]:
    """Settings' names in the environment, lower-case, and the variables they stand in."""
    return {
        variable[len(_PREFIX) :].lower(): variable
        for variable, value in os.environ.items()
        if variable.upper().startswith(_PREFIX) and value and variable[len(_PREFIX) :].upper() not in _NO_SETTINGS
    }


@click.group()
def config() -> None:
    """Show and check the settings."""


@config.command("show")
@click.option("--all", "everything", is_flag=True, help="With what each one means.")
@json_option
@pass_session
def show(session: Session, everything: bool) -> None:
    """Show the effective settings and where each comes from."""
    settings = settings_or_failure()
    values = settings.model_dump(mode="json")
    values |= {"socket": str(settings.socket_path), "image_lock": str(settings.image_lock_path)}
    environment, in_file = _environment_names(), _file_keys()
    rows = []
    for name, field in type(settings).model_fields.items():
        origin = "env" if name in environment else "file" if name in in_file else "default"
        rows.append((name, values[name], origin, field.description or ""))
    answer = {
        "file": str(_file()),
        "settings": {
            name: {"value": value, "origin": origin, **({"description": meaning} if everything else {})}
            for name, value, origin, meaning in rows
        },
    }
    if everything:
        session.show(answer, lambda: "\n\n".join(_described(*row) for row in rows))
    else:
        shown = [(name, _shown(value), origin) for name, value, origin, _ in rows]
        session.show(
            answer,
            lambda: table(("SETTING", "VALUE", "FROM"), shown, flexible=(1,), columns=terminal_columns()),
        )


def _described(name: str, value: Any, origin: str, meaning: str) -> str:
    return (
        f"{name} = {escape(_shown(value))}  ({origin})\n    {meaning}\n"
        f"    Environment: {_PREFIX}{name.upper()}; file: {name}"
    )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "(none)"
    return "(none)" if value is None else str(value)


@config.command("check")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@json_option
@pass_session
@click.pass_context
def check(context: click.Context, session: Session, file: Path | None) -> None:
    """Check FILE by itself, or the effective settings; exit 1 if the daemon would refuse them.

    Without FILE, variables that begin with ISOLATOR_ but are no setting are refused too: a misspelt limit is
    none.
    """
    problems: list[str] = []
    with _only_file(file) if file else contextlib.nullcontext():
        checked = _file()
        try:
            _load()
        except _Flawed as flawed:
            problems += flawed.flaws
    if file is None:
        problems += misspelt()
    answer = {"ok": not problems, "file": str(checked), "problems": problems}
    found = "\n".join(escape(problem) for problem in problems)
    there = checked if checked.is_file() else f"no file at {checked}, environment and defaults"
    session.show(answer, lambda: found or f"ok: {escape(there)}")
    if problems:
        context.exit(1)


def misspelt() -> list[str]:
    """What begins with ISOLATOR_ in the environment and is no setting, a sentence each."""
    from isolator.settings import Settings  # noqa: PLC0415 - as above

    known = set(Settings.model_fields)
    return [
        f"{variable}: set in the environment, but there is no such setting"
        for name, variable in _environment_names().items()
        if name not in known
    ]


@contextlib.contextmanager
def _only_file(file: Path) -> Iterator[None]:
    """Environment without settings, so that none of them hides a flaw of the file."""
    hidden = {name: value for name, value in os.environ.items() if name.upper().startswith(_PREFIX)}
    try:
        for name in hidden:
            del os.environ[name]
        os.environ["ISOLATOR_CONFIG"] = str(file.absolute())
        yield
    finally:
        os.environ.pop("ISOLATOR_CONFIG", None)
        os.environ.update(hidden)
