"""What was promised: teams, agents, idempotency keys, events. One SQLite file, one thread that touches it.

Every write is durable when its coroutine returns (WAL, synchronous=FULL). Reads and writes share the one thread,
so an answer never shows half of a change.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from isolator.model.agent import Agent, State
from isolator.model.errors import Conflict, Unavailable
from isolator.model.event import PROGRESS, Event
from isolator.model.team import Team
from isolator.store.listing import PAGE_BYTES, Page, Place, Wanted, read_page
from isolator.store.mail import Mail
from isolator.store.records import load_agent
from isolator.store.rows import prune_removed, write_agent
from isolator.store.schema import migrate

Result = TypeVar("Result")
_PRUNE_EVERY = 256
_KEY_LIFE = 86_400.0


class Store:
    """The database. Open with `Store.open`, end with `close`."""

    def __init__(self, connection: sqlite3.Connection, thread: ThreadPoolExecutor, events_kept: int) -> None:
        """Use `Store.open`."""
        self._connection = connection
        self._thread = thread
        self._events_kept = events_kept
        self.mail = Mail(connection, self._run, self._transaction)

    @classmethod
    async def open(cls, path: Path, events_kept: int) -> Store:
        """Open or create the database.

        Raises:
            Unavailable: `store_newer` (written by a newer isolator), `store_damaged` (or unreadable).
        """
        thread = ThreadPoolExecutor(1, thread_name_prefix="isolator-store")

        def connect() -> sqlite3.Connection:
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            path.chmod(0o600)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA cache_size = -1024")
            migrate(connection)
            return connection

        try:
            connection = await asyncio.get_running_loop().run_in_executor(thread, connect)
        except (sqlite3.Error, OSError) as error:
            raise Unavailable(
                "store_damaged",
                f"{path} can't be opened: {error}. Move it away to start anew; agents that run are then removed.",
            ) from error
        return cls(connection, thread, events_kept)

    async def close(self) -> None:
        """Finish what was asked and close."""
        await self._run(self._connection.close)
        self._thread.shutdown()

    async def _run(self, function: Callable[[], Result]) -> Result:
        def guarded() -> Result:
            try:
                return function()
            except sqlite3.IntegrityError:
                raise
            except sqlite3.DatabaseError as error:
                raise Unavailable("store_unavailable", f"The database can't be written or read: {error}.") from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, guarded)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of it or nothing; on the store's thread only."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    # teams

    async def add_team(self, team: Team) -> None:
        """Add a team. Raises Conflict: `team_exists`, `subnet_taken`."""

        def add() -> None:
            try:
                self._connection.execute(
                    "INSERT INTO team (id, owner, subnet, created_at, network_id) VALUES (?, ?, ?, ?, ?)",
                    (team.id, team.owner, team.subnet, team.created_at, team.network_id),
                )
            except sqlite3.IntegrityError as error:
                if "team.subnet" in str(error):
                    raise Conflict("subnet_taken", f"{team.subnet} is taken.") from error
                raise Conflict("team_exists", f"A team {team.id} exists already.") from error

        await self._run(add)

    async def set_team_network(self, team: str, network_id: str, subnet: str) -> None:
        """Note the network the engine made."""
        await self._run(
            lambda: self._connection.execute(
                "UPDATE team SET network_id = ?, subnet = ? WHERE id = ?", (network_id, subnet, team)
            )
        )

    async def delete_team(self, team: str) -> None:
        """Forget a team; its agents' records stay."""
        await self._run(lambda: self._connection.execute("DELETE FROM team WHERE id = ?", (team,)))

    async def teams(self) -> list[Team]:
        """Every team, oldest first."""
        rows = await self._run(
            lambda: self._connection.execute(
                "SELECT id, owner, subnet, created_at, network_id FROM team ORDER BY created_at, id"
            ).fetchall()
        )
        return [Team(*row) for row in rows]

    # agents

    async def add_agent(
        self, agent: Agent, key: tuple[str, str, str] | None = None, event: Event | None = None
    ) -> Event | None:
        """Add an agent, with its idempotency key (owner, key, digest of the request) and an event if it has one.

        Returns:
            The event under its own number.

        Raises:
            Conflict: `name_taken`.
        """

        def add() -> Event | None:
            try:
                with self._transaction():
                    write_agent(self._connection, agent, insert=True)
                    if key is not None:
                        self._connection.execute(
                            "INSERT OR REPLACE INTO idempotency (owner, key, request, agent, created_at)"
                            " VALUES (?, ?, ?, ?, ?)",
                            (*key, agent.id, time.time()),
                        )
                    return None if event is None else self._append_event(event)
            except sqlite3.IntegrityError as error:
                raise Conflict(
                    "name_taken",
                    f"The team {agent.spec.team} has a live agent named {agent.spec.name}.",
                    name=agent.spec.name,
                ) from error

        return await self._run(add)

    async def save_agent(self, agent: Agent) -> None:
        """Write an agent's record over the one that is there."""
        await self._run(lambda: write_agent(self._connection, agent, insert=False))

    async def delete_agent(self, agent_id: str) -> None:
        """Forget an agent that never came to be, its idempotency key too."""

        def delete() -> None:
            with self._transaction():
                self._connection.execute("DELETE FROM agent WHERE id = ?", (agent_id,))
                self._connection.execute("DELETE FROM idempotency WHERE agent = ?", (agent_id,))

        await self._run(delete)

    async def agent(self, agent_id: str) -> Agent | None:
        """One agent's record."""
        row = await self._run(
            lambda: self._connection.execute("SELECT record FROM agent WHERE id = ?", (agent_id,)).fetchone()
        )
        return None if row is None else load_agent(row[0])

    async def agents(
        self,
        *,
        states: tuple[State, ...] | None = None,
        team: str | None = None,
        session: str | None = None,
        owner: str | None = None,
    ) -> list[Agent]:
        """Every agent that matches all that is given, oldest first. For answers, take pages: this has no bound."""
        wanted = Wanted(states, team, session, owner)
        page = await self.page(wanted)
        agents = page.agents
        while page.next is not None:
            page = await self.page(wanted, after=page.next)
            agents += page.agents
        return agents

    async def page(
        self, wanted: Wanted, *, after: Place | None = None, limit: int = 1000, most_bytes: int = PAGE_BYTES
    ) -> Page:
        """At most `limit` of the agents wanted, oldest first, from a place on; fewer where their records are large."""
        return await self._run(lambda: read_page(self._connection, wanted, after, limit, most_bytes))

    async def idempotent(self, owner: str, key: str) -> tuple[str, str] | None:
        """(digest of the request, agent id) of an earlier spawn under this key."""
        row = await self._run(
            lambda: self._connection.execute(
                "SELECT request, agent FROM idempotency WHERE owner = ? AND key = ?", (owner, key)
            ).fetchone()
        )
        return None if row is None else (row[0], row[1])

    async def prune(self, records_kept: int) -> None:
        """Drop the records removed longest ago, and idempotency keys of more than a day ago."""

        def prune() -> None:
            prune_removed(self._connection, records_kept)
            self._connection.execute("DELETE FROM idempotency WHERE created_at < ?", (time.time() - _KEY_LIFE,))

        await self._run(prune)

    # events

    async def add_event(
        self, kind: str, owner: str | None, team: str | None, agent: str | None, data: dict[str, Any]
    ) -> Event:
        """Append an event; the oldest go when there are too many."""
        event = Event(0, time.time(), kind, owner, team, agent, data)
        return await self._run(lambda: self._append_event(event))

    def _append_event(self, event: Event) -> Event:
        """On the store's thread."""
        cursor = self._connection.execute(
            "INSERT INTO event (at, type, owner, team, agent, data) VALUES (?, ?, ?, ?, ?, ?)",
            (event.at, event.type, event.owner, event.team, event.agent, json.dumps(event.data)),
        )
        number = int(cursor.lastrowid or 0)
        if number % _PRUNE_EVERY == 0:
            self._prune_events()
        return replace(event, id=number)

    def _prune_events(self) -> None:
        """Of progress and of all else the newest are kept: a box that talks without end pushes out only talk."""
        for kind in ("type = ?", "type <> ?"):
            self._connection.execute(
                f"DELETE FROM event WHERE {kind} AND id <="  # noqa: S608 - fixed text
                f" (SELECT id FROM event WHERE {kind} ORDER BY id DESC LIMIT 1 OFFSET ?)",
                (PROGRESS, PROGRESS, self._events_kept),
            )

    async def events_after(self, number: int, limit: int) -> list[Event]:
        """Events with a greater id, oldest first, at most `limit`."""
        rows = await self._run(
            lambda: self._connection.execute(
                "SELECT id, at, type, owner, team, agent, data FROM event WHERE id > ? ORDER BY id LIMIT ?",
                (number, limit),
            ).fetchall()
        )
        return [
            Event(
                id=row[0],
                at=row[1],
                type=row[2],
                owner=row[3],
                team=row[4],
                agent=row[5],
                data=json.loads(row[6]),
            )
            for row in rows
        ]

    async def last_event(self) -> int:
        """The greatest event id so far, 0 if there was none."""
        row = await self._run(
            lambda: self._connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'event'").fetchone()
        )
        return 0 if row is None else int(row[0])

    # facts

    async def fact(self, name: str) -> str | None:
        """A small remembered value."""
        row = await self._run(
            lambda: self._connection.execute("SELECT value FROM fact WHERE name = ?", (name,)).fetchone()
        )
        return None if row is None else str(row[0])

    async def set_fact(self, name: str, value: str) -> None:
        """Remember a small value."""
        await self._run(
            lambda: self._connection.execute(
                "INSERT INTO fact (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                (name, value),
            )
        )
