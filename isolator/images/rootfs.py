"""Packages to a root filesystem: mmdebstrap, a bounded child that unpacks and runs no maintainer script.

The one program run inside the new tree is its own Python, to compile its standard library: the byte code is
then marked `unchecked-hash`, so that it stays valid whatever the file times are, and PID 1 of every box
starts quickly.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from isolator.images.recipe import Recipe
from isolator.images.sources import carried_options, find_sources
from isolator.model.errors import BoxFailed, Unavailable

# Every file's time in an image: Debian 12's release day. Any constant would do.
EPOCH = 1686355200

_TERMINATE_GRACE = 20.0
_KEPT_LINES = 30
_TOOLS = ("mmdebstrap", "dpkg-deb", "tar", "chroot")

_SETUP_HOOK = """#!/bin/sh
set -eu
for name in bin sbin lib; do mkdir -p "$1/usr/$name"; ln -s "usr/$name" "$1/$name"; done
if [ "$(dpkg --print-architecture)" = amd64 ]; then mkdir -p "$1/usr/lib64"; ln -s usr/lib64 "$1/lib64"; fi
mkdir -p "$1/var/cache/apt/archives/partial"
find "$ISOLATOR_CACHE" -maxdepth 1 -name '*.deb' -exec cp -t "$1/var/cache/apt/archives" {} +
"""

_EXTRACT_HOOK = """#!/bin/sh
set -eu
for deb in $MMDEBSTRAP_ESSENTIAL; do
    [ -e "$ISOLATOR_CACHE/${deb##*/}" ] || cp "$1/$deb" "$ISOLATOR_CACHE/"
    printf '%s\\n' "${deb##*/}" >> "$ISOLATOR_OUT/debs"
done
if [ -x "$1/usr/bin/python3" ]; then
    env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin PYTHONHASHSEED=0 LANG=C.UTF-8 \\
        chroot "$1" /usr/bin/python3 -S -c "$ISOLATOR_COMPILE"
fi
"""

# A whole list in one process and in a fixed order: byte code depends on what was interned before.
_COMPILE = """
import compileall, glob, py_compile, re
for folder in sorted(glob.glob("/usr/lib/python3*")):
    compileall.compile_dir(
        folder, maxlevels=20, quiet=2, force=True, workers=1,
        rx=re.compile("/(test|tests|lib2to3|idlelib|turtledemo)/"),
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
"""


@dataclass(frozen=True, slots=True)
class Package:
    """One Debian package in the image.

    Attributes:
        name: as in the archive.
        version: full Debian version.
        control: its control stanza, for scanners.
    """

    name: str
    version: str
    control: str


@dataclass(frozen=True, slots=True)
class RootFilesystem:
    """What the child left behind.

    Attributes:
        tar: uncompressed tar of the tree.
        packages: those that stay, sorted by name.
        dropped: paths ("usr/bin/perl") that only dropped packages ship.
    """

    tar: Path
    packages: tuple[Package, ...]
    dropped: frozenset[str]


def build_rootfs(
    recipe: Recipe, folder: Path, *, cache: Path, progress: Callable[[str], None], timeout: float
) -> RootFilesystem:
    """Unpack the recipe's packages into `folder/rootfs.tar`.

    Args:
        recipe: what to unpack.
        folder: empty, on a disk with about 1 GiB to spare; the caller removes it.
        cache: folder of .deb files shared between images; apt verifies each against the signed index again.
        progress: called with short lines.
        timeout: seconds for the whole child.

    Raises:
        Unavailable: `image_builder_missing`, `image_builder_needs_root`, `image_sources_missing`.
        BoxFailed: `image_build_failed`, with the child's last lines; `image_build_timeout`.
    """
    for tool in _TOOLS:
        if shutil.which(tool) is None:
            raise Unavailable(
                "image_builder_missing",
                f"{tool} is not installed: images are built with mmdebstrap. apt-get install mmdebstrap.",
                tool=tool,
            )
    if os.geteuid() != 0:
        raise Unavailable("image_builder_needs_root", "Images are built as root: files in them belong to root.")
    sources = folder / "sources.list"
    sources.write_text("\n".join(find_sources(recipe.suite)) + "\n")
    target, scratch = folder / "rootfs.tar", folder / "tmp"
    scratch.mkdir()
    # apt drops its privileges to _apt while it downloads, and must be able to pass through.
    scratch.chmod(0o755)
    folder.chmod(0o755)
    hooks = [folder / "setup.sh", folder / "extract.sh"]
    for path, script in zip(hooks, (_SETUP_HOOK, _EXTRACT_HOOK), strict=True):
        path.write_text(script)
        path.chmod(0o755)
    command = [
        "mmdebstrap", "--variant=extract", "--format=tar",
        "--skip=chroot/mount,essential/unlink,check/empty",
        f"--include={','.join(recipe.packages)}",
        *(f"--aptopt={option}" for option in ('APT::Install-Recommends "false"', *carried_options())),
        f"--setup-hook={hooks[0]}", f"--extract-hook={hooks[1]}",
        recipe.suite, str(target), str(sources),
    ]  # fmt: skip
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "SOURCE_DATE_EPOCH": str(EPOCH),
        "ISOLATOR_CACHE": str(cache),
        "ISOLATOR_OUT": str(folder),
        "ISOLATOR_COMPILE": _COMPILE,
        **{key: value for key, value in os.environ.items() if key.lower() in {"http_proxy", "https_proxy", "no_proxy"}},
    }
    _run_child(command, environment, progress, timeout)
    packages, dropped = _read_packages(folder / "debs", cache, frozenset(recipe.drop_packages))
    return RootFilesystem(tar=target, packages=packages, dropped=dropped)


def _run_child(
    command: list[str], environment: dict[str, str], progress: Callable[[str], None], timeout: float
) -> None:
    lines: list[str] = []
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as child:
        reader = threading.Thread(target=_follow, args=(child, lines, progress), daemon=True)
        reader.start()
        try:
            code = child.wait(timeout)
        except subprocess.TimeoutExpired:
            raise BoxFailed(
                "image_build_timeout",
                f"mmdebstrap did not finish in {timeout:.0f} s. Is the package mirror reachable?",
            ) from None
        finally:
            _end_group(child)
            reader.join(_TERMINATE_GRACE)
    if code != 0:
        tail = " | ".join(lines[-6:]) or f"exit code {code}, no output"
        raise BoxFailed("image_build_failed", f"mmdebstrap failed: {tail}"[:2000], exit_code=code)


def _follow(child: subprocess.Popen[str], lines: list[str], progress: Callable[[str], None]) -> None:
    assert child.stderr is not None
    for raw in child.stderr:
        line = raw.strip()[:500]
        if not line:
            continue
        lines.append(line)
        del lines[:-_KEPT_LINES]
        if line.startswith("I: ") and line.endswith("..."):
            progress(line.removeprefix("I: ").removesuffix("..."))


def _end_group(child: subprocess.Popen[str]) -> None:
    """SIGTERM lets mmdebstrap remove its temporary tree; SIGKILL follows for what is left of the group."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        deadline = time.monotonic() + _TERMINATE_GRACE
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _read_packages(listing: Path, cache: Path, drop: frozenset[str]) -> tuple[tuple[Package, ...], frozenset[str]]:
    kept: list[Package] = []
    dropped: set[str] = set()
    for name in sorted(set(listing.read_text().split())):
        deb = cache / name
        control = subprocess.run(
            ["dpkg-deb", "--field", str(deb)], capture_output=True, text=True, timeout=30, check=True
        ).stdout
        fields = dict(line.split(": ", 1) for line in control.splitlines() if ": " in line and line[0] != " ")
        if fields["Package"] in drop:
            dropped.update(_paths(deb))
        else:
            kept.append(Package(fields["Package"], fields["Version"], control))
    return tuple(sorted(kept, key=lambda package: package.name)), frozenset(dropped)


def _paths(deb: Path) -> Iterator[str]:
    """Paths of a package's non-directories, with /bin, /sbin and /lib told by their place below /usr."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        with tarfile.open(fileobj=child.stdout, mode="r|") as archive:
            for member in archive:
                path = member.name.removeprefix("./")
                if not member.isdir():
                    yield f"usr/{path}" if path.split("/")[0] in {"bin", "sbin", "lib", "lib64"} else path
