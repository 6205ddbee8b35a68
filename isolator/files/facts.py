"""What is told of a file."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import Any

from isolator.files.paths import Names, name_text, quote_path
from isolator.files.roots import kind_of
from isolator.model.agent import timestamp


@dataclass(frozen=True, slots=True)
class FileFacts:
    """One file, folder or link: size in bytes, mode as the permission bits, changed in nanoseconds."""

    kind: str
    size: int
    mode: int
    changed: int
    inode: int
    target: bytes | None = None

    @classmethod
    def of(cls, facts: os.stat_result, target: bytes | None = None) -> FileFacts:
        """From the kernel's word."""
        mode = stat.S_IMODE(facts.st_mode)
        return cls(kind_of(facts.st_mode), facts.st_size, mode, facts.st_mtime_ns, facts.st_ino, target)

    @property
    def etag(self) -> str:
        """Another one after every change that shows in inode, size or time."""
        return f'"{self.inode:x}-{self.size:x}-{self.changed:x}"'

    def answer(self, names: Names) -> dict[str, Any]:
        """In JSON; `path` can be put behind `/files`, whatever bytes the name has."""
        return {
            "name": name_text(names[-1]) if names else "/",
            "path": quote_path(names),
            "type": self.kind,
            "size": self.size,
            "mode": f"{self.mode:04o}",
            "mtime": moment(self.changed),
            "etag": self.etag,
            "target": None if self.target is None else name_text(self.target),
        }


def moment(nanoseconds: int) -> str | None:
    """RFC 3339, or None: an agent may give its files any time, also in the year 40000."""
    try:
        return timestamp(nanoseconds / 1e9)
    except (ValueError, OverflowError, OSError):
        return None
