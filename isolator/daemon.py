"""The composition root: builds the parts from settings, starts and stops them. The only file that knows them all."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from isolator import __version__
from isolator.agents.builder import BoxBuilder
from isolator.agents.claimer import Claimer
from isolator.agents.deadlines import Deadlines
from isolator.agents.events import EventHub
from isolator.agents.laboratory import SelfTestLaboratory
from isolator.agents.launcher import Host, Launcher
from isolator.agents.lifecycle import Lifecycle
from isolator.agents.pool import Pool
from isolator.agents.receipt import docker_guarantees
from isolator.agents.reconcile import Reconciler
from isolator.agents.spawner import Spawner
from isolator.agents.stats import Stats
from isolator.agents.teams import Teams
from isolator.api.condition import Condition
from isolator.api.metrics import Metrics
from isolator.api.parts import Parts
from isolator.api.post import Post
from isolator.api.server import ApiServer, open_socket
from isolator.audit.log import AuditLog, AuditLogDamaged
from isolator.backends.base import Guarantees
from isolator.backends.docker.backend import DockerBackend
from isolator.backends.docker.engine import Engine
from isolator.backends.docker.images import ImageResolver
from isolator.backends.docker.watch import EngineWatch
from isolator.execs.service import Execs
from isolator.files.service import Files
from isolator.host import systemd
from isolator.host.folders import FolderOpener
from isolator.host.placing import Placer
from isolator.host.sockets import without_descriptors
from isolator.model.errors import IsolatorError, Unavailable
from isolator.model.image import ImageFacts
from isolator.network.selftest import NetworkProof
from isolator.policy.compile import SpawnFacts
from isolator.policy.mounts import refuse_sensitive
from isolator.seccomp import load_profile
from isolator.settings import Settings
from isolator.store.store import Store

_log = logging.getLogger("isolator")
_SETTLE = 30.0
_LEFT_OVER_AGAIN = 30.0
# Why a daemon does not start, where trying again changes nothing: its unit does not try.
_FINAL = frozenset(
    {
        "audit_damaged",
        "backend_unavailable",
        "folder_unsafe",
        "seccomp_profile_invalid",
        "seccomp_profile_missing",
        "socket_unsafe",
        "store_damaged",
        "store_newer",
    }
)


class Daemon:
    """One isolator. `run` is its whole life."""

    def __init__(self, settings: Settings) -> None:
        """Builds nothing yet."""
        self.settings = settings
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[Any]] = []

    async def run(self) -> None:
        """Start, serve until told to stop, stop.

        Raises:
            Unavailable: it can't start; the detail says what to do.
        """
        began = time.monotonic()
        await self._build()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        try:
            await self._reconciler.load()
            listeners = systemd.listen_fds() or [open_socket(self.settings.socket_path, self.settings.socket_gid())]
            await self._audit.note("daemon.start", None, version=__version__, daemon=self._host.daemon)
            if self._audit.recovered:
                await self._audit.note("audit.recovered", None, torn=self._audit.recovered)
            listeners = [without_descriptors(listener) for listener in listeners]
            await self._server.start(listeners)
            self._start_tasks()
            systemd.notify(f"READY=1\nSTATUS=Serving {listeners[0].getsockname()}")
            _log.info("ready in %.0f ms at %s", 1000 * (time.monotonic() - began), listeners[0].getsockname())
            await self._stopping.wait()
        finally:
            systemd.notify("STOPPING=1")
            await self._stop()

    async def _build(self) -> None:
        settings = self.settings
        if settings.backend not in ("auto", "docker"):
            raise Unavailable(
                "backend_unavailable",
                f"This version has no backend {settings.backend}: set ISOLATOR_BACKEND to auto or docker.",
            )
        _make_folders(settings)
        profile = load_profile()
        self._engine = Engine(settings.docker_socket, settings.engine_timeout, settings.engine_workers)
        self._backend = DockerBackend(self._engine, settings.instance, profile)
        credentials = os.environ.get("CREDENTIALS_DIRECTORY")
        self._host = Host(
            daemon=secrets.token_hex(8),
            seccomp=profile.digest,
            credentials=Path(credentials) if credentials else None,
            backend=self._backend.name,
        )
        record = settings.state_dir / "audit"
        try:
            self._audit = AuditLog(record)
        except AuditLogDamaged as error:
            raise Unavailable(
                "audit_damaged",
                f"{error}. Nothing is served until an operator looked (isolator audit verify --folder {record})"
                " and moved it away.",
            ) from error
        except BlockingIOError as error:
            raise Unavailable("state_in_use", f"Another daemon uses {settings.state_dir}.") from error
        self._store = await Store.open(settings.state_dir / "isolator.db", settings.events_kept)
        self._events = EventHub(self._store)
        self._deadlines = Deadlines()
        self._builder = BoxBuilder(self._backend, settings.runtime_dir)
        self._images = ImageResolver(self._engine, settings.image_lock_path, settings.allowed_images)
        self._teams = Teams(
            self._store,
            self._audit,
            self._events,
            self._backend,
            settings.subnet_pool,
            settings.subnet_prefix,
        )
        self._lifecycle = Lifecycle(
            self._store,
            self._audit,
            self._events,
            self._backend,
            self._builder,
            self._deadlines,
            settings.records_kept,
        )
        self._folders = FolderOpener(lambda path: refuse_sensitive(path, settings.own_folders()))
        laboratory = SelfTestLaboratory(
            settings,
            self._backend,
            self._builder,
            self._images,
            self._bare_facts,
            lambda: {team.subnet for team in self._teams.all()},
        )
        self._proof = NetworkProof(laboratory.laboratory(), self._engine.version)
        self._placer = Placer()
        self._pool = Pool(settings, self._builder, self._can_build_ahead, lambda: self._spawner.is_busy)
        self._teams.before_forgetting = self._pool.drop_team
        if self._pool.enabled:
            await self._placer.probe()
        claimer = Claimer(
            self._store,
            self._audit,
            self._events,
            self._backend,
            self._builder,
            self._lifecycle,
            self._placer,
            self._guarantees,
        )
        launcher = Launcher(
            settings,
            self._host,
            self._store,
            self._audit,
            self._events,
            self._teams,
            self._images,
            self._folders,
            self._builder,
            self._lifecycle,
            self._proof,
            self._guarantees,
            self._pool,
            claimer,
        )
        self._spawner = Spawner(settings, self._store, self._teams, self._lifecycle, launcher)
        self._reconciler = Reconciler(
            self._store,
            self._audit,
            self._events,
            self._backend,
            self._builder,
            self._lifecycle,
            self._teams,
            lambda: self._spawner.building() | laboratory.building() | self._pool.boxes(),
            self._host.daemon,
            settings.runtime_dir,
        )
        self._watch = EngineWatch(
            self._engine,
            settings.instance,
            on_up=self._engine_is_up,
            on_down=self._engine_is_down,
            on_ending=self._lifecycle.look_again,
        )
        self._condition = Condition(
            settings, self._engine, self._proof, lambda: self._watch.up, lambda: self._placer.trouble
        )
        self._execs = Execs(settings, self._audit)
        self._lifecycle.is_in_use = lambda agent: self._execs.count(agent) > 0
        self._files = Files()
        self._stats = Stats()
        self._post = Post(settings, self._store, self._events, self._lifecycle)
        await self._post.open()
        self._server = ApiServer(self._parts())
        await self._teams.load()

    def _parts(self) -> Parts:
        return Parts(
            settings=self.settings,
            store=self._store,
            audit=self._audit,
            events=self._events,
            backend=self._backend,
            teams=self._teams,
            images=self._images,
            lifecycle=self._lifecycle,
            spawner=self._spawner,
            execs=self._execs,
            files=self._files,
            stats=self._stats,
            messages=self._post.router,
            pool=self._pool,
            proof=self._proof,
            metrics=Metrics(),
            guarantees=self._guarantees,
            engine_up=lambda: self._watch.up,
            engine_facts=self._condition.engine_facts,
            degraded=self._condition.degraded,
            stopping=self._stopping,
            followers=asyncio.Semaphore(self.settings.max_followers),
        )

    def _bare_facts(self, agent: str) -> SpawnFacts:
        return SpawnFacts(
            agent=agent,
            now=time.time(),
            mounts=(),
            image=ImageFacts("", "", ""),
            seccomp=self._host.seccomp,
            host_cpus=os.cpu_count() or 1,
            daemon=self._host.daemon,
        )

    def _can_build_ahead(self) -> bool:
        return self._watch.up and self._proof.result.status == "proven" and not self._stopping.is_set()

    def _guarantees(self) -> Guarantees:
        return docker_guarantees(self._proof.guarantee())

    # running

    def _start_tasks(self) -> None:
        for work in (self._deadlines.run(), self._watch.run(), self._keep_watchdog(), self._pool.run()):
            task = asyncio.create_task(work)
            task.add_done_callback(self._task_ended)
            self._tasks.append(task)

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is not None:
            _log.critical("a part of the daemon failed; stopping", exc_info=task.exception())
            self._stopping.set()

    async def _engine_is_up(self) -> None:
        _log.info("the engine answers")
        self._condition.forget_engine()
        await self._events.publish("engine.up")
        self._spawn_task(self._after_engine_up())

    async def _after_engine_up(self) -> None:
        left_over = await self._reconciler.run_until_done(lambda: self._watch.up)
        if not self._watch.up:
            return
        # One box that the engine will not let go of is no reason to serve nobody.
        await self._proof.run_until_decided()
        self._pool.look_again()
        await self._events.publish("network.tested", status=self._proof.result.status)
        while left_over and self._watch.up:
            await asyncio.sleep(_LEFT_OVER_AGAIN)
            left_over = await self._reconciler.run_until_done(lambda: self._watch.up)

    async def _engine_is_down(self) -> None:
        _log.warning("the engine does not answer")
        self._proof.forget()
        self._pool.forget()
        await self._events.publish("engine.down")

    def _spawn_task(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        task.add_done_callback(self._task_ended)
        task.add_done_callback(lambda done: self._tasks.remove(done) if done in self._tasks else None)

    async def _keep_watchdog(self) -> None:
        """Answer systemd's watchdog only while loop and engine do.

        An engine that is known to be down is reported, no reason to be killed: a restart would not bring it back.
        """
        interval = systemd.watchdog_interval()
        if interval is None:
            return
        # Sleep and ping together stay below systemd's own limit, which is twice the interval.
        while True:
            if self._watch.up:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(interval):
                        await self._engine.ping()
                        systemd.notify("WATCHDOG=1")
            else:
                systemd.notify("WATCHDOG=1\nSTATUS=Waiting for the Docker Engine")
            await asyncio.sleep(interval / 2)

    # stopping

    async def _stop(self) -> None:
        self._stopping.set()
        self._execs.stop()
        await self._server.stop()
        await self._spawner.settle(_SETTLE)
        await self._lifecycle.settle()
        await self._pool.close()
        self._placer.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._lifecycle.close()
        await self._post.close()
        with contextlib.suppress(IsolatorError):
            await self._audit.note("daemon.stop", None, daemon=self._host.daemon)
        await self._store.close()
        self._audit.close()
        self._folders.close()
        self._files.close()
        self._stats.close()
        self._engine.close()
        _log.info("stopped; running agents go on")


def _make_folders(settings: Settings) -> None:
    """Folders of our own, closed to everybody else; the socket's folder must be passable."""
    for folder, mode in (
        (settings.state_dir, 0o700),
        (settings.runtime_dir, 0o755),
        (settings.runtime_dir / "agents", 0o700),
        (settings.runtime_dir / "mounts", 0o700),
    ):
        try:
            folder.mkdir(mode=mode, parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable("folder_unsafe", f"{folder} can't be made: {error.strerror}.") from error
        facts = folder.stat()
        if facts.st_uid != os.geteuid():
            raise Unavailable("folder_unsafe", f"{folder} belongs to uid {facts.st_uid}, not to the daemon's.")
        folder.chmod(mode)


def run(settings: Settings) -> int:
    """Run a daemon until SIGTERM; the process's exit code, 125 where only somebody's hand can help, else 1."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    os.umask(0o077)
    socket.setdefaulttimeout(None)

    async def serve() -> None:
        await Daemon(settings).run()

    try:
        asyncio.run(serve())
    except IsolatorError as error:
        _log.critical("%s (%s)", error.detail, error.code)
        return 125 if error.code in _FINAL else 1
    return 0
