"""Who asks: the kernel's word about the process at the other end of a Unix socket."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller, as the kernel named it when it connected. Nothing here was said by the caller itself."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    pid: int
    is_admin: bool = False

    @property
    def owner(self) -> str:
        """The name under which teams are owned and acts are audited."""
        return f"uid:{self.uid}"
