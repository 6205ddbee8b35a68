"""From an image's name to the one digest that may run under it.

Names of our own images mean what the lock file pins, never what a tag happens to point to. Any other image runs only
if its digest is on the operator's list, and only after its file system was checked without starting it.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from isolator.backends.docker.engine import Engine
from isolator.images.inspect import check_foreign_image
from isolator.images.lock import read_lock
from isolator.model.errors import BadRequest, BoxFailed, Forbidden, NotFound
from isolator.model.image import ImageFacts
from isolator.model.names import check_image_reference

_log = logging.getLogger(__name__)
_OUR_PYTHON = "/usr/bin/python3"


class ImageResolver:
    """Names to digests, on one engine. What was checked of a digest is kept: digests do not change."""

    def __init__(self, engine: Engine, lock: Path, allowed: list[str]) -> None:
        """`lock`: the pin file; `allowed`: digests of foreign images."""
        self._engine = engine
        self._lock = lock
        self._allowed = frozenset(allowed)
        self._known: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {}
        self._checking: dict[str, asyncio.Lock] = {}

    def pins(self) -> dict[str, str]:
        """Our images' names and digests, as pinned now.

        Raises:
            Forbidden: `image_lock_unsafe`. BadRequest: `image_lock_invalid`.
        """
        return read_lock(self._lock)

    async def resolve(self, reference: str) -> ImageFacts:
        """The image a spawn names.

        Raises:
            BadRequest: `image_invalid`. NotFound: `image_not_found`.
            Forbidden: `image_not_allowed` (with the digest to allow), `image_unsafe`, `image_unsupported`.
        """
        check_image_reference(reference)
        pins = self.pins()
        name = reference.removesuffix(":latest")
        if name in pins:
            digest = pins[name]
        elif name.startswith("isolator/"):
            raise NotFound(
                "image_not_found",
                f"{name} is not built on this host. Run: isolator image build {name.removeprefix('isolator/')}",
                image=name,
            )
        else:
            digest = await self._digest_of(reference)
            if digest not in self._allowed and digest not in pins.values():
                raise Forbidden(
                    "image_not_allowed",
                    f"{reference} is a foreign image. To allow exactly this one, add {digest} to"
                    " ISOLATOR_ALLOWED_IMAGES and restart the daemon.",
                    image=reference,
                    digest=digest,
                )
        interpreter, environment = await self._facts(reference, digest, ours=digest in pins.values())
        return ImageFacts(reference, digest, interpreter, environment)

    async def _digest_of(self, reference: str) -> str:
        try:
            found = await self._engine.call(lambda client: client.inspect_image(reference))
        except NotFound:
            raise NotFound(
                "image_not_found",
                f"The engine has no image {reference}. isolator never pulls: load it there first.",
                image=reference,
            ) from None
        except BoxFailed as error:
            raise BadRequest(
                "image_invalid", f"The engine can't read that image's name: {error.detail[-200:]}"
            ) from error
        return str(found["Id"])

    async def _facts(self, reference: str, digest: str, *, ours: bool) -> tuple[str, tuple[tuple[str, str], ...]]:
        if digest in self._known:
            return self._known[digest]
        async with self._checking.setdefault(digest, asyncio.Lock()):
            if digest in self._known:
                return self._known[digest]
            try:
                found = await self._engine.call(lambda client: client.inspect_image(digest))
            except NotFound:
                raise NotFound(
                    "image_not_found",
                    f"{reference} is pinned to {digest}, which the engine does not have. Build or load it again.",
                    image=reference,
                ) from None
            config = found.get("Config") or {}
            _refuse_tricks(reference, config)
            interpreter = _OUR_PYTHON
            if not ours:
                checked = await self._engine.call(lambda client: check_foreign_image(client, digest))
                if checked.python is None:
                    raise Forbidden(
                        "image_unsupported",
                        f"{reference} has no Python 3 at /usr/bin or /usr/local/bin, which the guest needs.",
                        image=reference,
                    )
                interpreter = checked.python
            pairs = (item.partition("=") for item in config.get("Env") or [])
            self._known[digest] = interpreter, tuple((key, value) for key, _, value in pairs)
            return self._known[digest]

    async def overview(self) -> list[dict[str, Any]]:
        """Pinned images and whether the engine has them."""
        images = []
        for name, digest in sorted(self.pins().items()):
            try:
                await self._engine.call(lambda client, digest=digest: client.inspect_image(digest))  # type: ignore[misc]
                present = True
            except NotFound:
                present = False
            images.append({"name": name, "digest": digest, "present": present})
        return images


def _refuse_tricks(reference: str, config: dict[str, Any]) -> None:
    """Refuse what an image adds to every container of it and no create call can take away."""
    if config.get("Volumes"):
        raise Forbidden(
            "image_unsafe",
            f"{reference} declares volumes, which would be writable places outside every limit.",
            image=reference,
            path=", ".join(sorted(config["Volumes"]))[:200],
        )
    names = (str(item).partition("=")[0] for item in config.get("Env") or [])
    for name in names:
        if name.startswith(("LD_", "GLIBC_")):
            raise Forbidden("image_unsafe", f"{reference} sets {name}, which steers the loader.", image=reference)
    for label in config.get("Labels") or {}:
        if str(label).startswith(("openclaw.", "isolator.")) and label not in (
            "isolator.image",
            "isolator.recipe",
        ):
            raise Forbidden("image_unsafe", f"{reference} carries the label {label}, which is ours.", image=reference)
