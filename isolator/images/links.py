"""Symbolic links in a tree that is not on disk, followed by name, within the tree, within bounds."""

from __future__ import annotations

from collections.abc import Callable

_MAX_LINKS = 40
_MAX_PARTS = 4096


def resolve(path: str, link_of: Callable[[str], str | None]) -> str | None:
    """Where `path` leads when every link on its way is followed below the tree's root.

    Args:
        path: relative to the root, or absolute (then the tree's root is meant).
        link_of: the target of the link at a path without leading slash, or None when there is no link there.

    Returns:
        A path without leading slash ("" is the root), which need not exist; None when links go in a circle.
    """
    pending = path.split("/")[::-1]
    done: list[str] = []
    followed = steps = 0
    while pending:
        steps += 1
        if steps > _MAX_PARTS:
            return None
        part = pending.pop()
        if part in {"", "."}:
            continue
        if part == "..":
            del done[-1:]
            continue
        target = link_of("/".join([*done, part]))
        if target is None:
            done.append(part)
            continue
        followed += 1
        if followed > _MAX_LINKS:
            return None
        if target.startswith("/"):
            done.clear()
        pending.extend(target.split("/")[::-1])
    return "/".join(done)
