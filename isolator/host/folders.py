"""Opening, staging and comparing the host folders an agent gets.

A path is trusted only once, at the moment it is opened: beneath its root, without following any link, with the
caller's own rights. From then on the open descriptor is what counts. It is bound to a place only root can reach,
the engine mounts that place, and after the start the device and inode inside the box must be the descriptor's.
Swapping a folder for a link at any moment in between gains nothing.

A folder that appears while the caller holds it open elsewhere is not a miss: what was opened is what is mounted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from isolator.host import syscalls
from isolator.model.box import BoxMount, BoxSpec
from isolator.model.errors import BadRequest, BoxFailed, Forbidden, NotFound, Unavailable
from isolator.model.identity import Principal
from isolator.model.mount import OpenedMount, PlannedMount

_BENEATH = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS


@dataclass(frozen=True, slots=True)
class HeldFolder:
    """An opened mount and the descriptor that holds it; the holder closes it."""

    opened: OpenedMount
    descriptor: int


def close_all(held: Sequence[HeldFolder]) -> None:
    """Close the descriptors."""
    for folder in held:
        with contextlib.suppress(OSError):
            os.close(folder.descriptor)


class FolderOpener:
    """Opens planned mounts with the caller's rights, on one thread kept for that.

    Raises (from `open_all`):
        NotFound: `mount_not_found`.
        Forbidden: `mount_not_reachable`, `mount_is_link`, `mount_system_folder`, `mount_kind_refused`.
        BadRequest: `workspace_not_a_folder`.
        Unavailable: `mounts_unavailable` where the daemon is not root.
    """

    def __init__(self, refuse_sensitive: Callable[[PurePosixPath], None]) -> None:
        """`refuse_sensitive`: the policy's word on a real path; it raises."""
        self._refuse_sensitive = refuse_sensitive
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="isolator-folders")

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False)

    async def open_all(self, planned: Sequence[PlannedMount], caller: Principal) -> list[HeldFolder]:
        """Open every planned mount; all or none."""
        if not planned:
            return []
        if os.geteuid() != 0:
            raise Unavailable(
                "mounts_unavailable",
                "Only a daemon run by root can mount folders safely. Run it as a service, or spawn without mounts.",
            )
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._open_all, planned, caller)

    def _open_all(self, planned: Sequence[PlannedMount], caller: Principal) -> list[HeldFolder]:
        held: list[HeldFolder] = []
        try:
            syscalls.set_thread_identity(caller.uid, caller.gid, caller.groups)
            try:
                for plan in planned:
                    held.append(self._open(plan, caller))  # noqa: PERF401 - what was opened before a failure is closed
            finally:
                syscalls.set_thread_identity(0, 0, ())
        except BaseException:
            close_all(held)
            raise
        return held

    def _open(self, plan: PlannedMount, caller: Principal) -> HeldFolder:
        try:
            root = os.open(plan.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _refusal(error, plan) from error
        try:
            descriptor = syscalls.openat2(root, plan.relative, os.O_PATH, _BENEATH)
        except OSError as error:
            raise _refusal(error, plan) from error
        finally:
            os.close(root)
        try:
            return HeldFolder(self._examine(plan, descriptor, caller), descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def _examine(self, plan: PlannedMount, descriptor: int, caller: Principal) -> OpenedMount:
        facts = os.fstat(descriptor)
        is_folder = stat.S_ISDIR(facts.st_mode)
        if plan.must_be_folder and not is_folder:
            raise BadRequest("workspace_not_a_folder", f"{plan.source} is not a folder.", source=plan.source)
        if not is_folder and not stat.S_ISREG(facts.st_mode):
            raise Forbidden(
                "mount_kind_refused",
                f"{plan.source} is neither a folder nor a plain file; sockets, devices and pipes are never mounted.",
                source=plan.source,
            )
        # Where it really is: the root itself may be a bind mount or a link the operator made.
        self._refuse_sensitive(PurePosixPath(_real_path(descriptor)))
        needed = os.R_OK | (0 if plan.read_only else os.W_OK) | (os.X_OK if is_folder else 0)
        if caller.uid != 0 and not syscalls.may_access(descriptor, needed):
            verb = "read" if plan.read_only else "write"
            raise Forbidden(
                "mount_not_reachable",
                f"uid {caller.uid} itself may not {verb} {plan.source}, so neither may its agent.",
                source=plan.source,
            )
        return OpenedMount(plan, facts.st_dev, facts.st_ino, facts.st_uid, facts.st_gid, is_folder)


def _real_path(descriptor: int) -> str:
    # The name must be read as root: the thread that opened it may lack the right to look at its own links.
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def _refusal(error: OSError, plan: PlannedMount) -> Exception:
    match error.errno:
        case 2 | 20:
            return NotFound("mount_not_found", f"{plan.source} is not there.", source=plan.source)
        case 13 | 1:
            return Forbidden(
                "mount_not_reachable", f"The caller itself may not reach {plan.source}.", source=plan.source
            )
        case 40 | 18:
            return Forbidden(
                "mount_is_link",
                f"{plan.source} is or passes through a symbolic link. Name the real folder.",
                source=plan.source,
            )
    return Forbidden("mount_not_reachable", f"{plan.source} can't be opened: {error.strerror}.", source=plan.source)


def stage(spec: BoxSpec, held: Sequence[HeldFolder]) -> None:
    """Bind each held folder to its staged place, where only root can get at it.

    Raises:
        OSError: the kernel refused; what was staged is left for `unstage`.
    """
    for mount, folder in zip(spec.mounts, held, strict=True):
        place = Path(mount.staged)
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if mount.is_folder:
            place.mkdir(mode=0o700)
        else:
            place.touch(mode=0o600, exist_ok=False)
        syscalls.bind_mount(folder.descriptor, mount.staged)


def unstage(folder: Path) -> None:
    """Undo `stage` for one agent's folder of staged places; what is absent is fine."""
    if not folder.is_dir():
        return
    for place in folder.iterdir():
        with contextlib.suppress(OSError):
            syscalls.unmount(str(place))
        with contextlib.suppress(OSError):
            place.rmdir() if place.is_dir() and not place.is_symlink() else place.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def check_mounts_inside(spec: BoxSpec, pid: int) -> None:
    """Compare device and inode of every mount inside the started box with what was opened.

    Raises:
        BoxFailed: `box_mismatch`, naming the mount.
    """
    if not spec.mounts:
        return
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for mount in spec.mounts:
            inside = _stat_inside(root, mount)
            if inside != (mount.device, mount.inode):
                raise BoxFailed(
                    "box_mismatch",
                    f"What is mounted at {mount.target} is not the folder that was checked.",
                    field=f"mounts[{mount.target}]",
                )
    finally:
        os.close(root)


def _stat_inside(root: int, mount: BoxMount) -> tuple[int, int] | None:
    try:
        found = syscalls.openat2(root, mount.target.lstrip("/"), os.O_PATH, syscalls.RESOLVE_IN_ROOT)
    except OSError:
        return None
    try:
        facts = os.fstat(found)
        return facts.st_dev, facts.st_ino
    finally:
        os.close(found)
