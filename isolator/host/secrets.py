"""Secrets that live on the host: a root-owned folder, or systemd credentials.

A name is looked up for the caller, never freely: admins in the folder itself and among the credentials, any user
in their own subfolder `uid-<uid>`. A file that others could have written or read is refused: its content would
not be the operator's secret any more.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from isolator.host import syscalls
from isolator.model.errors import Forbidden, NotFound, TooLarge
from isolator.model.identity import Principal
from isolator.model.request import MAX_SECRET

_OTHERS = 0o077
# systemd lets a service's user read its credentials by an ACL, whose mask shows as group bits.
_OTHERS_OF_CREDENTIALS = 0o037
_RESOLVE = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS


def read_secret(name: str, caller: Principal, secret_dir: Path, credentials: Path | None) -> bytes:
    """The value of the host's secret `name` for this caller. `name` has been checked to hold no slash.

    Raises:
        NotFound: `secret_not_found`.
        Forbidden: `secret_unsafe`: its file is not the operator's alone.
        TooLarge: `secret_too_large`.
    """
    places = [(secret_dir, f"uid-{caller.uid}/{name}", _OTHERS)]
    if caller.is_admin:
        places.append((secret_dir, name, _OTHERS))
        if credentials is not None:
            places.append((credentials, name, _OTHERS_OF_CREDENTIALS))
    for folder, relative, others in places:
        value = _read(folder, relative, name, others)
        if value is not None:
            return value
    raise NotFound("secret_not_found", f"There is no secret {name} for uid {caller.uid} on this host.", name=name)


def _read(folder: Path, relative: str, name: str, others: int) -> bytes | None:
    try:
        root = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        descriptor = syscalls.openat2(root, relative, os.O_RDONLY | os.O_NONBLOCK, _RESOLVE)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Forbidden("secret_unsafe", f"The secret {name} can't be opened safely.", name=name) from error
    finally:
        os.close(root)
    try:
        facts = os.fstat(descriptor)
        trusted = facts.st_uid in (0, os.geteuid())
        if not stat.S_ISREG(facts.st_mode) or not trusted or facts.st_mode & others:
            raise Forbidden(
                "secret_unsafe",
                f"The file of the secret {name} must be a plain file of root's with mode 0600 or 0400.",
                name=name,
            )
        with open(descriptor, "rb", closefd=False) as file:
            value = file.read(MAX_SECRET + 1)
    finally:
        os.close(descriptor)
    if len(value) > MAX_SECRET:
        raise TooLarge("secret_too_large", f"The secret {name} has more than {MAX_SECRET} bytes.", name=name)
    return value
