"""Which host folders a request may mount, and where: the part that needs no file system.

What is decided here is text: roots, system folders, targets. What the text really leads to is opened beneath the
root without following links by `host.folders`, which then asks `refuse_sensitive` again about the real path.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from isolator.model.box import WORKSPACE
from isolator.model.errors import BadRequest, Forbidden
from isolator.model.mount import PlannedMount
from isolator.model.request import EnsureRequest

# Neither these nor anything that contains them; below them nothing either, whatever the roots say.
SYSTEM_FOLDERS = tuple(
    PurePosixPath(path)
    for path in (
        "/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/run", "/sbin", "/sys",
        "/usr", "/var/lib/containerd", "/var/lib/docker", "/var/lib/isolator", "/var/run",
    )
)  # fmt: skip
# Inside the box: the guest, its interpreter and what the kernel shows must stay what the image made them.
RESERVED_TARGETS = tuple(
    PurePosixPath(path)
    for path in (
        "/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/run", "/sbin", "/skills",
        "/sys", "/tmp", "/usr", "/var/run",
    )
)  # fmt: skip


def plan_mounts(
    request: EnsureRequest, roots: Sequence[PurePosixPath], own_folders: Sequence[PurePosixPath]
) -> tuple[PlannedMount, ...]:
    """The mounts of a request, workspace first.

    Args:
        request: the spawn.
        roots: folders below which mounts may lie, as the operator named them.
        own_folders: isolator's state, runtime and secret folders.

    Raises:
        BadRequest: `mount_path_invalid`, `mount_target_invalid`.
        Forbidden: `mount_outside_roots`, `mount_system_folder`.
    """
    wanted = [(mount.source, mount.target, mount.mode, False) for mount in request.mounts]
    if request.workspace is not None:
        wanted.insert(0, (request.workspace.source, WORKSPACE, request.workspace.mode, True))
    planned: list[PlannedMount] = []
    for source, target, mode, must_be_folder in wanted:
        clean = _clean_path(source, "mount_path_invalid", "mount source")
        refuse_sensitive(clean, own_folders)
        root = _root_of(clean, roots)
        planned.append(
            PlannedMount(
                source=str(clean),
                root=str(root),
                relative=str(clean.relative_to(root)),
                target=_check_target(target, planned),
                read_only=mode == "ro",
                must_be_folder=must_be_folder,
            )
        )
    return tuple(planned)


def refuse_sensitive(path: PurePosixPath, own_folders: Sequence[PurePosixPath]) -> None:
    """Refuse the host's system folders and isolator's own, what lies in them, and what contains them.

    Raises:
        Forbidden: `mount_system_folder`.
    """
    for folder in (*SYSTEM_FOLDERS, *own_folders):
        if _holds(folder, path) or _holds(path, folder):
            raise Forbidden(
                "mount_system_folder",
                f"{path} is, holds, or lies in {folder}, which no agent may see. Mount a folder of your own.",
                source=str(path),
            )


def _holds(outer: PurePosixPath, inner: PurePosixPath) -> bool:
    """Whether one is the other, or lies in it. Of absolute paths; each spawn asks this some hundred times."""
    return outer.parts == inner.parts[: len(outer.parts)]


def _clean_path(text: str, code: str, what: str) -> PurePosixPath:
    path = PurePosixPath(text)
    printable = text.isprintable() and "\x00" not in text
    if (
        not printable
        or not text.startswith("/")
        or text.startswith("//")
        or str(path) != (text.rstrip("/") or "/")
        or ".." in path.parts
    ):
        raise BadRequest(
            code,
            f"A {what} must be an absolute path without '.', '..', '//' or control characters.",
            path=text[:256].encode("ascii", "backslashreplace").decode(),
        )
    return path


def _root_of(path: PurePosixPath, roots: Sequence[PurePosixPath]) -> PurePosixPath:
    for root in roots:
        if _holds(root, path):
            return root
    known = ", ".join(str(root) for root in roots) or "none: set ISOLATOR_WORKSPACE_ROOTS"
    raise Forbidden(
        "mount_outside_roots",
        f"{path} lies below none of the workspace roots ({known}).",
        source=str(path),
    )


def _check_target(text: str, planned: Sequence[PlannedMount]) -> str:
    target = _clean_path(text, "mount_target_invalid", "mount target")
    for reserved in RESERVED_TARGETS:
        if _holds(reserved, target) or _holds(target, reserved):
            raise BadRequest(
                "mount_target_invalid",
                f"{target} is kept for the box itself. Choose another place, such as /data.",
                path=str(target),
            )
    for other in planned:
        taken = PurePosixPath(other.target)
        if _holds(taken, target) or _holds(target, taken):
            raise BadRequest(
                "mount_target_invalid",
                f"{target} and {taken} are the same or lie in each other: mounting one would write into the other.",
                path=str(target),
            )
    return str(target)
