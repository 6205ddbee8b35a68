"""An image's recipe: what goes in, what is taken out, what is written, and nothing else.

Strict because a recipe decides what a hostile program finds around it: a misspelt `exectuables` that is
silently ignored would leave a shell in the skill image. Unknown keys, wrong types and paths that are not
plain absolute ones are refused by name.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isolator.model.errors import BadRequest, NotFound
from isolator.resources import resource_folder

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,40}")
_VERSION = re.compile(r"[0-9]+(\.[0-9]+){1,3}")
_SUITE = re.compile(r"[a-z][a-z-]{1,30}")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]{1,80}")
_PATH = re.compile(r"(/[A-Za-z0-9._+@*?=-]+)+")
_LABEL = re.compile(r"[a-z0-9][a-z0-9.-]{1,80}")
_RESERVED_LABELS = ("isolator.", "openclaw.", "com.docker.")
_MAX_RECIPE_BYTES = 64 * 1024

_LISTS = ("packages", "drop-packages", "directories", "strip", "executables")
_TABLES = ("bundles", "links", "labels")
_KEYS = {"name", "version", "summary", "suite", "file", *_LISTS, *_TABLES}


@dataclass(frozen=True, slots=True)
class AddedFile:
    """A file written into the image, owned by root.

    Attributes:
        path: absolute.
        content: the bytes.
        mode: permission bits; never setuid, setgid or writable by others.
    """

    path: str
    content: bytes
    mode: int = 0o644


@dataclass(frozen=True, slots=True)
class Recipe:
    """One image, as its recipe says, laid over `base.toml`.

    Attributes:
        name: `agent-python`; the image is `isolator/<name>`.
        version: dotted numbers, the image's tag.
        summary: one line for people.
        suite: Debian suite.
        packages: names given to the resolver; what they depend on comes along.
        drop_packages: packages whose files are taken out again.
        directories: made empty, owned by the agent's uid when named /workspace, else by root.
        strip: glob patterns of absolute paths; a match goes with everything below it.
        executables: patterns of the only files that may be executed; None = no such limit.
        bundles: (path, pattern of the files joined into it).
        links: (path, target of the symbolic link).
        files: written last.
        labels: further image labels.
        digest: hex SHA-256 over the bytes of base.toml and the recipe.
    """

    name: str
    version: str
    summary: str
    suite: str
    packages: tuple[str, ...]
    drop_packages: tuple[str, ...]
    directories: tuple[str, ...]
    strip: tuple[str, ...]
    executables: tuple[str, ...] | None
    bundles: tuple[tuple[str, str], ...]
    links: tuple[tuple[str, str], ...]
    files: tuple[AddedFile, ...]
    labels: tuple[tuple[str, str], ...]
    digest: str


def list_recipes(folder: Path | None = None) -> tuple[str, ...]:
    """Names of the images that have a recipe, sorted."""
    folder = folder or resource_folder("images")
    return tuple(sorted(entry.parent.name for entry in folder.glob("*/recipe.toml")))


def load_recipe(name: str, folder: Path | None = None) -> Recipe:
    """Read `<folder>/<name>/recipe.toml` over `<folder>/base.toml`.

    Raises:
        NotFound: `image_recipe_unknown`.
        BadRequest: `image_recipe_invalid`, the detail names file and key.
    """
    folder = folder or resource_folder("images")
    if not _NAME.fullmatch(name) or not (folder / name / "recipe.toml").is_file():
        known = ", ".join(list_recipes(folder)) or "none"
        raise NotFound("image_recipe_unknown", f"There is no image recipe of that name. Known: {known}.")
    base = folder / "base.toml"
    return parse_recipe(
        (folder / name / "recipe.toml").read_bytes(),
        base=base.read_bytes() if base.is_file() else b"",
        folder=name,
    )


def parse_recipe(text: bytes, *, base: bytes = b"", folder: str) -> Recipe:
    """Parse a recipe laid over a base: lists joined, tables merged, the recipe's own entry wins.

    Raises:
        BadRequest: `image_recipe_invalid`.
    """
    below, above = _read(base, "base.toml"), _read(text, f"{folder}/recipe.toml")
    merged: dict[str, Any] = {**below, **above}
    for key in (*_LISTS, "file"):
        if key in below or key in above:
            merged[key] = [*below.get(key, []), *above.get(key, [])]
    for key in _TABLES:
        merged[key] = {**below.get(key, {}), **above.get(key, {})}
    if merged.get("name") != folder:
        raise _refusal(f"{folder}/recipe.toml", "name", f"must be the folder's name, {folder!r}")
    for key, shape in (("version", _VERSION), ("suite", _SUITE)):
        if not shape.fullmatch(str(merged.get(key, ""))):
            raise _refusal(f"{folder}/recipe.toml", key, "is missing or malformed")
    if not merged.get("packages"):
        raise _refusal(f"{folder}/recipe.toml", "packages", "is empty: an image needs at least one")
    files = {entry.path: entry for entry in (_added_file(raw, folder) for raw in merged.get("file", []))}
    return Recipe(
        name=merged["name"],
        version=merged["version"],
        summary=merged.get("summary", ""),
        suite=merged["suite"],
        packages=_unique(merged["packages"]),
        drop_packages=_unique(merged.get("drop-packages", [])),
        directories=_unique(merged.get("directories", [])),
        strip=_unique(merged.get("strip", [])),
        executables=_unique(merged["executables"]) if "executables" in merged else None,
        bundles=tuple(sorted(merged["bundles"].items())),
        links=tuple(sorted(merged["links"].items())),
        files=tuple(files[path] for path in sorted(files)),
        labels=tuple(sorted(merged["labels"].items())),
        digest=hashlib.sha256(b"%d\n%s%s" % (len(base), base, text)).hexdigest(),
    )


def _read(text: bytes, where: str) -> dict[str, Any]:
    if len(text) > _MAX_RECIPE_BYTES:
        raise _refusal(where, "file", f"is over {_MAX_RECIPE_BYTES} bytes")
    try:
        table = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRequest("image_recipe_invalid", f"{where} is not TOML: {error}.") from error
    for key, value in table.items():
        if key not in _KEYS:
            raise _refusal(where, key, "is unknown")
        _check(where, key, value)
    return table


def _check(where: str, key: str, value: Any) -> None:
    if key in _LISTS:
        _check_list(where, key, value)
    elif key in _TABLES:
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise _refusal(where, key, "must be a table of strings")
        for name, item in value.items():
            _check_pair(where, key, name, item)
    elif key == "file":
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise _refusal(where, key, "must be written as [[file]]")
    elif not isinstance(value, str):
        raise _refusal(where, key, "must be a string")


def _check_list(where: str, key: str, value: Any) -> None:
    shape = _PACKAGE if "packages" in key else _PATH
    if not isinstance(value, list):
        raise _refusal(where, key, "must be a list of strings")
    for item in value:
        if not isinstance(item, str) or not shape.fullmatch(item) or not _plain(item):
            raise _refusal(where, key, f"has a malformed entry {item!r}")


def _check_pair(where: str, key: str, name: str, value: str) -> None:
    if key == "labels":
        if not _LABEL.fullmatch(name) or name.startswith(_RESERVED_LABELS):
            raise _refusal(where, f"labels.{name}", "is malformed or reserved")
        return
    if not _PATH.fullmatch(name) or not _plain(name) or set(name) & set("*?"):
        raise _refusal(where, f"{key}.{name}", "must be a plain absolute path")
    if key == "bundles" and not _PATH.fullmatch(value):
        raise _refusal(where, f"{key}.{name}", "must be joined from absolute paths")
    if not value or not value.isprintable() or ".." in value.split("/"):
        raise _refusal(where, f"{key}.{name}", "has a malformed value")


def _added_file(raw: dict[str, Any], folder: str) -> AddedFile:
    where = f"{folder}/recipe.toml"
    unknown = set(raw) - {"path", "content", "mode"}
    if unknown:
        raise _refusal(where, f"file.{min(unknown)}", "is unknown")
    path, content, mode = raw.get("path"), raw.get("content"), raw.get("mode", "0644")
    if not isinstance(path, str) or not _PATH.fullmatch(path) or not _plain(path) or set(path) & set("*?"):
        raise _refusal(where, "file.path", "must be a plain absolute path")
    if not isinstance(content, str):
        raise _refusal(where, "file.content", "must be a string")
    if mode not in {"0644", "0755", "0444", "0555"}:
        raise _refusal(where, "file.mode", 'must be "0644", "0755", "0444" or "0555"')
    return AddedFile(path=path, content=content.removeprefix("\n").encode(), mode=int(mode, 8))


def _plain(path: str) -> bool:
    return not {"..", "."} & set(path.split("/"))


def _unique(items: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))


def _refusal(where: str, key: str, why: str) -> BadRequest:
    return BadRequest("image_recipe_invalid", f"{where}: {key} {why}.", file=where, key=key)
