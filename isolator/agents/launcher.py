"""How one agent comes to be: planned, checked, built, recorded; or refused, and then nothing is left.

request -> facts of the world -> policy.compile_box -> audit intent -> store -> builder -> store, audit -> answer
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from isolator.agents.builder import BoxBuilder, Secrets
from isolator.agents.channel import create_folder
from isolator.agents.claimer import BoxSpoiled, Claimer
from isolator.agents.events import EventHub
from isolator.agents.lifecycle import Lifecycle
from isolator.agents.live import LiveAgent, weight_of
from isolator.agents.notes import summary_of, warnings_of
from isolator.agents.pool import Blank, Pool
from isolator.agents.receipt import receipt
from isolator.agents.secrets import collect_secrets
from isolator.agents.teams import Teams
from isolator.audit.log import AuditLog
from isolator.backends.base import Guarantees, ImageResolver
from isolator.cancellation import uninterrupted
from isolator.host.folders import FolderOpener, HeldFolder, close_all
from isolator.model.agent import Agent
from isolator.model.box import BoxSpec
from isolator.model.errors import IsolatorError, NotFound, TooMany, Unavailable
from isolator.model.identity import Principal
from isolator.model.request import EnsureRequest
from isolator.model.team import Team
from isolator.network.selftest import NetworkProof
from isolator.policy.blank import Profile, bare_request, blank_of
from isolator.policy.compile import SpawnFacts, compile_box, refuse_unbuilt
from isolator.policy.mounts import plan_mounts
from isolator.settings import Settings
from isolator.store.store import Store

_log = logging.getLogger(__name__)
Key = tuple[str, str, str]
"""An Idempotency-Key as it is stored: its owner, itself, the digest of the request it came with."""
# Bytes of memory for what all agents' specs hold in texts of free size.
_MOST_HELD = 128 * 1024**2


@dataclass(frozen=True, slots=True)
class Host:
    """What one run of the daemon knows of its host: `daemon` is its boot id, `seccomp` the profile's digest."""

    daemon: str
    seccomp: str
    credentials: Path | None
    backend: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A compiled spawn: the spec, the descriptors of its mounts, and what its kind's blanks would be."""

    spec: BoxSpec
    held: list[HeldFolder]
    blank: Callable[[Profile], Blank]


class Launcher:
    """Brings single agents up. Who asked for them, and how often, is the spawner's business."""

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
        pool: Pool,
        claimer: Claimer,
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
        self._pool = pool
        self._claimer = claimer
        # Teams that a spawn had to make, until somebody has been told of an agent in them.
        self._provisional: dict[str, Team] = {}
        self._roots = [PurePosixPath(os.path.realpath(root)) for root in settings.workspace_roots]
        self._own = settings.own_folders()

    async def launch(
        self,
        agent_id: str,
        team_id: str,
        name: str | None,
        request: EnsureRequest,
        caller: Principal,
        key: Key | None,
    ) -> Agent:
        """A running agent, recorded and on disk.

        Raises:
            IsolatorError: any refusal or failure; nothing is left.
        """
        try:
            async with asyncio.timeout(self._settings.spawn_timeout):
                refuse_unbuilt(request)
                # Every refusal comes before anything is made, the team included.
                team = self._teams.planned(team_id, caller, create=request.create_team)
                plan = await self.plan(team, name, request, caller, agent_id)
                try:
                    secrets = await self._secrets(request, plan.spec, caller)
                    if plan.spec.network == "team":
                        await self._proof.require(self._settings.network_proof_timeout)
                    await self._realise(team, caller)
                    async with self._teams.using(team.id):
                        self._refuse_too_many(plan.spec)
                        live = await self._claim(plan, secrets, caller, key)
                        if live is None:
                            live = await self._build(plan.spec, plan.held, secrets, caller, key)
                        if self._may_claim(plan.spec):
                            self._pool.want(plan.spec, plan.blank)
                except BaseException:
                    await uninterrupted(self.undo_team(team.id))
                    raise
                else:
                    return live.record
                finally:
                    close_all(plan.held)
        except TimeoutError:
            raise Unavailable(
                "spawn_timeout",
                f"The spawn took more than {self._settings.spawn_timeout:.0f} s and was undone. Is the engine busy?",
                retry_after=5,
            ) from None

    async def _realise(self, team: Team, caller: Principal) -> None:
        """Make a team that was only planned; to the end even if the spawn's time is over, to be undone as a whole."""
        making = asyncio.ensure_future(self._teams.realise(team, caller))
        try:
            await uninterrupted(making)
        finally:
            if not making.cancelled() and making.exception() is None and making.result():
                self._provisional[team.id] = self._teams.get(team.id, caller)

    def told(self, agent: Agent) -> None:
        """Somebody knows of this agent: the team that was made for it stays."""
        self._provisional.pop(agent.spec.team, None)

    async def undo_team(self, team_id: str) -> None:
        """Unmake a team that only spawns made which came to nothing: the last of them takes it along."""
        team = self._provisional.get(team_id)
        if team is None or any(live.record.spec.team == team_id for live in self._lifecycle.live()):
            return
        with contextlib.suppress(IsolatorError):
            if await self._teams.unmake(team):
                self._provisional.pop(team_id, None)

    async def plan(
        self, team: Team, name: str | None, request: EnsureRequest, caller: Principal, agent_id: str
    ) -> Plan:
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

            def blank(profile: Profile) -> Blank:
                bare, bare_facts = bare_request(profile), replace(facts, mounts=())

                def make(other: str) -> BoxSpec:
                    of_other = replace(bare_facts, agent=other)
                    return blank_of(compile_box(bare, None, caller, team, of_other, self._settings), profile)

                return make

            return Plan(compile_box(request, name, caller, team, facts, self._settings), held, blank)
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
        if all(secret.value is not None for secret in request.secrets):
            return collect_secrets(request.secrets, spec.secrets, caller, *places)  # no file is read
        return await asyncio.to_thread(collect_secrets, request.secrets, spec.secrets, caller, *places)

    def _may_claim(self, spec: BoxSpec) -> bool:
        return self._claimer.can_place or not spec.mounts

    async def _claim(self, plan: Plan, secrets: Secrets, caller: Principal, key: Key | None) -> LiveAgent | None:
        """An agent in a box that waited for it; None if there is none, or it was of no use."""
        ready = self._pool.take(plan.spec) if self._may_claim(plan.spec) else None
        if ready is not None:
            try:
                live = await self._claimer.claim(ready, plan.spec, plan.held, secrets, caller, key)
            except BoxSpoiled as error:
                _log.warning("a waiting box of team %s was of no use, one is built: %s", plan.spec.team, error)
            else:
                self._pool.claims["warm"] += 1
                return live
            finally:
                self._pool.taken_over(ready.spec.agent)
        self._pool.claims["cold"] += 1
        return None

    async def _build(
        self,
        spec: BoxSpec,
        held: Sequence[HeldFolder],
        secrets: Secrets,
        caller: Principal,
        key: Key | None,
    ) -> LiveAgent:
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
        intent = await self._audit.intent("agent.spawn", caller, **subject, **summary_of(spec, record.spec_digest))
        live = LiveAgent(record)
        # Whoever wants to stop it or has seen it end waits until it has come to be, and was told so.
        async with live.lock:
            try:
                try:
                    await self._store.add_agent(record, key)
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
                    await uninterrupted(self._take_back(live))
                    raise
            except BaseException as error:
                code = error.code if isinstance(error, IsolatorError) else type(error).__name__
                await uninterrupted(self._audit.outcome(intent, "agent.spawn", "failed", **subject, code=code))
                raise
            self._lifecycle.schedule(live)
        return live

    def _refuse_too_many(self, spec: BoxSpec) -> None:
        live = self._lifecycle.live()
        if len(live) >= self._settings.max_agents:
            raise TooMany(
                "agents_exhausted",
                f"{self._settings.max_agents} agents are held, those that wait for their cleanup included, which is"
                " the most. Stop some.",
            )
        # By their number alone, agents with the longest commands and environments could outgrow the daemon's memory.
        held = weight_of(spec) + sum(each.weight for each in live)
        if held > _MOST_HELD:
            raise TooMany(
                "agents_exhausted",
                f"The commands, environments and mounts of all agents take more than {_MOST_HELD} bytes of memory"
                " together. Stop some, or pass data by files.",
            )

    async def _take_back(self, live: LiveAgent) -> None:
        """Leave nothing of a spawn that failed at whatever point."""
        spec = live.record.spec
        if live.record.state == "running" and live.channel is not None:
            live.record = live.record.changed(state="creating")
            await self._builder.demolish(spec, live.channel)
        else:
            await self._builder.discard(spec.agent)
        await self._lifecycle.drop(spec.agent)

    async def _run(self, live: LiveAgent, held: Sequence[HeldFolder], secrets: Secrets) -> None:
        record = live.record
        spec = record.spec
        await uninterrupted(asyncio.to_thread(create_folder, self._builder.folder(spec.agent)))
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
            receipt=receipt(spec, self._guarantees(), swap_capped=built.swap_capped),
        )
        await self._store.save_agent(live.record)
