"""Messages that wait for their receiver. Each is deleted before it is handed out, so that none ever comes twice."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

Result = TypeVar("Result")
Side = Literal["agent", "gateway"]
_COLUMNS = "number, agent, side, id, line, expires_at"


class Runner(Protocol):
    """Runs a function on the store's thread."""

    def __call__(self, function: Callable[[], Result], /) -> Awaitable[Result]:
        """Its result."""


@dataclass(frozen=True, slots=True)
class Room:
    """How many messages may be taken, of how many bytes together; `at_least_one`: the first whatever its size."""

    messages: int
    size: int
    at_least_one: bool = True


@dataclass(frozen=True, slots=True)
class KeptMessage:
    """One message. `number` is its place in the queue, None before it has one."""

    agent: str
    side: Side
    id: str
    line: bytes
    expires_at: float
    number: int | None = None


@dataclass(frozen=True, slots=True)
class Removed:
    """What is left of a message that was removed unread."""

    agent: str
    side: Side
    id: str
    size: int


@dataclass(frozen=True, slots=True)
class Queue:
    """How much is kept in one mailbox."""

    agent: str
    side: Side
    count: int
    size: int


class Mail:
    """The queries. Part of a `Store`."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        run: Runner,
        transaction: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        """On the store's connection, thread and transactions."""
        self._connection = connection
        self._run = run
        self._transaction = transaction

    async def add(self, messages: Sequence[KeptMessage]) -> None:
        """Keep messages, all or none. Those that have a number go back to their place."""

        def add() -> None:
            with self._transaction():
                self._connection.executemany(
                    f"INSERT INTO mail ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)",  # noqa: S608 - fixed names
                    [(m.number, m.agent, m.side, m.id, m.line, m.expires_at) for m in messages],
                )

        await self._run(add)

    async def take(self, agent: str, side: Side, now: float, room: Room) -> tuple[list[KeptMessage], list[Removed]]:
        """Remove the oldest messages of a mailbox, as many as there is room for; and those over their time."""

        def take() -> tuple[list[KeptMessage], list[Removed]]:
            with self._transaction():
                expired = self._delete("agent = ? AND side = ? AND expires_at <= ?", (agent, side, now))
                taken: list[KeptMessage] = []
                size = 0
                statement = f"SELECT {_COLUMNS} FROM mail WHERE agent = ? AND side = ? ORDER BY number LIMIT ?"  # noqa: S608
                with contextlib.closing(self._connection.execute(statement, (agent, side, room.messages))) as rows:
                    for number, _, _, message, line, expires_at in rows:
                        size += len(line)
                        if size > room.size and (taken or not room.at_least_one):
                            break
                        taken.append(KeptMessage(agent, side, message, line, expires_at, number))
                self._connection.executemany("DELETE FROM mail WHERE number = ?", [(m.number,) for m in taken])
            return taken, expired

        return await self._run(take)

    async def expire(self, now: float) -> tuple[list[Removed], float | None]:
        """Remove what is over its time; and when the next one will be."""

        def expire() -> tuple[list[Removed], float | None]:
            with self._transaction():
                expired = self._delete("expires_at <= ?", (now,))
                (following,) = self._connection.execute("SELECT min(expires_at) FROM mail").fetchone()
            return expired, following

        return await self._run(expire)

    async def drop(self, agent: str, side: Side) -> list[Removed]:
        """Remove all of a mailbox."""

        def drop() -> list[Removed]:
            with self._transaction():
                return self._delete("agent = ? AND side = ?", (agent, side))

        return await self._run(drop)

    async def drop_orphans(self) -> list[Queue]:
        """Remove what no agent can receive or has sent any more; how much of which."""
        orphan = """
            (side = 'agent' AND agent NOT IN (SELECT id FROM agent WHERE state IN ('creating', 'running')))
            OR agent NOT IN (SELECT id FROM agent WHERE state <> 'removed')
        """

        def drop() -> list[Queue]:
            with self._transaction():
                found = self._queues(f"WHERE {orphan}")
                self._connection.execute(f"DELETE FROM mail WHERE {orphan}")  # noqa: S608 - fixed text
            return found

        return await self._run(drop)

    async def queues(self) -> list[Queue]:
        """How much is kept in each mailbox that is not empty."""
        return await self._run(self._queues)

    def _queues(self, where: str = "") -> list[Queue]:
        rows = self._connection.execute(
            f"SELECT agent, side, count(*), sum(length(line)) FROM mail {where} GROUP BY agent, side"  # noqa: S608
        )
        return [Queue(*row) for row in rows]

    def _delete(self, where: str, values: tuple[Any, ...]) -> list[Removed]:
        rows = self._connection.execute(f"SELECT agent, side, id, length(line) FROM mail WHERE {where}", values)  # noqa: S608
        removed = [Removed(*row) for row in rows]
        if removed:
            self._connection.execute(f"DELETE FROM mail WHERE {where}", values)  # noqa: S608
        return removed
