"""The pin file: which image IDs a daemon may run, by name.

Whoever can write it decides what code every box holds, so it is read only when nobody but root and the
daemon's own user can change it or swap it. A missing file pins nothing, and then nothing is allowed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import Any

from isolator.model.errors import BadRequest, Forbidden

_NAME = re.compile(r"[a-z0-9]+(?:[._/-][a-z0-9]+)*")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_BYTES = 64 * 1024
_MAX_NAME = 200


def read_lock(path: Path) -> dict[str, str]:
    """Name to image ID, for example `{"isolator/skill": "sha256:…"}`; empty when the file is absent.

    Raises:
        Forbidden: `image_lock_unsafe` when another user could change the file, or it is not a regular file.
        BadRequest: `image_lock_invalid` when it is not such an object.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _unsafe(path, f"can't be opened without following links ({error.strerror})") from error
    with open(descriptor, "rb") as file:  # noqa: PTH123 - opened above, without following links
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise _unsafe(path, "is not a regular file")
        _demand_owned(path, facts)
        for folder in Path(path).absolute().parents:
            _demand_owned(folder, folder.stat(), sticky_ok=True)
        text = file.read(_MAX_BYTES + 1)
    if len(text) > _MAX_BYTES:
        raise _invalid(path, f"is over {_MAX_BYTES} bytes")
    return _parse(path, text)


def write_lock(path: Path, pins: dict[str, str]) -> None:
    """Replace the file whole, mode 0644, so that a reader sees the old pins or the new ones.

    Raises:
        BadRequest: `image_lock_invalid` when a name or an ID is malformed; nothing is written then.
        OSError: the folder is missing or not writable.
    """
    text = json.dumps(pins, indent=2, sort_keys=True).encode() + b"\n"
    _parse(path, text)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor, not a path
            file.write(text)
            os.fchmod(file.fileno(), 0o644)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _parse(path: Path, text: bytes) -> dict[str, str]:
    try:
        pins = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _invalid(path, f"is not JSON without duplicate keys ({error})") from error
    if not isinstance(pins, dict):
        raise _invalid(path, "must be an object of image names and IDs")
    for name, digest in pins.items():
        if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
            raise _invalid(path, f"has a malformed image name {name[:80]!r}")
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise _invalid(path, f"must pin {name} to sha256: and 64 hex digits")
    return pins


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice")
    return table


def _demand_owned(path: Path, facts: os.stat_result, *, sticky_ok: bool = False) -> None:
    if facts.st_uid not in {0, os.geteuid()}:
        raise _unsafe(path, f"belongs to uid {facts.st_uid}; root or the daemon's user must own it")
    if facts.st_mode & 0o022 and not (sticky_ok and facts.st_mode & stat.S_ISVTX):
        raise _unsafe(path, f"is writable by others: chmod go-w {path}")


def _unsafe(path: Path, why: str) -> Forbidden:
    return Forbidden("image_lock_unsafe", f"Image pins are not read: {path} {why}.", path=str(path))


def _invalid(path: Path, why: str) -> BadRequest:
    return BadRequest("image_lock_invalid", f"{path} {why}.", path=str(path))
