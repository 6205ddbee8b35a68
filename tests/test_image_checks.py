"""The check of a foreign image may outlast the spawns that wait for it: it holds up nobody, and is not in vain."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import re
import socketserver
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_for

from isolator.backends.docker.engine import Engine
from isolator.backends.docker.images import ImageResolver
from isolator.model.errors import Forbidden, Unavailable

GOOD, OTHER, HOSTILE, BARE = (f"sha256:{letter * 64}" for letter in "abcd")
WORKERS = 2
IMPATIENT = 0.3


def packed(*members: tuple[str, bytes | str]) -> bytes:
    """A tar archive of files (bytes) and links (text)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members:
            facts = tarfile.TarInfo(name)
            facts.mode = 0o755
            if isinstance(content, str):
                facts.type, facts.linkname = tarfile.SYMTYPE, content
                archive.addfile(facts)
            else:
                facts.size = len(content)
                archive.addfile(facts, io.BytesIO(content))
    return buffer.getvalue()


def export(*members: tuple[str, bytes | str]) -> bytes:
    """What the engine sends of an image with one layer."""
    manifest = json.dumps([{"Layers": ["0/layer.tar"]}]).encode()
    return packed(("0/layer.tar", packed(*members)), ("manifest.json", manifest))


PYTHON = ("usr/bin/python3", b"\x7fELF")
EXPORTS = {
    GOOD: export(PYTHON),
    OTHER: export(PYTHON, ("srv", b"")),
    HOSTILE: export(PYTHON, ("proc", "/etc")),
    BARE: export(("bin/sh", b"")),
}


@dataclass
class SlowEngine:
    """As much of an engine as a check needs; exports wait until `ready`."""

    socket: Path
    ready: threading.Event = field(default_factory=threading.Event)
    broken: bool = False
    exports: list[str] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0

    def export(self, digest: str) -> bytes | None:
        """The export, or None where it fails."""
        self.exports.append(digest)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.ready.wait(20)
        time.sleep(0.05)  # long enough for two at once to meet
        self.at_once -= 1
        return None if self.broken else EXPORTS[digest]


def handler(engine: SlowEngine) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            found = re.fullmatch(r"(?:/v[0-9.]+)?/images/(sha256:[0-9a-f]+)/(json|get)", self.path.replace("%3A", ":"))
            body: bytes | None = b"OK"
            if self.path.endswith("/version"):
                body = b'{"ApiVersion": "1.41"}'
            elif found and found[2] == "json":
                body = json.dumps({"Id": found[1], "Config": {"Env": ["A=b"]}}).encode()
            elif found:
                body = engine.export(found[1])
            self.send_response_only(200 if body is not None else 500)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

    return Handler


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 32

    def handle_error(self, *_: object) -> None:
        """Checks that nobody waits for hang up."""


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[SlowEngine]:
    engine = SlowEngine(tmp_path / "docker.sock")
    with _Server(str(engine.socket), handler(engine)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield engine
        finally:
            engine.ready.set()
            server.shutdown()
            thread.join(10)


@pytest.fixture
def connected(slow: SlowEngine) -> Iterator[Engine]:
    engine = Engine(slow.socket, 5, WORKERS)
    yield engine
    engine.close()


def resolver(engine: Engine, folder: Path) -> ImageResolver:
    lock = folder / "images.json"
    lock.write_text("{}")
    lock.chmod(0o644)
    return ImageResolver(engine, lock, [*EXPORTS])


async def give_up(images: ImageResolver, digest: str) -> None:
    """A spawn whose time is over before the check is."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(IMPATIENT):
            await images.resolve(digest)


async def test_a_check_that_outlasts_its_spawns_holds_up_no_call_and_is_found_done(
    slow: SlowEngine, connected: Engine, tmp_path: Path
) -> None:
    images = resolver(connected, tmp_path)
    for _ in range(WORKERS + 1):
        await give_up(images, GOOD)
    async with asyncio.timeout(3):
        assert await connected.ping()
    assert slow.exports == [GOOD], "the image is read once, whoever gave up meanwhile"
    waiting = asyncio.create_task(images.resolve(GOOD))
    slow.ready.set()
    assert (await asyncio.wait_for(waiting, 10)).interpreter == "/usr/bin/python3"
    found = await images.resolve(GOOD)
    assert (found.digest, found.environment) == (GOOD, (("A", "b"),))
    assert slow.exports == [GOOD]


async def test_a_check_nobody_waits_for_is_finished(slow: SlowEngine, connected: Engine, tmp_path: Path) -> None:
    images = resolver(connected, tmp_path)
    await give_up(images, GOOD)
    slow.ready.set()
    await asyncio.to_thread(wait_for, lambda: not checking(), 10)
    assert (await images.resolve(GOOD)).interpreter == "/usr/bin/python3"
    assert slow.exports == [GOOD]


async def test_one_image_is_checked_at_a_time(slow: SlowEngine, connected: Engine, tmp_path: Path) -> None:
    images = resolver(connected, tmp_path)
    slow.ready.set()
    found = await asyncio.gather(*(images.resolve(digest) for digest in (GOOD, OTHER, GOOD, OTHER)))
    assert [item.digest for item in found] == [GOOD, OTHER, GOOD, OTHER]
    assert (sorted(slow.exports), slow.most_at_once) == ([GOOD, OTHER], 1)


@pytest.mark.parametrize(("digest", "code"), [(HOSTILE, "image_unsafe"), (BARE, "image_unsupported")])
async def test_a_refusal_is_kept(slow: SlowEngine, connected: Engine, tmp_path: Path, digest: str, code: str) -> None:
    images = resolver(connected, tmp_path)
    await give_up(images, digest)
    slow.ready.set()
    told = []
    for _ in range(3):
        with pytest.raises(Forbidden) as refusal:
            await images.resolve(digest)
        told.append(refusal.value.problem())
    assert [problem["code"] for problem in told] == [code] * 3
    assert told[0] == told[1] == told[2]
    assert slow.exports == [digest]


async def test_a_check_the_engine_broke_off_is_made_again(slow: SlowEngine, connected: Engine, tmp_path: Path) -> None:
    images = resolver(connected, tmp_path)
    slow.ready.set()
    slow.broken = True
    with pytest.raises(Unavailable) as refusal:
        await images.resolve(GOOD)
    assert refusal.value.code == "engine_unavailable"
    slow.broken = False
    assert (await images.resolve(GOOD)).interpreter == "/usr/bin/python3"
    assert slow.exports == [GOOD, GOOD]


async def test_a_failure_nobody_waited_for_is_no_complaint(slow: SlowEngine, connected: Engine, tmp_path: Path) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    images = resolver(connected, tmp_path)
    slow.broken = True
    await give_up(images, GOOD)
    slow.ready.set()
    await asyncio.to_thread(wait_for, lambda: not checking(), 10)
    await asyncio.sleep(0)
    gc.collect()
    assert complaints == []


def checking() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "isolator-image-check"]


def test_a_daemon_that_stops_waits_for_no_check(slow: SlowEngine, connected: Engine, tmp_path: Path) -> None:
    began = time.monotonic()
    asyncio.run(give_up(resolver(connected, tmp_path), GOOD))
    connected.close()
    assert time.monotonic() - began < 5
    assert slow.at_once == 1, "the engine was still at it"
    assert [thread.daemon for thread in checking()] == [True], "the interpreter would wait for it"
    slow.ready.set()
    for thread in checking():
        thread.join(10)
