"""A layer to a docker-archive: what `docker load` takes, its image ID depending on the content alone.

The engine derives the ID from the configuration's bytes, which name the layer by its digest; so the
configuration holds no build time, host name or container id, and is written with sorted keys.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from isolator.images.layer import AGENT_UID, Layer
from isolator.images.rootfs import EPOCH

_CREATED = datetime.fromtimestamp(EPOCH, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, slots=True)
class DockerArchive:
    """A file for `docker load`.

    Attributes:
        path: the archive.
        config_digest: "sha256:…" of the configuration; the image ID on engines with the classic image store.
    """

    path: Path
    config_digest: str


def write_docker_archive(
    layer: Layer, target: Path, *, tags: tuple[str, ...], labels: dict[str, str], architecture: str
) -> DockerArchive:
    """Wrap one layer: no entry point, no volume, no exposed port, and a user that is not root."""
    config = json.dumps(
        {
            "architecture": architecture,
            "config": {
                "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8"],
                "Labels": labels,
                "User": f"{AGENT_UID}:{AGENT_UID}",
                "WorkingDir": "/",
            },
            "created": _CREATED,
            "history": [{"created": _CREATED, "created_by": "isolator image build"}],
            "os": "linux",
            "rootfs": {"diff_ids": [f"sha256:{layer.diff_id}"], "type": "layers"},
        },
        sort_keys=True,
        separators=(",", ":"),
    ).encode()
    digest = hashlib.sha256(config).hexdigest()
    manifest = [{"Config": f"{digest}.json", "Layers": [f"{layer.diff_id}/layer.tar"], "RepoTags": list(tags)}]
    with tarfile.open(target, mode="w", format=tarfile.GNU_FORMAT) as archive:
        _add_bytes(archive, f"{digest}.json", config)
        info = _header(f"{layer.diff_id}/layer.tar")
        info.size = layer.path.stat().st_size
        with layer.path.open("rb") as content:
            archive.addfile(info, content)
        _add_bytes(archive, "manifest.json", json.dumps(manifest, sort_keys=True).encode())
    return DockerArchive(target, f"sha256:{digest}")


def _header(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.mode, info.mtime = 0o644, EPOCH
    return info


def _add_bytes(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = _header(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))
