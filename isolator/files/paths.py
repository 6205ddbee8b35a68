"""From the text of a path to the mount it lies in. Pure.

A path is a tuple of names, each bytes as the kernel has them; text is only for people. `.`, `..` and empty names are
refused rather than resolved: what they mean depends on links, and nobody needs them here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote_to_bytes

from isolator.model.box import BoxMount
from isolator.model.errors import BadRequest, Forbidden

Names = tuple[bytes, ...]

MOST_NAME = 255
MOST_PATH = 4095
_HALF_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True, slots=True)
class Place:
    """A path inside the box: the mount it lies in, and the names below that mount's target."""

    names: Names
    mount: BoxMount
    within: Names

    @property
    def text(self) -> str:
        """For people; bytes that are no UTF-8 show as their codes."""
        return path_text(self.names)

    @property
    def relative(self) -> bytes:
        """The path below the mount's root, `.` for the root itself."""
        return b"/".join(self.within) or b"."

    @property
    def folder(self) -> bytes:
        """The path of the folder it lies in, below the mount's root. The root itself has none."""
        return b"/".join(self.within[:-1]) or b"."

    @property
    def name(self) -> bytes:
        """Its last name."""
        return self.within[-1]


def parse_path(text: str) -> Names:
    """The names of a percent-encoded path without a leading slash; no text is no names: the box's root.

    Raises:
        BadRequest: `file_path_invalid`.
    """
    if not text:
        return ()
    if _HALF_ESCAPE.search(text):
        raise BadRequest("file_path_invalid", "A % in a path must begin an escape of two hex digits; itself it is %25.")
    whole = unquote_to_bytes(text.encode("utf-8", "surrogateescape"))
    names = tuple(whole.split(b"/"))
    if b"\x00" in whole or not {b"", b".", b".."}.isdisjoint(names):
        raise BadRequest("file_path_invalid", "A path must have no '.', '..' or empty part, and no NUL.")
    if len(whole) > MOST_PATH or max(map(len, names)) > MOST_NAME:
        raise BadRequest(
            "file_path_invalid", f"A path has at most {MOST_PATH} bytes, and each of its names at most {MOST_NAME}."
        )
    return names


def parse_absolute(text: str) -> Names:
    """The names of a percent-encoded path that begins with a slash.

    Raises:
        BadRequest: `file_path_invalid`.
    """
    if not text.startswith("/"):
        raise BadRequest("file_path_invalid", "The other path must be absolute, such as /workspace/new.")
    return parse_path(text[1:])


def quote_path(names: Names) -> str:
    """The path as an address has it: `parse_absolute` gives the same names back."""
    return "/" + "/".join(quote(name, safe="") for name in names)


def name_text(name: bytes) -> str:
    """One name for people."""
    return name.decode("utf-8", "backslashreplace")


def path_text(names: Names) -> str:
    """A path for people."""
    return "/" + "/".join(map(name_text, names))


def mount_names(mount: BoxMount) -> Names:
    """The names of a mount's target."""
    return tuple(mount.target.encode().strip(b"/").split(b"/"))


def locate(names: Names, mounts: Sequence[BoxMount]) -> Place:
    """The place of a path. Mounts never lie in each other, so at most one fits.

    Raises:
        Forbidden: `file_outside_mounts`.
    """
    for mount in mounts:
        target = mount_names(mount)
        if names[: len(target)] == target:
            return Place(names, mount, names[len(target) :])
    known = [mount.target for mount in mounts]
    raise Forbidden(
        "file_outside_mounts",
        f"{path_text(names)[:256]} is in none of the agent's mounts ({', '.join(known) or 'it has none'}).",
        mounts=known,
    )
