"""What the kernel's refusals mean to a caller: one table."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from isolator.model.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    IsolatorError,
    NotFound,
    TooLarge,
    TooMany,
    Unavailable,
)


@contextlib.contextmanager
def refusing(path: str) -> Iterator[None]:
    """Turn an OSError about `path` into the refusal it means."""
    try:
        yield
    except OSError as error:
        raise _refusal(error, path[:256]) from error


def wrong_kind(path: str, kind: str, wanted: str) -> Conflict:
    """The refusal of what is there but of another kind."""
    told = "pipe, socket or device" if kind == "other" else kind
    return Conflict("file_kind_refused", f"{path[:256]} is a {told}, no {wanted}.", kind=kind)


def read_only(path: str) -> Forbidden:
    """The refusal of a write into a read-only mount."""
    return Forbidden("file_read_only", f"{path[:256]} is in a mount that is read-only for the agent.")


def exists(path: str) -> Conflict:
    """The refusal where nothing may be yet."""
    return Conflict("file_exists", f"{path[:256]} is there already.")


def _refusal(error: OSError, path: str) -> IsolatorError:
    match error.errno:
        case errno.ENOENT:
            return NotFound("file_not_found", f"{path} is not there.")
        case errno.EEXIST:
            return exists(path)
        case errno.ENOTEMPTY:
            return Conflict("folder_not_empty", f"{path} holds something; ?recursive removes that too.")
        case errno.ENOTDIR | errno.EISDIR:
            return Conflict("file_kind_refused", f"{path}, or what is on the way to it, is of another kind.")
        case errno.EAGAIN | errno.EBUSY | errno.ETXTBSY:
            return Conflict("file_busy", f"{path} is being moved about, or held by a lease. Try again.", retry_after=1)
        case errno.ENAMETOOLONG | errno.EINVAL:
            return BadRequest("file_path_invalid", f"The file system takes no such path, or not for this: {path}.")
    return _of_rights(error, path) or _of_room(error, path)


def _of_rights(error: OSError, path: str) -> IsolatorError | None:
    match error.errno:
        case errno.EACCES | errno.EPERM:
            return Forbidden("file_not_permitted", f"The agent itself has no right to do this with {path}.")
        case errno.EROFS:
            return read_only(path)
        case errno.EXDEV | errno.ELOOP:
            return Forbidden(
                "file_outside_mounts", f"A link on the way to {path} leads out of its mount, or in a circle."
            )
    return None


def _of_room(error: OSError, path: str) -> IsolatorError:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT | errno.EFBIG:
            return TooLarge("disk_full", f"There is no room for {path} on its disk, or in its owner's quota.")
        case errno.EMFILE | errno.ENFILE:
            return TooMany("files_busy", "Too many files are open; try again.", retry_after=1)
    return Unavailable("files_unavailable", f"The file system of {path} fails: {error.strerror}.")
