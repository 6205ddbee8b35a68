"""A root filesystem to one deterministic layer: same content, same bytes, on any machine, at any time.

Everything that differs between two builds of the same packages is fixed here: order, times, owners' names,
and the logs and caches that building leaves. Everything that gives a program more than its user has is
taken out: setuid and setgid bits, file capabilities (extended attributes are never copied), device nodes,
sockets and pipes.
"""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import io
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from isolator.images.links import resolve
from isolator.images.recipe import Recipe
from isolator.images.rootfs import EPOCH, Package
from isolator.model.errors import BoxFailed

AGENT_UID = 10001

# The engine mounts over these; an image that holds anything else there could redirect a mount.
_EMPTY_FOLDERS = {"dev": 0o755, "proc": 0o755, "sys": 0o755, "run": 0o755, "tmp": 0o1777, "var/tmp": 0o1777}
_PROGRAM_FOLDERS = (
    "usr/bin/",
    "usr/sbin/",
    "usr/local/bin/",
    "usr/local/sbin/",
    "usr/libexec/",
    "usr/games/",
)
_STATUS_FOLDER = "var/lib/dpkg/status.d"


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's tar on disk.

    Attributes:
        path: the uncompressed tar.
        diff_id: hex SHA-256 of it.
        size: sum of the file sizes in it, bytes.
    """

    path: Path
    diff_id: str
    size: int


@dataclass(slots=True)
class _Entry:
    """A tar header with where its bytes come from: `data`, or the member of the source."""

    info: tarfile.TarInfo
    data: bytes | None = None
    source: tarfile.TarInfo | None = None


def write_layer(
    source: Path,
    target: Path,
    recipe: Recipe,
    packages: Iterable[Package] = (),
    dropped: frozenset[str] = frozenset(),
) -> Layer:
    """Repack the tar `source` into `target` as the recipe says.

    Raises:
        BoxFailed: `image_build_failed` when the tree lacks something the recipe relies on.
    """
    with tarfile.open(source, mode="r:") as archive:
        entries = _collect(archive, recipe, dropped)
        _add(entries, archive, recipe, packages)
        _limit_programs(entries, archive, recipe)
        _drop_dangling(entries)
        return _write(entries, archive, target)


def _collect(archive: tarfile.TarFile, recipe: Recipe, dropped: frozenset[str]) -> dict[str, _Entry]:
    strip = re.compile("|".join(fnmatch.translate(pattern.lstrip("/")) for pattern in recipe.strip) or r"(?!)")
    contents = {_clean(member.name): member for member in archive.getmembers()}
    entries: dict[str, _Entry] = {}
    for path, member in sorted(contents.items()):
        if not path or path in dropped or _stripped(path, strip):
            continue
        if path.split("/")[0] in _EMPTY_FOLDERS or path.startswith("var/tmp/"):
            continue
        origin = member
        while origin.islnk():
            # A hard link's data is its first name's; whichever name survives carries it.
            origin = contents[_clean(origin.linkname)]
        if member.isdir() or origin.issym() or origin.isreg():
            entries[path] = _Entry(_header(path, origin), source=origin if origin.isreg() else None)
    for path, mode in _EMPTY_FOLDERS.items():
        entries[path] = _Entry(_folder(path, mode))
    return entries


def _clean(name: str) -> str:
    """Without the leading "./"; the root itself is ""."""
    return "/".join(part for part in name.split("/") if part not in {"", "."})


def _stripped(path: str, strip: re.Pattern[str]) -> bool:
    """A match of the path or of any folder above it."""
    parts = path.split("/")
    return any(strip.match("/".join(parts[:count])) for count in range(1, len(parts) + 1))


def _header(path: str, origin: tarfile.TarInfo) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.type = tarfile.REGTYPE if origin.isreg() else origin.type
    info.uid, info.gid, info.mtime = origin.uid, origin.gid, EPOCH
    info.mode = 0o777 if origin.issym() else origin.mode & 0o755
    info.linkname = origin.linkname if origin.issym() else ""
    info.size = origin.size if origin.isreg() else 0
    return info


def _folder(path: str, mode: int = 0o755, owner: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.type, info.mode, info.mtime, info.uid, info.gid = tarfile.DIRTYPE, mode, EPOCH, owner, owner
    return info


def _put_file(entries: dict[str, _Entry], path: str, data: bytes, mode: int = 0o644) -> None:
    info = tarfile.TarInfo(path.lstrip("/"))
    info.mode, info.mtime, info.size = mode, EPOCH, len(data)
    entries[info.name] = _Entry(info, data=data)


def _add(entries: dict[str, _Entry], archive: tarfile.TarFile, recipe: Recipe, packages: Iterable[Package]) -> None:
    for path in recipe.directories:
        owner = AGENT_UID if path == "/workspace" else 0
        entries[path.lstrip("/")] = _Entry(_folder(path.lstrip("/"), owner=owner))
    for path, pattern in recipe.bundles:
        parts = fnmatch.filter(sorted(entries), pattern.lstrip("/"))
        if not parts:
            raise BoxFailed("image_build_failed", f"{recipe.name}: nothing matches {pattern}, wanted for {path}.")
        _put_file(entries, path, b"".join(_bytes(entries[part], archive).rstrip(b"\n") + b"\n" for part in parts))
    for path, linkname in recipe.links:
        info = tarfile.TarInfo(path.lstrip("/"))
        info.type, info.linkname, info.mode, info.mtime = tarfile.SYMTYPE, linkname, 0o777, EPOCH
        entries[info.name] = _Entry(info)
    for file in recipe.files:
        _put_file(entries, file.path, file.content, file.mode)
    for package in packages:
        _put_file(entries, f"{_STATUS_FOLDER}/{package.name}", package.control.encode())
    for path in list(entries):
        for depth in range(1, path.count("/") + 1):
            above = "/".join(path.split("/")[:depth])
            if above not in entries:
                entries[above] = _Entry(_folder(above))


def _limit_programs(entries: dict[str, _Entry], archive: tarfile.TarFile, recipe: Recipe) -> None:
    """Nothing but the listed executables may run; without a list, scripts whose interpreter is gone go."""
    allowed = None if recipe.executables is None else [pattern.lstrip("/") for pattern in recipe.executables]
    for path, entry in sorted(entries.items()):
        if not entry.info.isreg():
            continue
        if allowed is None:
            if entry.info.mode & 0o111 and not _interpreter_present(_start(entry, archive), entries):
                del entries[path]
        elif not any(fnmatch.fnmatchcase(path, pattern) for pattern in allowed):
            if path.startswith(_PROGRAM_FOLDERS):
                del entries[path]
            else:
                entry.info.mode &= ~0o111


def _interpreter_present(start: bytes, entries: dict[str, _Entry]) -> bool:
    if not start.startswith(b"#!"):
        return True
    words = start[2:].split(b"\n", 1)[0].decode(errors="replace").split()
    if words and words[0].endswith("/env"):
        program = next((word for word in words[1:] if not word.startswith("-")), "")
        wanted = [f"usr/bin/{program}"]
    else:
        wanted = [word.lstrip("/") for word in words[:1]]
    return any(_target(path, entries) is not None for path in wanted)


def _drop_dangling(entries: dict[str, _Entry]) -> None:
    """Links whose target was taken out. Links into what the engine mounts at run time stay."""
    for path in [path for path, entry in entries.items() if entry.info.issym()]:
        target = entries[path].info.linkname
        if not target.startswith(("/proc/", "/dev/", "/run/")) and _target(path, entries) is None:
            del entries[path]


def _target(path: str, entries: dict[str, _Entry]) -> str | None:
    def link_of(name: str) -> str | None:
        entry = entries.get(name)
        return entry.info.linkname if entry is not None and entry.info.issym() else None

    final = resolve(path, link_of)
    return final if final in entries else None


def _bytes(entry: _Entry, archive: tarfile.TarFile) -> bytes:
    if entry.source is None:
        return entry.data or b""
    reader = archive.extractfile(entry.source)
    assert reader is not None
    return reader.read()


def _start(entry: _Entry, archive: tarfile.TarFile) -> bytes:
    if entry.source is None:
        return (entry.data or b"")[:256]
    reader = archive.extractfile(entry.source)
    assert reader is not None
    return reader.read(256)


def _write(entries: dict[str, _Entry], archive: tarfile.TarFile, target: Path) -> Layer:
    size = 0
    first_names: dict[int, str] = {}
    with target.open("w+b") as raw:
        with tarfile.open(fileobj=raw, mode="w:", format=tarfile.GNU_FORMAT) as layer:
            for path in sorted(entries):
                entry = entries[path]
                origin = entry.source
                first = first_names.setdefault(origin.offset_data, path) if origin and origin.size else path
                if first != path:
                    linked = copy.copy(entry.info)
                    linked.type, linked.linkname, linked.size = tarfile.LNKTYPE, first, 0
                    layer.addfile(linked)
                elif origin is not None:
                    layer.addfile(entry.info, archive.extractfile(origin))
                else:
                    layer.addfile(entry.info, io.BytesIO(entry.data) if entry.data is not None else None)
                size += entry.info.size if first == path else 0
        raw.seek(0)
        return Layer(target, hashlib.file_digest(raw, "sha256").hexdigest(), size)
