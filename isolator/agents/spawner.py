"""The one way to ask for an agent, for the API, the CLI and whoever comes later: once, again, or not at all.

An agent is acknowledged only when its record says running and is on disk. Whatever happens before that, a caller
who hangs up included, leaves nothing behind. A request repeated under its key, or ensured by name, finds the first
one's agent.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from isolator.agents.launcher import Key, Launcher
from isolator.agents.lifecycle import Lifecycle
from isolator.agents.live import LiveAgent
from isolator.agents.notes import request_digest
from isolator.agents.teams import Teams
from isolator.host.folders import close_all
from isolator.model.agent import Agent
from isolator.model.box import differing_fields
from isolator.model.errors import BadRequest, Conflict, IsolatorError, TooMany, Unavailable
from isolator.model.identity import Principal
from isolator.model.names import check_name, new_agent_id
from isolator.model.request import EnsureRequest, SpawnRequest
from isolator.settings import Settings
from isolator.store.store import Store

_log = logging.getLogger(__name__)
MAX_KEY = 255
# Between two tries to undo what nobody was told of.
_AGAIN = 5.0


class Spawner:
    """Turns requests into running agents."""

    def __init__(
        self, settings: Settings, store: Store, teams: Teams, lifecycle: Lifecycle, launcher: Launcher
    ) -> None:
        """Only keeps its parts."""
        self._settings = settings
        self._store = store
        self._teams = teams
        self._lifecycle = lifecycle
        self._launcher = launcher
        self._under_way: dict[str, asyncio.Task[Agent]] = {}
        self._abandoning: dict[str, asyncio.Task[None]] = {}
        self._keys: dict[tuple[str, str], asyncio.Task[Any]] = {}
        self._ensuring: dict[tuple[str, str], asyncio.Lock] = {}

    def building(self) -> set[str]:
        """Ids of agents being built now, which reconcile must not touch."""
        return set(self._under_way)

    @property
    def is_busy(self) -> bool:
        """Whether any spawn is under way."""
        return bool(self._under_way)

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
            # What is under way may be replaced by its own undoing: wait until nothing is.
            while (earlier := self._keys.get((caller.owner, key))) is not None:
                await asyncio.wait({earlier})
            known = await self._store.idempotent(caller.owner, key)
            # While the store was asked, another request may have begun under the key, or the first been given up.
            if (caller.owner, key) in self._keys:
                continue
            if known is not None:
                return await self._first_answer(known, digest)
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
        if agent is not None and agent.state == "creating":
            raise Unavailable(
                "store_unavailable", "A failed spawn under this key is still being undone. Try again.", retry_after=5
            )
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
                home = self._teams.get(team, caller)
                plan = await self._launcher.plan(home, name, request, caller, live.record.id)
                close_all(plan.held)
                wanted = plan.spec
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
        key: Key | None,
    ) -> Agent:
        """Run the spawn as a task of its own, so that a caller who hangs up can't stop it half-way."""
        if len(self._under_way) >= self._settings.max_concurrent_spawns:
            raise TooMany(
                "spawns_busy",
                f"{len(self._under_way)} spawns are under way, which is the most. Try again shortly.",
                retry_after=1,
            )
        agent_id = new_agent_id()
        task = asyncio.create_task(self._launcher.launch(agent_id, team, name, request, caller, key))
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
        self._launcher.told(agent)
        return agent

    def _forget(self, agent_id: str, key: Key | None, done: asyncio.Task[Any]) -> None:
        for tasks in (self._under_way, self._abandoning):
            if tasks.get(agent_id) is done:
                del tasks[agent_id]
        if key is not None and self._keys.get((key[0], key[1])) is done:
            del self._keys[key[0], key[1]]

    async def _abandon(self, agent_id: str, task: asyncio.Task[Agent]) -> None:
        """The caller hung up and will never learn the id: undo the spawn."""
        await asyncio.wait({task})
        if task.cancelled() or task.exception() is not None:
            return
        # An agent in a box that waited for it has that box's id.
        agent_id = task.result().id
        live = self._lifecycle.find(agent_id)
        if live is None:
            return
        live.detail = "Its caller hung up before it was told."
        while True:
            try:
                await self._lifecycle.stop(live, None, 0.0)
                await self._store.delete_agent(agent_id)
                break
            except IsolatorError as error:
                _log.warning("agent %s, of which nobody was told, can't be undone yet: %s", agent_id, error)
                await asyncio.sleep(_AGAIN)
        await self._launcher.undo_team(live.record.spec.team)

    async def settle(self, timeout: float) -> None:
        """Wait for the spawns under way, at most `timeout` seconds."""
        work: set[asyncio.Task[Any]] = {*self._under_way.values(), *self._abandoning.values()}
        if work:
            _, unfinished = await asyncio.wait(work, timeout=timeout)
            for task in unfinished:
                task.cancel()
