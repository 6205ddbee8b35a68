"""A mount on its way into a box: what was planned from the request's text, and what that text opened to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlannedMount:
    """A mount whose text is allowed: `source` is `root` joined with `relative`."""

    source: str
    root: str
    relative: str
    target: str
    read_only: bool
    must_be_folder: bool


@dataclass(frozen=True, slots=True)
class OpenedMount:
    """What a planned mount led to: its device, inode and owner."""

    plan: PlannedMount
    device: int
    inode: int
    uid: int
    gid: int
    is_folder: bool
