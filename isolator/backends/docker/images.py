"""From an image's name to the one digest that may run under it.

Names of our own images mean what the lock file pins, never what a tag happens to point to. Any other image runs only
if its digest is on the operator's list, and only after its file system was checked without starting it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from isolator.backends.docker.engine import Engine, translate
from isolator.images.inspect import check_foreign_image
from isolator.images.lock import read_lock
from isolator.model.errors import BadRequest, BoxFailed, Forbidden, NotFound, TooLarge
from isolator.model.image import ImageFacts
from isolator.model.names import check_image_reference

_OUR_PYTHON = "/usr/bin/python3"
# Older engines write the whole export to a file before its first byte arrives.
_EXPORT_SILENCE = 300.0


def _traits(path: Path) -> tuple[int, ...]:
    """What changes when a file or who may change it does."""
    file, folder = path.lstat(), path.parent.stat()
    return (
        *(file.st_dev, file.st_ino, file.st_mtime_ns, file.st_ctime_ns, file.st_size),
        *(folder.st_ino, folder.st_uid, folder.st_mode),
    )


class ImageResolver:
    """Names to digests, on one engine. What was checked of a digest is kept: digests do not change."""

    def __init__(self, engine: Engine, lock: Path, allowed: list[str]) -> None:
        """`lock`: the pin file; `allowed`: digests of foreign images."""
        self._engine = engine
        self._lock = lock
        self._allowed = frozenset(allowed)
        self._known: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {}
        # The pins as read last, and what the file and its folder were then.
        self._read: tuple[tuple[int, ...], dict[str, str]] | None = None
        self._checks = _ContentChecks(engine)

    def pins(self) -> dict[str, str]:
        """Our images' names and digests, as pinned now.

        Raises:
            Forbidden: `image_lock_unsafe`. BadRequest: `image_lock_invalid`.
        """
        try:
            seen = _traits(self._lock)
        except OSError:
            return read_lock(self._lock)  # which knows what to say of it
        if self._read is None or self._read[0] != seen:
            self._read = seen, read_lock(self._lock)
        return self._read[1]

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
        interpreter = _OUR_PYTHON if ours else await self._checks.python_of(digest)
        if interpreter is None:
            raise Forbidden(
                "image_unsupported",
                f"{reference} has no Python 3 at /usr/bin or /usr/local/bin, which the guest needs.",
                image=reference,
            )
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


class _ContentChecks:
    """What the content of foreign images says: read once for each digest, one image at a time.

    Reading may take longer than a spawn may. So it belongs to none of those who wait for it: whoever gave up finds it
    further on when asking again, or done. Nor is it the engine's workers' task, which are for calls that end soon.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._one = asyncio.Lock()
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._done: dict[str, str | Forbidden | TooLarge | None] = {}

    async def python_of(self, digest: str) -> str | None:
        """The image's Python 3, None if it has none.

        Raises:
            Forbidden: `image_unsafe`. TooLarge: `image_too_large`. What else a check raises was not the image's fault,
            and the next to ask has it made again.
        """
        if digest not in self._done:
            if digest not in self._under_way:
                self._under_way[digest] = asyncio.create_task(self._check(digest))
                self._under_way[digest].add_done_callback(lambda task: self._ended(digest, task))
            await asyncio.shield(self._under_way[digest])
        told = self._done[digest]
        if isinstance(told, Forbidden | TooLarge):
            raise _anew(told)
        return told

    def _ended(self, digest: str, task: asyncio.Task[None]) -> None:
        del self._under_way[digest]
        if not task.cancelled():
            task.exception()  # seen, also where nobody waits any more

    async def _check(self, digest: str) -> None:
        async with self._one:
            try:
                self._done[digest] = await self._on_own_thread(digest)
            except (Forbidden, TooLarge) as refusal:
                self._done[digest] = _anew(refusal)

    async def _on_own_thread(self, digest: str) -> str | None:
        done: Future[str | None] = Future()
        done.set_running_or_notify_cancel()

        def work() -> None:
            try:
                done.set_result(self._read(digest))
            except BaseException as error:  # noqa: BLE001 - the lock is held until the thread has told how it ended
                done.set_exception(error)

        # Not of a pool, whose threads the interpreter waits for: the daemon ends whatever is being read.
        threading.Thread(target=work, name="isolator-image-check", daemon=True).start()
        return await asyncio.wrap_future(done)

    def _read(self, digest: str) -> str | None:
        try:
            with contextlib.closing(self._engine.connect(_EXPORT_SILENCE)) as client:
                return check_foreign_image(client, digest).python
        except Exception as error:
            raise translate(error) from error


def _anew(refusal: Forbidden | TooLarge) -> Forbidden | TooLarge:
    """The same refusal without where it was raised: that would keep all that was read of the image."""
    return type(refusal)(refusal.code, refusal.detail, **refusal.fields)


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
