"""What the tests of messages share: a router on a real store, agents on paper, and visitors on socketpairs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isolator.api.inside import InsideServer
from isolator.messages.envelope import Address, Bounds
from isolator.messages.mailbox import Subscription, Ticket
from isolator.messages.progress import Peer, ProgressDesk
from isolator.messages.router import Router
from isolator.messages.visitors import Visitors
from isolator.model.message import AgentMessage, MessageRequest
from isolator.store.store import Store


@dataclass
class Person:
    """An agent as far as messages go."""

    id: str
    team: str = "crew"
    name: str = ""
    owner: str = "uid:1000"
    running: bool = True
    touched: int = 0

    def touch(self) -> None:
        self.touched += 1

    def __post_init__(self) -> None:
        self.name = self.name or f"name-of-{self.id}"


@dataclass
class World:
    """A router, its store, its agents, and what it told."""

    store: Store
    people: dict[str, Person] = field(default_factory=dict)
    dropped: list[tuple[str, str, int]] = field(default_factory=list)
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)
    router: Router = None  # type: ignore[assignment]

    def find(self, agent: str) -> Person | None:
        return self.people.get(agent)

    def named(self, team: str, name: str) -> Person | None:
        return next((one for one in self.people.values() if (one.team, one.name) == (team, name)), None)

    async def _drop(self, agent: str, side: str, count: int) -> None:
        self.dropped.append((agent, side, count))

    async def _tell(self, peer: Peer, report: dict[str, Any]) -> None:
        self.told.append((peer.id, report))

    def start(self, bounds: Bounds) -> None:
        desk = ProgressDesk(self.kept.__setitem__, self._tell)
        self.router = Router(self.store.mail, bounds, self, desk, self._drop)  # type: ignore[arg-type]

    def say(self, sender: str, to: str, body: Any = None, **more: Any) -> tuple[Ticket, list[str]]:
        """Send, from an agent or the gateway; the ticket and what it became so far."""
        states: list[str] = []

        def watch(ticket: Ticket) -> None:
            states.append(ticket.error.code if ticket.error is not None else str(ticket.state))

        if sender == "gateway":
            message = MessageRequest(type="note", body=body, **more)
            return self.router.from_gateway(to, message, watch), states
        more = {"type": "note", **more}
        return self.router.from_agent(sender, AgentMessage(to=to, body=body, **more), watch), states

    def ear(self, agent: str, side: str = "agent") -> Ear:
        return Ear(self.router, agent, side)


class Ear:
    """A receiver that keeps what it hears."""

    def __init__(self, router: Router, agent: str, side: str = "agent") -> None:
        self.heard: list[dict[str, Any]] = []
        self.is_gone = False
        self.subscription: Subscription = router.subscribe(
            Address(agent, side),  # type: ignore[arg-type]
            lambda line: self.heard.append(json.loads(line)),
            self._gone,
        )

    def _gone(self) -> None:
        self.is_gone = True

    @property
    def bodies(self) -> list[Any]:
        return [message["body"] for message in self.heard]

    async def acknowledge_next(self, place: int) -> None:
        """Acknowledge the message at that place, once it has come."""
        await until(lambda: len(self.heard) > place)
        assert self.acknowledge(place)

    def acknowledge(self, place: int = -1) -> bool:
        return self.subscription.acknowledge(self.heard[place]["id"])

    def close(self) -> None:
        self.subscription.close()


@contextlib.asynccontextmanager
async def world(folder: Path, *agents: str | Person, bounds: Bounds | None = None) -> AsyncIterator[World]:
    """A router on a store in `folder`."""
    store = await Store.open(folder / "mail.db", 1000)
    people = [one if isinstance(one, Person) else Person(one) for one in agents]
    made = World(store, {one.id: one for one in people})
    made.start(bounds or Bounds())
    for one in people:
        # Only agents the store knows keep their mail across a restart.
        store._connection.execute(
            "INSERT OR IGNORE INTO agent (id, team, name, owner, state, created_at, record)"
            " VALUES (?, ?, ?, ?, 'running', 0, '{}')",
            (one.id, one.team, one.name, one.owner),
        )
    await made.router.load()
    try:
        yield made
    finally:
        await made.router.close()
        await store.close()


async def until(condition: Any, seconds: float = 5.0) -> None:
    """Until `condition()` is true; fails after `seconds`."""
    end = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < end, "it did not come true"
        await asyncio.sleep(0.005)


class Caller:
    """A process of a box, at its end of a socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._loop = asyncio.get_running_loop()
        self._rest = b""

    async def send(self, *objects: Any) -> None:
        await self.send_bytes(b"".join(json.dumps(one).encode() + b"\n" for one in objects))

    async def send_bytes(self, data: bytes) -> None:
        await asyncio.wait_for(self._loop.sock_sendall(self.socket, data), 10)

    async def line(self, seconds: float = 5.0) -> dict[str, Any]:
        while b"\n" not in self._rest:
            data = await asyncio.wait_for(self._loop.sock_recv(self.socket, 1 << 20), seconds)
            assert data, f"it hung up after {self._rest!r}"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        result: dict[str, Any] = json.loads(line)
        return result

    async def to_end(self, seconds: float = 5.0) -> bytes:
        """Everything until it hangs up."""
        async with asyncio.timeout(seconds):
            with contextlib.suppress(ConnectionError):
                while data := await self._loop.sock_recv(self.socket, 1 << 20):
                    self._rest += data
        rest, self._rest = self._rest, b""
        return rest

    async def silent(self, seconds: float = 0.2) -> bool:
        """Whether nothing comes for a while."""
        if self._rest:
            return False
        try:
            self._rest += await asyncio.wait_for(self._loop.sock_recv(self.socket, 1 << 20), seconds)
        except TimeoutError:
            return True
        return False

    def close(self) -> None:
        self.socket.close()


@dataclass
class Lobby:
    """A world whose agents may be visited."""

    world: World
    visitors: Visitors
    callers: list[Caller] = field(default_factory=list)

    def call(self, agent: str) -> Caller:
        """A new connection of that agent's box."""
        here, there = socket.socketpair()
        for end in (here, there):
            end.setblocking(False)
        self.visitors.take(agent, there)
        self.callers.append(Caller(here))
        return self.callers[-1]

    async def http(self, agent: str, method: str, path: str, body: Any = None) -> tuple[int, dict[str, str], Any]:
        """One HTTP request; status, headers and JSON of the answer."""
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: isolator\r\nContent-Length: {len(data)}\r\n\r\n"
        caller = self.call(agent)
        await caller.send_bytes(head.encode() + data)
        answer = await caller.to_end(70)
        top, _, content = answer.partition(b"\r\n\r\n")
        status, *fields = top.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in fields)}
        return int(status.split()[1]), headers, json.loads(content) if content else None


@contextlib.asynccontextmanager
async def lobby(folder: Path, *agents: str | Person, bounds: Bounds | None = None) -> AsyncIterator[Lobby]:
    """As `world`, with visitors."""
    async with world(folder, *agents, bounds=bounds) as made:
        inside = InsideServer(made.router, made.find)
        await inside.start()
        visitors = Visitors(made.router, inside)
        there = Lobby(made, visitors)
        try:
            yield there
        finally:
            for caller in there.callers:
                caller.close()
            visitors.close()
            await inside.stop()
