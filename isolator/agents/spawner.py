"""The one way of a spawn, for the API, the CLI and whoever comes later.

    request -> facts of the world -> policy.compile_box -> audit intent -> store -> builder -> store, audit -> answer

An agent is acknowledged only when its record says running and is on disk. Whatever happens before that, a caller
who hangs up included, leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from isolator.agents.builder import BoxBuilder, Secrets
from isolator.agents.channel import create_folder
from isolator.agents.events import EventHub
from isolator.agents.lifecycle import Lifecycle
from isolator.agents.live import LiveAgent
from isolator.agents.notes import request_digest, summary_of, warnings_of
from isolator.agents.receipt import receipt
from isolator.agents.secrets import collect_secrets
from isolator.agents.teams import Teams
from isolator.audit.log import AuditLog
from isolator.backends.base import Guarantees, ImageResolver
from isolator.host.folders import FolderOpener, HeldFolder, close_all
from isolator.model.agent import Agent
from isolator.model.box import BoxSpec, differing_fields
from isolator.model.errors import BadRequest, Conflict, IsolatorError, NotFound, TooMany, Unavailable
from isolator.model.identity import Principal
from isolator.model.names import check_name, new_agent_id
from isolator.model.request import EnsureRequest, SpawnRequest
from isolator.model.team import Team
from isolator.network.selftest import NetworkProof
from isolator.policy.compile import SpawnFacts, compile_box, refuse_unbuilt
from isolator.policy.mounts import plan_mounts
from isolator.settings import Settings
from isolator.store.store import Store

MAX_KEY = 255


@dataclass(frozen=True, slots=True)
class Host:
    """What one run of the daemon knows of its host: `daemon` is its boot id, `seccomp` the profile's digest."""

    daemon: str
    seccomp: str
    credentials: Path | None
    backend: str


class Spawner:
    """Turns requests into running agents."""

    def __init__(
        self,
        settings: Settings,
        host: Host,
        store: Store,
        audit: AuditLog,
        events: EventHub,
        teams: Teams,
        images: ImageResolver,
        folders: FolderOpener,
        builder: BoxBuilder,
        lifecycle: Lifecycle,
        proof: NetworkProof,
        guarantees: Callable[[], Guarantees],
    ) -> None:
        """Only keeps its parts."""
        self._settings = settings
        self._host = host
        self._store = store
        self._audit = audit
        self._events = events
        self._teams = teams
        self._images = images
        self._folders = folders
        self._builder = builder
        self._lifecycle = lifecycle
        self._proof = proof
        self._guarantees = guarantees
        self._under_way: dict[str, asyncio.Task[Agent]] = {}
        self._abandoning: dict[str, asyncio.Task[None]] = {}
        # Teams that a spawn had to make, until somebody has been told of an agent in them.
        self._provisional: dict[str, Team] = {}
        self._keys: dict[tuple[str, str], asyncio.Task[Any]] = {}
        self._ensuring: dict[tuple[str, str], asyncio.Lock] = {}
        self._roots = [PurePosixPath(os.path.realpath(root)) for root in settings.workspace_roots]
        self._own = settings.own_folders()

    def building(self) -> set[str]:
        """Ids of agents being built now, which reconcile must not touch."""
        return set(self._under_way)

    async def spawn(self, request: SpawnRequest, caller: Principal, key: str | None = None) -> Agent:
        """A new running agent; with a key seen before, the first one's agent.

        Raises:
            IsolatorError: any refusal; nothing is left.
        """
        if key is None:
            return await self._start(request.team, request.name, request, caller, None)
        if not 0 < len(key) <= MAX_KEY or not key.isprintable():
            raise BadRequest("idempotency_key_invalid", f"Idempotency-Key must be 1 to {MAX_KEY} printable characters.")
        digest = request_digest(request)
        while True:
            if (earlier := self._keys.get((caller.owner, key))) is not None:
                await asyncio.wait({earlier})
            known = await self._store.idempotent(caller.owner, key)
            if known is not None:
                return await self._first_answer(known, digest)
            # While the store was asked, another request may have begun under the key: then wait for that one.
            if (caller.owner, key) not in self._keys:
                break
        return await self._start(request.team, request.name, request, caller, (caller.owner, key, digest))

    async def _first_answer(self, known: tuple[str, str], digest: str) -> Agent:
        first_digest, agent_id = known
        if first_digest != digest:
            raise Conflict(
                "idempotency_key_reused",
                "This Idempotency-Key was used for another request. Use a new key for a new spawn.",
            )
        agent = await self._store.agent(agent_id)
        if agent is None:
            raise Conflict("idempotency_key_reused", "The agent first spawned under this key is gone.")
        return agent

    async def ensure(self, team: str, name: str, request: EnsureRequest, caller: Principal) -> tuple[Agent, bool]:
        """The running agent of this name if its spec is equal, else a new one; and whether it is new.

        Raises:
            Conflict: `spec_differs`, with the names of the fields.
        """
        check_name(name, "name")
        check_name(team, "team")
        lock = self._ensuring.setdefault((team, name), asyncio.Lock())
        try:
            async with lock:
                live = await self._settled(team, name, caller)
                if live is None:
                    return await self._start(team, name, request, caller, None), True
                wanted, held = await self._plan(self._teams.get(team, caller), name, request, caller, live.record.id)
                close_all(held)
                if wanted.digest() != live.record.spec_digest:
                    raise Conflict(
                        "spec_differs",
                        f"An agent {name} runs in {team} with another spec. Stop it first, or ask for the same.",
                        agent=live.record.id,
                        fields=differing_fields(wanted.meaning(), live.record.spec.meaning()),
                    )
                live.touch()
                return live.record, False
        finally:
            if not lock.locked():
                self._ensuring.pop((team, name), None)

    async def _settled(self, team: str, name: str, caller: Principal) -> LiveAgent | None:
        """The agent of that name once it is neither being spawned nor taken back; None if there is none then."""
        while (live := self._lifecycle.named(team, name)) is not None:
            self._teams.get(team, caller)
            doomed = self._abandoning.get(live.record.id)
            if doomed is not None:
                await asyncio.wait({doomed})
            elif live.record.state == "running":
                return live
            else:
                async with live.lock:
                    pass
        return None

    async def _start(
        self,
        team: str,
        name: str | None,
        request: EnsureRequest,
        caller: Principal,
        key: tuple[str, str, str] | None,
    ) -> Agent:
        """Run the spawn as a task of its own, so that a caller who hangs up can't stop it half-way."""
        if len(self._under_way) >= self._settings.max_concurrent_spawns:
            raise TooMany(
                "spawns_busy",
                f"{len(self._under_way)} spawns are under way, which is the most. Try again shortly.",
                retry_after=1,
            )
        agent_id = new_agent_id()
        task = asyncio.create_task(self._spawn(agent_id, team, name, request, caller, key))
        self._under_way[agent_id] = task
        if key is not None:
            self._keys[key[0], key[1]] = task
        task.add_done_callback(lambda done: self._forget(agent_id, key, done))
        try:
            agent = await asyncio.shield(task)
        except asyncio.CancelledError:
            abandoning = asyncio.create_task(self._abandon(agent_id, task))
            self._abandoning[agent_id] = abandoning
            if key is not None:
                # A retry under the key waits until the first spawn is undone, and then begins anew.
                self._keys[key[0], key[1]] = abandoning
            abandoning.add_done_callback(lambda done: self._forget(agent_id, key, done))
            raise
        self._provisional.pop(agent.spec.team, None)
        return agent

    def _forget(self, agent_id: str, key: tuple[str, str, str] | None, done: asyncio.Task[Any]) -> None:
        for tasks in (self._under_way, self._abandoning):
            if tasks.get(agent_id) is done:
                del tasks[agent_id]
        if key is not None and self._keys.get((key[0], key[1])) is done:
            del self._keys[key[0], key[1]]

    async def _abandon(self, agent_id: str, task: asyncio.Task[Agent]) -> None:
        """The caller hung up and will never learn the id: undo the spawn."""
        await asyncio.wait({task})
        live = self._lifecycle.find(agent_id)
        if live is None or task.cancelled() or task.exception() is not None:
            return
        live.detail = "Its caller hung up before it was told."
        with contextlib.suppress(IsolatorError):
            await self._lifecycle.stop(live, None, 0.0)
            await self._store.delete_agent(agent_id)
        await self._undo_team(live.record.spec.team)

    async def settle(self, timeout: float) -> None:
        """Wait for the spawns under way, at most `timeout` seconds."""
        work: set[asyncio.Task[Any]] = {*self._under_way.values(), *self._abandoning.values()}
        if work:
            await asyncio.wait(work, timeout=timeout)

    async def _undo_team(self, team_id: str) -> None:
        """Unmake a team that only spawns made which came to nothing: the last of them takes it along."""
        team = self._provisional.get(team_id)
        if team is None or any(live.record.spec.team == team_id for live in self._lifecycle.live()):
            return
        with contextlib.suppress(IsolatorError):
            if await self._teams.unmake(team):
                self._provisional.pop(team_id, None)

    async def _spawn(
        self,
        agent_id: str,
        team_id: str,
        name: str | None,
        request: EnsureRequest,
        caller: Principal,
        key: tuple[str, str, str] | None,
    ) -> Agent:
        try:
            async with asyncio.timeout(self._settings.spawn_timeout):
                refuse_unbuilt(request)
                # Every refusal comes before anything is made, the team included.
                team = self._teams.planned(team_id, caller, create=request.create_team)
                spec, held = await self._plan(team, name, request, caller, agent_id)
                try:
                    secrets = await self._secrets(request, spec, caller)
                    if spec.network == "team":
                        await self._proof.require(self._settings.network_proof_timeout)
                    if await self._teams.realise(team, caller):
                        self._provisional[team.id] = self._teams.get(team.id, caller)
                    async with self._teams.using(team.id):
                        return (await self._build(spec, held, secrets, caller, key)).record
                except BaseException:
                    await asyncio.shield(self._undo_team(team.id))
                    raise
                finally:
                    close_all(held)
        except TimeoutError:
            raise Unavailable(
                "spawn_timeout",
                f"The spawn took more than {self._settings.spawn_timeout:.0f} s and was undone. Is the engine busy?",
                retry_after=5,
            ) from None

    async def _plan(
        self, team: Team, name: str | None, request: EnsureRequest, caller: Principal, agent_id: str
    ) -> tuple[BoxSpec, list[HeldFolder]]:
        """The compiled spec and the descriptors of its mounts, which the caller closes."""
        self._check_parent(request, team, caller)
        image = await self._images.resolve(request.image or self._settings.default_image)
        planned = plan_mounts(request, self._roots, self._own)
        held = await self._folders.open_all(planned, caller)
        try:
            facts = SpawnFacts(
                agent=agent_id,
                now=time.time(),
                mounts=tuple(folder.opened for folder in held),
                image=image,
                seccomp=self._host.seccomp,
                host_cpus=os.cpu_count() or 1,
                daemon=self._host.daemon,
            )
            return compile_box(request, name, caller, team, facts, self._settings), held
        except BaseException:
            close_all(held)
            raise

    def _check_parent(self, request: EnsureRequest, team: Team, caller: Principal) -> None:
        if request.parent is None:
            return
        parent = self._lifecycle.visible(request.parent, caller)
        if parent.record.spec.team != team.id:
            raise NotFound("agent_not_found", "The parent is not in this team.")

    async def _secrets(self, request: EnsureRequest, spec: BoxSpec, caller: Principal) -> Secrets:
        if not request.secrets:
            return ()
        places = (self._settings.secret_dir, self._host.credentials)
        return await asyncio.to_thread(collect_secrets, request.secrets, spec.secrets, caller, *places)

    async def _build(
        self,
        spec: BoxSpec,
        held: Sequence[HeldFolder],
        secrets: Secrets,
        caller: Principal,
        key: tuple[str, str, str] | None,
    ) -> LiveAgent:
        if await self._store.count_live() >= self._settings.max_agents:
            raise TooMany(
                "agents_exhausted",
                f"{self._settings.max_agents} agents are alive, which is the most. Stop some.",
            )
        record = Agent(
            id=spec.agent,
            spec=spec,
            state="creating",
            created_at=time.time(),
            backend=self._host.backend,
            spec_digest=spec.digest(),
            warnings=warnings_of(spec, held),
        )
        subject = {"team": spec.team, "agent": spec.agent}
        intent = await self._audit.intent("agent.spawn", caller, **subject, **summary_of(spec))
        live = LiveAgent(record)
        # Whoever wants to stop it or has seen it end waits until it has come to be, and was told so.
        async with live.lock:
            try:
                await self._store.add_agent(record, key)
                try:
                    await self._run(live, held, secrets)
                    await self._audit.outcome(
                        intent, "agent.spawn", "done", **subject, container=live.record.container_id
                    )
                    await self._events.publish(
                        "agent.started",
                        owner=spec.owner,
                        team=spec.team,
                        agent=spec.agent,
                        name=spec.name,
                        image=spec.image,
                    )
                except BaseException:
                    await asyncio.shield(self._take_back(live))
                    raise
            except BaseException as error:
                code = error.code if isinstance(error, IsolatorError) else type(error).__name__
                await asyncio.shield(self._audit.outcome(intent, "agent.spawn", "failed", **subject, code=code))
                raise
            self._lifecycle.schedule(live)
        return live

    async def _take_back(self, live: LiveAgent) -> None:
        """Leave nothing of a spawn that failed at whatever point."""
        spec = live.record.spec
        if live.record.state == "running" and live.channel is not None:
            live.record = live.record.changed(state="creating")
            await self._builder.demolish(spec, live.channel)
        else:
            await self._builder.discard(spec.agent)
        self._lifecycle.drop(spec.agent)
        await self._store.delete_agent(spec.agent)

    async def _run(self, live: LiveAgent, held: Sequence[HeldFolder], secrets: Secrets) -> None:
        record = live.record
        spec = record.spec
        await asyncio.to_thread(create_folder, self._builder.folder(spec.agent))
        channel = self._lifecycle.channel_for(live)
        self._lifecycle.hold(live)
        built = await self._builder.build(spec, held, secrets, channel)
        now = time.time()
        live.record = record.changed(
            state="running",
            started_at=now,
            container_id=built.box_id,
            pid=built.pid,
            expires_at=None if spec.ttl is None else now + spec.ttl,
            wall_deadline=None if spec.limits.wall is None else now + spec.limits.wall,
            receipt=receipt(spec, self._guarantees()),
        )
        await self._store.save_agent(live.record)
