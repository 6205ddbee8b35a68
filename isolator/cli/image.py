"""`image build`, `image ls`: the agents' images. They are built here, by root; never by the daemon."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from isolator.cli.config import settings_or_failure
from isolator.cli.progress import Progress
from isolator.cli.session import Failure, Session, json_option, note, pass_session
from isolator.cli.text import escape
from isolator.model.sizes import format_size

if TYPE_CHECKING:
    import docker

    from isolator.settings import Settings


@click.group()
def image() -> None:
    """Build and list the agents' images."""


@image.command("build")
@click.argument("names", nargs=-1)
@click.option("--if-missing", is_flag=True, help="Skip those whose pinned digest the engine has.")
@click.option(
    "--lock",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Pin file to write; default: the daemon's (setting image_lock).",
)
@json_option
@pass_session
def build(session: Session, names: tuple[str, ...], if_missing: bool, lock: Path | None) -> None:
    """Build images (all, if none is named), put them on the engine, and pin their digests. Needs root."""
    from isolator.images import build as building  # noqa: PLC0415 - loads the engine's SDK
    from isolator.images.lock import read_lock, write_lock  # noqa: PLC0415 - as above

    known = building.available_images()
    wanted = [name.removeprefix("isolator/") for name in names] or list(known)
    if unknown := [name for name in wanted if name not in known]:
        raise Failure(f"No recipe is called {', '.join(unknown)}. There are: {', '.join(known)}", "image_unknown")
    settings = settings_or_failure()
    path = (lock or settings.image_lock_path).absolute()
    _make_folder(path.parent)
    pins = read_lock(path)
    results: list[dict[str, Any]] = []
    with _engine(settings) as engine, building.package_cache() as cache:
        for name in dict.fromkeys(wanted):
            pinned = pins.get(f"isolator/{name}")
            if if_missing and pinned and _present(engine, pinned):
                results.append({"name": f"isolator/{name}", "digest": pinned, "built": False})
                _tell(session, f"isolator/{name}: present as pinned ({pinned[:19]}), not built again")
                continue
            with Progress(f"building {name}", enabled=not session.json) as progress:
                built = building.build_image(name, engine=engine, progress=_saying(session, progress), cache=cache)
            pins[built.name] = built.image_id
            # Pinned one by one: a later image's failure does not lose the earlier ones.
            write_lock(path, pins)
            results.append(
                {
                    "name": built.name,
                    "tag": built.tag,
                    "digest": built.image_id,
                    "built": True,
                    "size": built.size,
                    "packages": list(built.packages),
                    "seconds": round(built.seconds, 1),
                }
            )
            size = format_size(built.size)
            _tell(
                session,
                f"{built.name}: {built.image_id}, {size}, {len(built.packages)} packages, {built.seconds:.0f} s",
            )
    if session.json:
        session.show({"lock": str(path), "items": results}, str)
    else:
        click.echo(f"pinned in {escape(path)}")


def _tell(session: Session, line: str) -> None:
    if not session.json:
        click.echo(escape(line))


def _saying(session: Session, progress: Progress) -> Any:
    """What to call with a build's lines: one moving line at a terminal, plain ones in a log, or nothing."""
    if session.json:
        return lambda _: None
    # The moving line counts the seconds itself.
    return (lambda line: progress.say(line.rpartition(" (")[0] or line)) if sys.stderr.isatty() else note


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(
            f"{folder} can't be made ({error.strerror}). Building needs root.", "image_lock_folder"
        ) from error


def _engine(settings: Settings) -> docker.APIClient:
    import docker  # noqa: PLC0415 - slow to load
    from docker.errors import DockerException  # noqa: PLC0415 - as above

    try:
        # Loading an image may take the engine minutes without a word.
        return docker.APIClient(base_url=f"unix://{settings.docker_socket}", version="auto", timeout=300)
    except DockerException as error:
        raise Failure(
            f"No Docker Engine answers at {settings.docker_socket}. Start it, or name its socket with "
            "ISOLATOR_DOCKER_SOCKET.",
            "engine_unavailable",
        ) from error


def _present(engine: docker.APIClient, digest: str) -> bool:
    from docker.errors import ImageNotFound  # noqa: PLC0415 - as above

    try:
        engine.inspect_image(digest)
    except ImageNotFound:
        return False
    return True


@image.command("ls")
@json_option
@pass_session
def ls(session: Session) -> None:
    """List the pinned images, and whether the engine has each."""
    from isolator.client import SocketNotFound  # noqa: PLC0415 - loaded with the client anyway

    try:
        with session.client() as client:
            items = [image.raw for image in client.images()]
    except SocketNotFound:
        items = _from_lock()
        note("isolator: the daemon is not running; read from its pin file.")
    rows = [(item["name"], _yes(item.get("present")), item["digest"]) for item in items]
    session.show_table(
        {"items": items, "next": None},
        ("IMAGE", "PRESENT", "DIGEST"),
        rows,
        flexible=(2,),
        empty="No image is pinned, so no agent can start. As root: isolator image build",
    )


def _yes(present: object) -> str:
    return "unknown" if present is None else "yes" if present else "NO"


def _from_lock() -> list[dict[str, Any]]:
    from isolator.cli.checks.engine import image_present  # noqa: PLC0415 - without the daemon only
    from isolator.images.lock import read_lock  # noqa: PLC0415 - as above

    settings = settings_or_failure()
    return [
        {"name": name, "digest": digest, "present": image_present(settings.docker_socket, digest)}
        for name, digest in sorted(read_lock(settings.image_lock_path).items())
    ]
