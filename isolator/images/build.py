"""Recipe to image on the engine: unpack, repack, load, check what the engine made of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import docker
from docker.errors import APIError, DockerException

from isolator.images.archive import DockerArchive, write_docker_archive
from isolator.images.layer import Layer, write_layer
from isolator.images.recipe import Recipe, list_recipes, load_recipe
from isolator.images.rootfs import Package, RootFilesystem, build_rootfs
from isolator.model.errors import BoxFailed, Unavailable

BUILD_TIMEOUT = 600.0


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """An image that is on the engine.

    Attributes:
        name: `isolator/agent-python`, the key of the pin file.
        tag: `isolator/agent-python:0.1.0`; `:latest` points to the same image.
        image_id: "sha256:…", what to pin.
        packages: "name=version", sorted.
        size: bytes of all files in it.
        seconds: how long it took.
    """

    name: str
    tag: str
    image_id: str
    packages: tuple[str, ...]
    size: int
    seconds: float


def available_images() -> tuple[str, ...]:
    """Names `build_image` takes, sorted: `agent-node`, `agent-python`, `skill`."""
    return list_recipes()


@contextlib.contextmanager
def package_cache() -> Iterator[Path]:
    """A folder for `build_image(cache=…)`, shared by the images of one run and removed after it."""
    with tempfile.TemporaryDirectory(prefix="isolator-debs-") as folder:
        # apt's unprivileged downloader passes through it.
        Path(folder).chmod(0o755)
        yield Path(folder)


def build_image(
    name: str,
    *,
    engine: docker.APIClient | docker.DockerClient,
    progress: Callable[[str], None],
    recipes: Path | None = None,
    cache: Path | None = None,
    timeout: float = BUILD_TIMEOUT,
) -> BuiltImage:
    """Build `isolator/<name>` and leave it on the engine, tagged with its version and `latest`. Needs root.

    Args:
        name: one of `available_images()`.
        engine: where the image goes.
        progress: called with short lines that carry the seconds so far; may be called from another thread.
        recipes: folder of recipes; the shipped ones by default.
        cache: folder that keeps downloaded packages, see `package_cache`.
        timeout: seconds for downloading and unpacking.

    Raises:
        NotFound, BadRequest: the recipe is unknown or malformed.
        Unavailable: `image_builder_missing`, `image_builder_needs_root`, `image_sources_missing`,
            `engine_unavailable`.
        BoxFailed: `image_build_failed`, `image_build_timeout`.
    """
    started = time.monotonic()

    def say(line: str) -> None:
        progress(f"{name}: {line} ({time.monotonic() - started:.1f} s)")

    recipe = load_recipe(name, recipes)
    api = engine.api if isinstance(engine, docker.DockerClient) else engine
    repository = f"isolator/{recipe.name}"
    tags = (f"{repository}:{recipe.version}", f"{repository}:latest")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"isolator-{name}-")))
        debs = cache or stack.enter_context(package_cache())
        tree, layer = _unpack(recipe, folder, debs, say, timeout)
        tree.tar.unlink()
        labels = {
            **dict(recipe.labels),
            "isolator.image": recipe.name,
            "isolator.recipe": recipe_digest(recipe, tree.packages),
            "org.opencontainers.image.title": repository,
            "org.opencontainers.image.version": recipe.version,
            "org.opencontainers.image.description": recipe.summary,
        }
        archive = write_docker_archive(
            layer, folder / "image.tar", tags=tags, labels=labels, architecture=_architecture()
        )
        layer.path.unlink()
        say(f"loading {layer.size / 1e6:.0f} MB into the engine")
        image_id = _load(api, archive, tags, labels["isolator.recipe"])
    say(f"done, {image_id[:19]}")
    return BuiltImage(
        name=repository,
        tag=tags[0],
        image_id=image_id,
        packages=tuple(f"{package.name}={package.version}" for package in tree.packages),
        size=layer.size,
        seconds=time.monotonic() - started,
    )


def _unpack(
    recipe: Recipe, folder: Path, cache: Path, say: Callable[[str], None], timeout: float
) -> tuple[RootFilesystem, Layer]:
    try:
        say(f"unpacking {len(recipe.packages)} packages and what they depend on")
        tree = build_rootfs(recipe, folder, cache=cache, progress=say, timeout=timeout)
        say(f"packing {len(tree.packages)} packages")
        return tree, write_layer(tree.tar, folder / "layer.tar", recipe, tree.packages, tree.dropped)
    except (OSError, KeyError, subprocess.SubprocessError, tarfile.TarError) as error:
        # A full disk, most of all.
        raise BoxFailed("image_build_failed", f"{recipe.name}: {type(error).__name__}: {error}"[:500]) from error


def recipe_digest(recipe: Recipe, packages: tuple[Package, ...]) -> str:
    """Hex SHA-256 of the recipe and the sorted package versions: the inputs of a build, in one word."""
    inputs = {
        "recipe": recipe.digest,
        "packages": sorted(f"{package.name}={package.version}" for package in packages),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _load(api: docker.APIClient, archive: DockerArchive, tags: tuple[str, ...], digest: str) -> str:
    try:
        with archive.path.open("rb") as content:
            for line in api.load_image(content, quiet=True) or ():
                if "error" in line:
                    raise BoxFailed("image_build_failed", f"The engine refused the image: {line['error']}"[:500])
        found = [api.inspect_image(tag) for tag in tags]
    except APIError as error:
        raise BoxFailed("image_build_failed", f"The engine refused the image: {error.explanation}"[:500]) from error
    except (DockerException, OSError) as error:
        raise Unavailable("engine_unavailable", "The engine did not take the image. Is it running?") from error
    if len({image["Id"] for image in found}) != 1 or found[0]["Config"]["Labels"].get("isolator.recipe") != digest:
        raise BoxFailed("image_build_failed", f"{tags[0]} is not the image that was loaded. Is another build running?")
    return str(found[0]["Id"])


def _architecture() -> str:
    """Debian's name of the machine's architecture, which is the engine's too for amd64 and arm64."""
    answer = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True, timeout=10, check=True)
    return answer.stdout.strip()
