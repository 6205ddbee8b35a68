"""Is a foreign image safe to start? Answered from its bytes, before any container of it exists.

Starting a container makes the runtime mount /proc, /sys, /dev and the box's own folders into the image's
tree. Where the image has a symbolic link or a file in such a place, known runtimes were led to mount or
write elsewhere. So these places must be plain folders or absent. What the programs in the image do is not
judged: the box is for that.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import docker
from docker.errors import APIError, DockerException, ImageNotFound
from requests.exceptions import RequestException

from isolator.images.links import resolve
from isolator.images.tarstream import ChunkReader, Member, TarError, gunzip, read_members
from isolator.images.tree import Entry, Tree, TreeError, clean_path
from isolator.model.errors import BadRequest, Forbidden, NotFound, TooLarge, Unavailable

# Mounted over, or written to by the engine, when a container starts.
GUARDED_FOLDERS = ("dev", "proc", "sys", "run", "tmp", "etc", "workspace", "skills")
_GUARDED_DEEPER = (
    "dev/pts", "dev/shm", "dev/mqueue", "run/isolator", "run/secrets", "sys/fs", "sys/fs/cgroup",
)  # fmt: skip
# The engine binds these itself; a file is as good as none.
_GUARDED_FILES = ("etc/hosts", "etc/hostname", "etc/resolv.conf")
_PYTHONS = ("usr/bin/python3", "usr/local/bin/python3")

_IMAGE_ID = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_BYTES = 8 << 30
_MAX_ENTRIES = 300_000
_MAX_NAME_BYTES = 32 << 20
_MAX_JSON = 4 << 20
_MAX_LAYERS = 256
_DEADLINE = 300.0


@dataclass(frozen=True, slots=True)
class ForeignImage:
    """An image that passed.

    Attributes:
        image_id: "sha256:…", the one asked for.
        python: an absolute path that leads to an executable file named as a Python 3 interpreter, or None.
        layers: how many.
        entries: how many tar entries they hold.
        bytes_read: size of the stream, decompressed.
        seconds: how long the check took.
    """

    image_id: str
    python: str | None
    layers: int
    entries: int
    bytes_read: int
    seconds: float


@dataclass(slots=True)
class _Budget:
    """Counts what was read against the bounds of one check."""

    max_bytes: int
    max_entries: int
    deadline: float
    read: int = 0
    entries: int = 0
    name_bytes: int = 0

    def take(self, count: int) -> None:
        self.read += count
        if self.read > self.max_bytes:
            raise _too_large(f"more than {self.max_bytes} bytes")
        if time.monotonic() > self.deadline:
            raise Unavailable("image_check_timeout", "The image's content could not be read in time. Try again.")

    def entry(self, name: str, link: str) -> None:
        self.entries += 1
        self.name_bytes += len(name) + len(link)
        if self.entries > self.max_entries or self.name_bytes > _MAX_NAME_BYTES:
            raise _too_large(f"more than {self.max_entries} files")


def check_foreign_image(
    engine: docker.APIClient | docker.DockerClient,
    image_id: str,
    *,
    max_bytes: int = _MAX_BYTES,
    max_entries: int = _MAX_ENTRIES,
    timeout: float = _DEADLINE,
) -> ForeignImage:
    """Read the whole image through the engine's export, without creating a container.

    Args:
        engine: the engine that holds the image.
        image_id: "sha256:…", never a tag: a tag may move between check and use.
        max_bytes: of the export, and of its layers decompressed.
        max_entries: of all layers together.
        timeout: seconds for the whole check, looked at with every piece read.

    Raises:
        BadRequest: `image_id_invalid`.
        NotFound: `image_not_found`.
        Forbidden: `image_unsafe`, with `path`.
        TooLarge: `image_too_large`.
        Unavailable: `engine_unavailable`, `image_check_timeout`.
    """
    if not _IMAGE_ID.fullmatch(image_id):
        raise BadRequest("image_id_invalid", "Name the image by its ID: sha256: and 64 hex digits.")
    started = time.monotonic()
    api = engine.api if isinstance(engine, docker.DockerClient) else engine
    budget = _Budget(max_bytes, max_entries, started + timeout)
    try:
        found = api.inspect_image(image_id)
        if found["Id"] != image_id:
            raise NotFound("image_not_found", "The engine knows this ID under another one.")
        return _check(_export(api, image_id), image_id, budget, started)
    except ImageNotFound as error:
        raise NotFound("image_not_found", "The engine has no image of this ID. Pull or load it first.") from error
    except TarError as error:
        raise _unsafe("/", f"its archive has {error}") from error
    except TreeError as error:
        raise _unsafe(error.path, error.why) from error
    except (APIError, DockerException, RequestException, OSError) as error:
        raise Unavailable("engine_unavailable", "The engine did not export the image. Is it running?") from error


def _export(api: docker.APIClient, image_id: str) -> Iterator[bytes]:
    stream = api.get_image(image_id, chunk_size=256 * 1024)
    try:
        yield from stream
    finally:
        stream.close()


def _check(stream: Iterator[bytes], image_id: str, budget: _Budget, started: float) -> ForeignImage:
    layers: dict[str, list[Entry]] = {}
    links: dict[str, str] = {}
    manifest: Any = None
    for member in read_members(ChunkReader(stream, budget.take)):
        name = clean_path(member.name)
        budget.entry(name, member.link)
        if name == "manifest.json":
            manifest = _read_json(member)
        elif member.kind == "2":
            # Older engines write a layer that several images share once, and link to it.
            links[name] = member.link
        elif member.kind == "0" and (name.endswith(".tar") or name.startswith("blobs/")):
            entries = _read_layer(member, budget)
            if entries is not None:
                layers[name] = entries
    order = _layer_names(manifest)
    tree = Tree(2 * budget.max_entries)
    for name in order:
        entries = layers.get(_follow(name, links))
        if entries is None:
            raise _unsafe("/", "a layer is missing or packed in an unknown way")
        tree.apply(entries)
    _demand_plain(tree)
    return ForeignImage(
        image_id=image_id,
        python=_find_python(tree),
        layers=len(order),
        entries=budget.entries,
        bytes_read=budget.read,
        seconds=time.monotonic() - started,
    )


def _read_json(member: Member) -> Any:
    if member.size > _MAX_JSON:
        raise _too_large("a manifest that is too long")
    try:
        return json.loads(member.read(member.size))
    except (ValueError, RecursionError) as error:
        raise _unsafe("/", "its manifest is not JSON") from error


def _layer_names(manifest: Any) -> list[str]:
    match manifest:
        case [{"Layers": [*names]}] if 0 < len(names) <= _MAX_LAYERS and all(isinstance(name, str) for name in names):
            return [clean_path(name) for name in names]
    raise _unsafe("/", "its manifest names no layers, or those of several images")


def _follow(name: str, links: dict[str, str]) -> str:
    if name not in links:
        return name
    folder = name.rpartition("/")[0]
    return resolve(f"{folder}/{links[name]}", links.get) or ""


def _read_layer(member: Member, budget: _Budget) -> list[Entry] | None:
    """The entries of a layer; None when the member is something else (a configuration, say)."""
    start = member.read(512)
    pieces = _chained(start, member)
    if start.startswith(b"\x1f\x8b"):
        source = ChunkReader(gunzip(pieces), budget.take)
    elif start[257:262] == b"ustar" or (len(start) == 512 and not start.strip(b"\x00")):
        # Already counted once, as part of the export.
        source = ChunkReader(pieces, _nothing)
    else:
        return None
    entries: list[Entry] = []
    for inner in read_members(source):
        budget.entry(inner.name, inner.link)
        entries.append(Entry(clean_path(inner.name), inner.kind, inner.link, inner.mode))
    return entries


def _chained(start: bytes, member: Member) -> Iterator[bytes]:
    yield start
    yield from member.chunks()


def _nothing(_: int) -> None:
    return


def _demand_plain(tree: Tree) -> None:
    for path in (*GUARDED_FOLDERS, *_GUARDED_DEEPER):
        node = tree.find(path)
        if node is not None and node.kind != "5":
            raise _unsafe(f"/{path}", "it must be a plain folder or absent, because it is mounted over")
    for path in _GUARDED_FILES:
        node = tree.find(path)
        if node is not None and node.kind not in {"0", "1"}:
            raise _unsafe(f"/{path}", "it must be a plain file or absent, because the engine mounts over it")


def _find_python(tree: Tree) -> str | None:
    for path in _PYTHONS:
        node = tree.resolve(path)
        if node is not None and node.kind == "0" and node.mode & 0o001:
            return f"/{path}"
    return None


def _unsafe(path: str, why: str) -> Forbidden:
    return Forbidden("image_unsafe", f"The image can't be run safely: {path}: {why}.", path=path)


def _too_large(what: str) -> TooLarge:
    return TooLarge("image_too_large", f"The image holds {what}: it can't be checked.")
