"""The texts of spawn's options into what the API takes. Pure but for secrets, whose values are read here.

A value never comes from the command line itself: every process of the host can read another's arguments, and
shells keep them in their history.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click

_VARIABLE: Final = re.compile(r"[A-Z_][A-Z0-9_]*\Z", re.ASCII)
_MODES: Final = ("ro", "rw")
_LARGEST_SECRET: Final = 262_144
_VISIBLE: Final = (
    "Arguments are visible to everybody on this host (ps, /proc), so a value is not taken from them. "
    "Write {option} {name} for the host's own secret, {name}=@FILE to read a file, {name}=- for standard input."
)

Reader = Callable[[str], bytes]


def absolute(path: str) -> str:
    """The path from the root. Links are left alone: where they lead is the daemon's to judge, and it refuses them."""
    import os.path  # noqa: PLC0415 - pathlib's absolute() keeps `..`, and resolve() follows links

    return os.path.abspath(Path(path).expanduser())  # noqa: PTH100 - as above


def parse_workspace(text: str) -> dict[str, str]:
    """`DIR[:ro|:rw]`; read-write unless said otherwise."""
    source, mode = _without_mode(text)
    if not source:
        raise click.BadParameter("write DIR, DIR:ro or DIR:rw", param_hint="--workspace")
    return {"source": absolute(source), "mode": mode or "rw"}


def parse_mount(text: str) -> dict[str, str]:
    """`SRC:DST[:ro|:rw]`; read-only unless said otherwise."""
    rest, mode = _without_mode(text)
    source, _, target = rest.rpartition(":")
    if not source or not target.startswith("/"):
        raise click.BadParameter(f"{text!r}: write SRC:DST or SRC:DST:rw, DST absolute", param_hint="--mount")
    return {"source": absolute(source), "target": target, "mode": mode or "ro"}


def _without_mode(text: str) -> tuple[str, str | None]:
    head, colon, last = text.rpartition(":")
    return (head, last) if colon and last in _MODES else (text, None)


def parse_environment(pairs: Sequence[str], own: dict[str, str]) -> dict[str, str]:
    """`K=V`, or `K` for the value it has in `own`, our own environment."""
    result: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name:
            raise click.BadParameter(f"{pair!r}: write NAME=VALUE", param_hint="--env")
        if not equals and name not in own:
            raise click.BadParameter(f"{name} is not set here; write {name}=VALUE", param_hint="--env")
        result[name] = value if equals else own[name]
    return result


def parse_secrets(as_files: Sequence[str], as_variables: Sequence[str], read: Reader) -> list[dict[str, Any]]:
    """The secrets of a spawn.

    Args:
        as_files: `NAME`, `NAME=@FILE`, `NAME=-`.
        as_variables: the same, and `NAME=VARIABLE` with or without `=@FILE` or `=-` behind it.
        read: gives the bytes of `@FILE` or `-`.

    Raises:
        click.BadParameter: a value stood on the command line, or is no text. Never quotes what stood there.
    """
    wanted = [_secret(text, "--secret", read) for text in as_files]
    wanted += [_secret(text, "--secret-env", read) for text in as_variables]
    names = [secret["name"] for secret in wanted]
    if len(set(names)) != len(names):
        raise click.BadParameter("a name stands twice", param_hint="--secret")
    if sum(text.endswith("=-") for text in (*as_files, *as_variables)) > 1:
        raise click.BadParameter("only one secret can come from standard input", param_hint="--secret")
    return wanted


def _secret(text: str, option: str, read: Reader) -> dict[str, Any]:
    name, *parts = text.split("=", 2)
    secret: dict[str, Any] = {"name": name, "as": "env" if option == "--secret-env" else "file"}
    if option == "--secret-env" and parts and _VARIABLE.match(parts[0]):
        secret["env"] = parts.pop(0)
    source = "=".join(parts) if parts else None
    if not name or source == "":
        raise click.BadParameter("a name or a value is empty", param_hint=option)
    if source is None:
        return secret
    if source != "-" and not source.startswith("@"):
        shown = name if name.isprintable() else "NAME"
        raise click.BadParameter(_VISIBLE.format(option=option, name=shown), param_hint=option)
    content = read(source)
    if len(content) > _LARGEST_SECRET:
        raise click.BadParameter(f"{name}: over {_LARGEST_SECRET} bytes", param_hint=option)
    try:
        value = content.decode()
    except UnicodeDecodeError:
        raise click.BadParameter(f"{name}: its value is no UTF-8 text", param_hint=option) from None
    # What `echo` and editors add is no part of a key, and no variable survives it; a file keeps every byte.
    secret["value"] = value.removesuffix("\n") if secret["as"] == "env" else value
    return secret


def read_source(source: str) -> bytes:
    """The bytes behind `@FILE` or `-`; a person at a terminal is asked, without echo."""
    if source == "-":
        if sys.stdin.isatty():
            typed: str = click.prompt("Secret", hide_input=True, err=True)
            return typed.encode()
        return sys.stdin.buffer.read(_LARGEST_SECRET + 1)
    try:
        with Path(source[1:]).open("rb") as file:
            return file.read(_LARGEST_SECRET + 1)
    except OSError as error:
        raise click.BadParameter(f"{source[1:]}: {error.strerror}", param_hint="--secret") from error
