"""Teams: who owns them, which subnet they have, and their network on the engine."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import replace

from isolator.agents.events import EventHub
from isolator.audit.log import AuditLog
from isolator.backends.base import Backend
from isolator.cancellation import uninterrupted
from isolator.host.addresses import host_networks
from isolator.model.errors import Conflict, IsolatorError, NotFound, TooMany, Unavailable
from isolator.model.identity import Principal
from isolator.model.names import check_name
from isolator.model.team import Team
from isolator.network.subnets import free_subnet
from isolator.store.store import Store

_SUBNET_TRIES = 64
_DRAIN_TIMEOUT = 90.0


async def _nothing(team: str) -> None:
    del team


class Teams:
    """All teams, in memory as in the store."""

    def __init__(
        self, store: Store, audit: AuditLog, events: EventHub, backend: Backend, pool: str, prefix: int
    ) -> None:
        """`pool` and `prefix`: where subnets come from."""
        self._store = store
        self._audit = audit
        self._events = events
        self._backend = backend
        self._pool = pool
        self._prefix = prefix
        self._teams: dict[str, Team] = {}
        self._creating: dict[str, asyncio.Lock] = {}
        self._reserved: set[str] = set()
        # Subnets the engine says others use: learnt by asking, forgotten with the daemon.
        self._foreign: set[str] = set()
        self._users: Counter[str] = Counter()
        self._unused = asyncio.Condition()
        self._deleting: set[str] = set()
        self.before_forgetting: Callable[[str], Awaitable[None]] = _nothing

    async def load(self) -> None:
        """Read the teams from the store."""
        self._teams = {team.id: team for team in await self._store.teams()}

    def all(self) -> list[Team]:
        """Every team."""
        return list(self._teams.values())

    def visible(self, caller: Principal) -> list[Team]:
        """The caller's teams; all of them for an admin."""
        return [team for team in self._teams.values() if caller.is_admin or team.owner == caller.owner]

    def get(self, team_id: str, caller: Principal) -> Team:
        """One team the caller may see. Raises NotFound: `team_not_found`."""
        team = self._teams.get(team_id)
        if team is None or not (caller.is_admin or team.owner == caller.owner):
            raise NotFound("team_not_found", f"There is no team {team_id[:64]!r}.")
        return team

    async def create(self, team_id: str, caller: Principal) -> Team:
        """Create a team and its network.

        Raises:
            BadRequest: `name_invalid`. Conflict: `team_exists`, `network_taken`. TooMany: `subnets_exhausted`.
            Unavailable: `engine_unavailable`.
        """
        check_name(team_id, "team")
        async with self._creating.setdefault(team_id, asyncio.Lock()):
            if team_id in self._teams:
                raise Conflict("team_exists", f"A team {team_id} exists already; it may be another user's.")
            intent = await self._audit.intent("team.create", caller, team=team_id)
            try:
                team = await self._create(team_id, caller)
            except BaseException as error:
                code = error.code if isinstance(error, IsolatorError) else type(error).__name__
                await self._audit.outcome(intent, "team.create", "failed", team=team_id, code=code)
                raise
            await self._audit.outcome(intent, "team.create", "done", team=team_id, subnet=team.subnet)
        await self._events.publish("team.created", owner=team.owner, team=team.id, subnet=team.subnet)
        return team

    def is_creating(self, team_id: str) -> bool:
        """Whether its creation is under way, so that its network is no orphan."""
        lock = self._creating.get(team_id)
        return lock is not None and lock.locked()

    async def _create(self, team_id: str, caller: Principal) -> Team:
        team = Team(team_id, caller.owner, self._reserve(), time.time())
        try:
            try:
                team = await self._make_network(team)
            except Unavailable:
                # The engine may have made it without being able to say so.
                with contextlib.suppress(IsolatorError):
                    await self._backend.remove_network(team_id)
                raise
            try:
                await self._store.add_team(team)
            except BaseException:
                await uninterrupted(self._backend.remove_network(team_id))
                raise
        finally:
            self._reserved.discard(team.subnet)
        self._teams[team_id] = team
        return team

    async def _make_network(self, team: Team) -> Team:
        """The team with its network's id; on a subnet the engine says is taken, with the next one."""
        for _ in range(_SUBNET_TRIES):
            try:
                network = await self._backend.ensure_network(team.id, team.subnet, team.owner)
            except Conflict as conflict:
                if conflict.code != "subnet_taken":
                    raise
                self._foreign.add(team.subnet)
                self._reserved.discard(team.subnet)
                team = replace(team, subnet=self._reserve())
                continue
            return replace(team, network_id=network)
        raise TooMany("subnets_exhausted", "Too many subnets of the pool are in use elsewhere on this engine.")

    def _reserve(self) -> str:
        own = {team.subnet for team in self._teams.values()}
        taken: Collection[str] = self._foreign | self._reserved | own | host_networks()
        subnet = free_subnet(self._pool, self._prefix, taken)
        self._reserved.add(subnet)
        return subnet

    def planned(self, team_id: str, caller: Principal, *, create: bool) -> Team:
        """The team a spawn is planned for: the one that exists, or, with `create`, the one that would be made.

        Raises:
            BadRequest: `name_invalid`. NotFound: `team_not_found`.
        """
        check_name(team_id, "team")
        if team_id not in self._teams and create:
            return Team(team_id, caller.owner, "", 0.0)
        return self.get(team_id, caller)

    async def realise(self, team: Team, caller: Principal) -> bool:
        """Create a planned team that does not exist yet; True if this very call made it."""
        created = False
        if team.id not in self._teams:
            try:
                await self.create(team.id, caller)
                created = True
            except Conflict as conflict:
                if conflict.code != "team_exists":
                    raise
        if self.get(team.id, caller).owner != team.owner:
            raise Conflict("team_exists", f"A team {team.id} of another user appeared meanwhile.")
        return created

    async def unmake(self, team: Team) -> bool:
        """Delete again a team that was made for a spawn that failed; False if somebody else uses it by now."""
        if self._teams.get(team.id) is not team:
            return True  # it is gone, and what may be there under its name now is another
        if self._users[team.id]:
            return False
        await self.delete(team, None, result="undone")
        return True

    async def delete(
        self,
        team: Team,
        caller: Principal | None,
        *,
        result: str = "done",
        empty: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Delete a team: announce it, let the spawns under way end, `empty` it of its agents, unmake it, tell.

        Raises:
            Conflict: `team_deleting`, or `team_busy` if a spawn does not end.
        """
        intent = await self._audit.intent("team.delete", caller, team=team.id)
        try:
            async with self._deleting_it(team):
                if empty is not None:
                    await empty()
                await self._forget(team)
        except BaseException:
            await self._audit.outcome(intent, "team.delete", "failed", team=team.id)
            raise
        await self._audit.outcome(intent, "team.delete", result, team=team.id)
        await self._events.publish("team.deleted", owner=team.owner, team=team.id)

    @contextlib.asynccontextmanager
    async def using(self, team_id: str) -> AsyncIterator[None]:
        """While a spawn is under way in the team, so that deleting it waits.

        Raises:
            Conflict: `team_deleting`.
        """
        if team_id in self._deleting:
            raise Conflict("team_deleting", f"The team {team_id} is being deleted.")
        self._users[team_id] += 1
        try:
            yield
        finally:
            self._users[team_id] -= 1
            if self._users[team_id] <= 0:
                del self._users[team_id]
                async with self._unused:
                    self._unused.notify_all()

    @contextlib.asynccontextmanager
    async def _deleting_it(self, team: Team) -> AsyncIterator[None]:
        """Closed to new spawns, and those under way have ended."""
        if team.id in self._deleting:
            raise Conflict("team_deleting", f"The team {team.id} is being deleted.")
        self._deleting.add(team.id)
        try:
            await self._drained(team)
            yield
        finally:
            self._deleting.discard(team.id)

    async def _drained(self, team: Team) -> None:
        try:
            async with asyncio.timeout(_DRAIN_TIMEOUT), self._unused:
                await self._unused.wait_for(lambda: team.id not in self._users)
        except TimeoutError:
            raise Conflict(
                "team_busy",
                f"Spawns are still under way in {team.id} after {_DRAIN_TIMEOUT:.0f} s. Try again; is the engine busy?",
                retry_after=5,
            ) from None

    async def _forget(self, team: Team) -> None:
        """Remove the network and the record of a team without agents."""
        await self.before_forgetting(team.id)
        await self._backend.remove_network(team.id)
        await self._store.delete_team(team.id)
        self._teams.pop(team.id, None)

    async def repair(self, team: Team) -> None:
        """Make the team's network again where the engine lost it; a team that is being deleted needs none."""
        if self._teams.get(team.id) is not team or team.id in self._deleting:
            return
        async with self.using(team.id):
            repaired = await self._make_network(team)
            if repaired != team:
                await self._store.set_team_network(team.id, repaired.network_id or "", repaired.subnet)
                self._teams[team.id] = repaired
