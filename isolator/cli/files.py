"""`cp` and `ls`: files in an agent's mounts, between here and there."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Final, cast

import click

from isolator.cli.reference import find_agent
from isolator.cli.session import Failure, Session, json_option, note, pass_session

if TYPE_CHECKING:
    from isolator.client import Client, FileInfo, FileStream

_STANDARD: Final = "-"


@dataclass(frozen=True, slots=True)
class Remote:
    """A path in an agent: `AGENT:/path`."""

    agent: str
    path: str

    @property
    def name(self) -> str:
        """Its last name."""
        return PurePosixPath(self.path).name

    def below(self, name: str) -> Remote:
        """With a name behind it, where it ends in a slash."""
        return Remote(self.agent, self.path + name) if self.path.endswith("/") else self


def parse_place(text: str) -> Remote | None:
    """The path in an agent that a text names; None for one of this host, which may be written `./odd:/name`."""
    agent, colon, path = text.partition(":")
    if not colon or not agent or not path.startswith("/") or text.startswith((".", "/")):
        return None
    return Remote(agent, path)


class _Pieces:
    """A stream of pieces, as a file to send from."""

    def __init__(self, stream: FileStream) -> None:
        self._pieces = iter(stream)

    def read(self, _: int = -1) -> bytes:
        return next(self._pieces, b"")


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@json_option
@pass_session
def cp(session: Session, source: str, destination: str) -> None:
    """Copy a file into, out of, or between agents' mounts.

    One side or both are AGENT:/path; - is standard input or output. A DST that ends in a slash, or a local folder,
    keeps the name. The file appears whole or not at all, with its permissions.
    """
    here, there = parse_place(source), parse_place(destination)
    if here is None and there is None:
        raise click.UsageError("One side must be AGENT:/path; for two local files there is cp.")
    with session.client() as client:
        told: FileInfo | None = None
        if here is None:
            assert there is not None
            told = _send(client, source, there)
        else:
            with client.files(find_agent(client, here.agent).id).open(here.path) as stream:
                told = None if there is None else _pass_on(client, stream, there.below(here.name))
                if there is None:
                    _keep(stream, destination, here.name)
    if session.json:
        session.show({"file": None if told is None else told.raw}, str)


@click.command()
@click.argument("place", metavar="AGENT:/PATH")
@json_option
@pass_session
def ls(session: Session, place: str) -> None:
    """List a folder in an agent's mounts; AGENT:/ lists the mounts."""
    wanted = parse_place(place)
    if wanted is None:
        raise click.UsageError("Say AGENT:/path, such as worker:/workspace.")
    with session.client() as client:
        path = wanted.path.rstrip("/") or "/"
        found = client.files(find_agent(client, wanted.agent).id).list(path)
    rows = [
        (
            f"{item.mode:04o}",
            item.type,
            item.size,
            item.mtime,
            item.name + (f" -> {item.target}" if item.target else ""),
        )
        for item in sorted(found.items, key=lambda item: item.path)
    ]
    answer = {"items": [item.raw for item in found.items], "next": None, "truncated": found.truncated}
    session.show_table(answer, ("MODE", "TYPE", "SIZE", "CHANGED", "NAME"), rows, flexible=(4, 3), empty="Empty.")
    if found.truncated:
        note("There is more than is listed.")


def _send(client: Client, source: str, there: Remote) -> FileInfo:
    files = client.files(find_agent(client, there.agent).id)
    if source == _STANDARD:
        return files.write(there.path, sys.stdin.buffer)
    try:
        with Path(source).open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            return files.write(there.below(Path(source).name).path, file, mode=mode)
    except OSError as error:
        raise Failure(f"{source} can't be read: {error.strerror}.") from error


def _pass_on(client: Client, stream: FileStream, there: Remote) -> FileInfo:
    files = client.files(find_agent(client, there.agent).id)
    return files.write(there.path, cast("IO[bytes]", _Pieces(stream)), mode=stream.mode)


def _keep(stream: FileStream, destination: str, name: str) -> None:
    if destination == _STANDARD:
        for piece in stream:
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        return
    place = Path(destination)
    if destination.endswith("/") or place.is_dir():
        place /= name
    try:
        with _whole(place, stream.mode) as file:
            for piece in stream:
                file.write(piece)
    except OSError as error:
        raise Failure(f"{place} can't be written: {error.strerror}.") from error


@contextlib.contextmanager
def _whole(place: Path, mode: int) -> Iterator[IO[bytes]]:
    """A file that appears under its name at the end of the block, or not at all; a device or pipe is written to."""
    if place.exists() and not place.is_file():
        with place.open("wb") as file:
            yield file
        return
    hidden = place.with_name(f".{secrets.token_hex(6)}.part")
    try:
        with hidden.open("xb") as file:
            yield file
        hidden.chmod(mode & 0o777)
        hidden.replace(place)
    finally:
        hidden.unlink(missing_ok=True)
