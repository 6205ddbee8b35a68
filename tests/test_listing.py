"""However many agents there are and however large, a list comes in pages of bounded size, each agent once."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import struct
import tempfile
import tracemalloc
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
import pytest_asyncio
from conftest import RunningDaemon, UnixConnection, running_daemon
from test_store import agent

from isolator.agents.deadlines import Deadlines
from isolator.agents.events import EventHub
from isolator.agents.lifecycle import Lifecycle
from isolator.agents.live import LiveAgent
from isolator.api.metrics import Metrics
from isolator.api.server import ApiServer, open_socket
from isolator.audit.log import AuditLog
from isolator.client import Client
from isolator.model.agent import Agent
from isolator.model.errors import Unavailable
from isolator.policy.compile import MAX_COMMAND_BYTES
from isolator.settings import Settings
from isolator.store.listing import PAGE_BYTES, Page, Place, Wanted
from isolator.store.store import Store

LARGE = ("x" * (MAX_COMMAND_BYTES - 1),)


def numbered(number: int, state: str = "exited", **changes: Any) -> Agent:
    """An agent with an id of the real length; greater numbers were made later."""
    made = agent(number, state, **changes)
    agent_id = f"a{number:015}"
    return replace(made, id=agent_id, spec=replace(made.spec, agent=agent_id))


class NoBox:
    """A backend and builder whose boxes are gone already, so that a removal needs no engine."""

    async def remove(self, box_id: str) -> None:
        """Nothing is there."""

    async def discard(self, agent_id: str) -> None:
        """Nothing is there."""


@dataclass
class Served:
    """The real API over a real store on a socket, without an engine behind it."""

    path: Path
    store: Store
    lifecycle: Lifecycle

    async def ask(self, method: str, address: str) -> tuple[int, Any, int]:
        """Status, body, and the body's length."""
        return await asyncio.to_thread(self._ask, method, address)

    def _ask(self, method: str, address: str) -> tuple[int, Any, int]:
        connection = UnixConnection(self.path, 20)
        try:
            connection.request(method, address)
            answer = connection.getresponse()
            content = answer.read()
            return answer.status, json.loads(content), len(content)
        finally:
            connection.close()


@pytest_asyncio.fixture
async def served(request: pytest.FixtureRequest) -> AsyncIterator[Served]:
    with tempfile.TemporaryDirectory(prefix="iso-") as name:
        folder = Path(name)
        store = await Store.open(folder / "isolator.db", 1000)
        audit = AuditLog(folder / "audit")
        box: Any = NoBox()
        kept = getattr(request, "param", 5000)
        lifecycle = Lifecycle(store, audit, EventHub(store), box, box, Deadlines(), kept)
        settings = Settings(admin_uids=[0])
        parts: Any = SimpleNamespace(settings=settings, store=store, lifecycle=lifecycle, metrics=Metrics())
        server = ApiServer(parts)
        await server.start([open_socket(folder / "run" / "s", None)])
        yield Served(folder / "run" / "s", store, lifecycle)
        await server.stop()
        audit.close()
        await store.close()


# removal


@pytest.mark.parametrize("disk", ["fine", "refuses"])
async def test_one_that_is_removed_is_found_by_nobody_who_comes_meanwhile(
    served: Served, monkeypatch: pytest.MonkeyPatch, disk: str
) -> None:
    record = numbered(1)
    await served.store.add_agent(record)
    live = LiveAgent(record)
    served.lifecycle.hold(live)
    found: list[object] = []

    async def prune(_: int) -> None:
        found.append(served.lifecycle.find(record.id))
        if disk == "refuses":
            raise Unavailable("store_unavailable", "The disk is full.")

    monkeypatch.setattr(served.store, "prune", prune)
    removed = await served.lifecycle.stop(live, None, 0)
    assert removed.state == "removed"
    assert found == [None], "who found it now, would wait for its end for ever"
    assert served.lifecycle.live() == []
    assert live.ended.is_set()
    assert [event.type for event in await served.store.events_after(0, 10)] == ["agent.removed"]


# the API


async def test_an_answer_is_bounded_and_the_client_still_finds_every_agent_once(served: Served) -> None:
    for number in range(100):
        await served.store.add_agent(numbered(number, command=LARGE))
    status, body, length = await served.ask("GET", "/v1/agents")
    assert status == 200
    assert 0 < len(body["items"]) < 40
    assert length < PAGE_BYTES
    assert body["next"] is not None
    found = await asyncio.to_thread(Client(served.path).agents)
    assert [item.id for item in found] == [f"a{number:015}" for number in range(100)]


async def test_many_who_ask_and_do_not_read_cost_little_each(served: Served) -> None:
    for number in range(40):
        await served.store.add_agent(numbered(number, command=LARGE))
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        for _ in range(20):
            reader = stack.enter_context(socket.socket(socket.AF_UNIX))
            reader.setblocking(False)
            await loop.sock_connect(reader, str(served.path))
            await loop.sock_sendall(reader, b"GET /v1/agents HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await asyncio.wait_for(loop.sock_recv(reader, 15), 10) == b"HTTP/1.1 200 OK"
        # Whole pages would be 80 MiB, and twice that where they wait to be sent.
        assert tracemalloc.get_traced_memory()[0] < 40 * 1024**2
        assert (await served.ask("GET", "/v1/agents"))[0] == 200


async def test_a_list_that_breaks_off_ends_with_a_place_to_go_on(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(10):
        await served.store.add_agent(numbered(number, command=LARGE))
    whole, calls = served.store.page, []

    async def page(*args: Any, **options: Any) -> Page:
        calls.append(options["after"])
        if len(calls) > 1:
            raise Unavailable("store_unavailable", "The disk is gone.")
        return await whole(*args, **options)

    monkeypatch.setattr(served.store, "page", page)
    status, first, _ = await served.ask("GET", "/v1/agents")
    assert (status, len(calls)) == (200, 2)
    assert 0 < len(first["items"]) < 10
    address = f"/v1/agents?after={quote(first['next'])}"
    assert (await served.ask("GET", address))[0] == 503
    monkeypatch.undo()
    _, rest, _ = await served.ask("GET", address)
    assert [item["id"] for item in first["items"] + rest["items"]] == [numbered(number).id for number in range(10)]
    assert rest["next"] is None


async def test_an_empty_list_is_a_list(served: Served) -> None:
    assert (await served.ask("GET", "/v1/agents"))[:2] == (200, {"items": [], "next": None})


async def test_a_page_ends_after_the_limit_and_says_where_the_next_begins(served: Served) -> None:
    for number in range(5):
        await served.store.add_agent(numbered(number))
    pages = []
    address = "/v1/agents?limit=2"
    while True:
        _, body, _ = await served.ask("GET", address)
        pages.append([int(item["id"][1:]) for item in body["items"]])
        if body["next"] is None:
            break
        assert len(body["next"]) <= 64
        address = f"/v1/agents?limit=2&after={quote(body['next'])}"
    assert pages == [[0, 1], [2, 3], [4]]
    assert (await served.ask("GET", "/v1/agents?limit=5"))[1]["next"] is None
    assert (await served.ask("GET", "/v1/agents"))[1]["next"] is None


async def test_what_is_chosen_by_is_chosen_on_every_page(served: Served) -> None:
    for number in range(12):
        state = "removed" if number % 3 == 0 else "exited"
        await served.store.add_agent(numbered(number, state, team="red" if number % 2 else "blue"))
    seen = []
    address = "/v1/agents?team=red&limit=1"
    while address:
        _, body, _ = await served.ask("GET", address)
        seen += [int(item["id"][1:]) for item in body["items"]]
        address = f"/v1/agents?team=red&limit=1&after={body['next']}" if body["next"] else ""
    assert seen == [1, 5, 7, 11]


def cursor(moment: float, agent_id: str) -> str:
    return base64.urlsafe_b64encode(struct.pack(">d", moment) + agent_id.encode()).decode()


GOOD = cursor(5.0, "a" * 16)


@pytest.mark.parametrize(
    "query",
    [
        "limit=0", "limit=1001", "limit=-1", "limit=nan", "limit=all", "limit=", "limit=1&limit=2",
        "after=", "after=1", "after=null", "after=%20", "after=%F0%9F%98%80", f"after={GOOD}&after={GOOD}",
        f"after={GOOD[:-1]}", f"after={GOOD}A", f"after={GOOD}====", f"after={GOOD[:8]}%0A{GOOD[8:]}",
        f"after={cursor(float('nan'), 'a' * 16)}", f"after={cursor(float('inf'), 'a' * 16)}",
        f"after={cursor(1.0, 'a' * 15)}", f"after={cursor(1.0, 'A' * 16)}", f"after={cursor(1.0, '')}",
        f"after={cursor(1.0, chr(0xe9) * 8)}", "after=" + "a" * 257,
    ],
)  # fmt: skip
async def test_a_limit_or_place_that_is_none_is_refused(served: Served, query: str) -> None:
    status, body, _ = await served.ask("GET", f"/v1/agents?{query}")
    assert (status, body["code"]) == (400, "invalid_query")
    assert query.partition("=")[0] in body["detail"]


async def test_a_place_holds_though_its_agent_is_gone(served: Served) -> None:
    for number in (1, 2, 3):
        await served.store.add_agent(numbered(number))
    _, first, _ = await served.ask("GET", "/v1/agents?limit=2")
    await served.store.delete_agent(first["items"][1]["id"])
    _, rest, _ = await served.ask("GET", f"/v1/agents?after={first['next']}")
    assert [item["id"] for item in rest["items"]] == [numbered(3).id]
    assert (await served.ask("GET", f"/v1/agents?after={cursor(1e12, 'a' * 16)}"))[1] == {"items": [], "next": None}


@pytest.mark.parametrize("served", [0], indirect=True)
async def test_a_stop_is_answered_with_the_record_even_if_that_is_dropped_at_once(served: Served) -> None:
    ended = numbered(1)
    await served.store.add_agent(ended)
    served.lifecycle.hold(LiveAgent(ended))
    status, body, _ = await served.ask("DELETE", f"/v1/agents/{ended.id}")
    assert (status, body["id"], body["state"]) == (200, ended.id, "removed")
    assert (await served.ask("GET", f"/v1/agents/{ended.id}"))[0] == 404


@pytest.mark.parametrize("served", [3], indirect=True)
async def test_the_record_of_one_just_stopped_outlives_many_younger_ones(served: Served) -> None:
    old = numbered(1).changed(finished_at=1001.5)
    await served.store.add_agent(old)
    served.lifecycle.hold(LiveAgent(old))
    for number in range(2, 12):
        await served.store.add_agent(numbered(number, "removed").changed(finished_at=2000.0 + number))
    assert (await served.ask("DELETE", f"/v1/agents/{old.id}"))[0] == 200
    status, body, _ = await served.ask("GET", f"/v1/agents/{old.id}")
    assert (status, body["state"]) == (200, "removed")
    assert [item.id for item in await served.store.agents()] == [old.id, numbered(10).id, numbered(11).id]
    # And a stop that is asked for again tells the same.
    assert (await served.ask("DELETE", f"/v1/agents/{old.id}"))[:2] == (200, body)


# the store


async def test_a_page_is_read_without_the_rest(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "isolator.db", 1000)
    for number in range(200):
        await store.add_agent(numbered(number, command=LARGE))
    tracemalloc.start()
    page = await store.page(Wanted(), most_bytes=1024**2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Text and record of a page and of the row at its end; all 200 would be 26 MiB and more.
    assert peak < 4 * 1024**2
    assert 0 < len(page.agents) < 8
    await store.close()


async def test_one_that_is_larger_than_a_page_has_a_page_of_its_own(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "isolator.db", 1000)
    for number in range(3):
        await store.add_agent(numbered(number, command=LARGE if number == 1 else ("true",)))
    found, after = [], None
    while True:
        page = await store.page(Wanted(), after=after, most_bytes=5000)
        found.append([item.id for item in page.agents])
        after = page.next
        if after is None:
            break
    assert found == [[numbered(0).id], [numbered(1).id], [numbered(2).id]]
    await store.close()


async def test_agents_of_the_same_moment_are_on_one_page_each(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "isolator.db", 1000)
    moment = 1_900_000_000.123457
    for number in (3, 1, 4, 2):
        await store.add_agent(numbered(number).changed(created_at=moment))
    after, found = None, []
    for _ in range(4):
        page = await store.page(Wanted(), after=after, limit=1)
        found += page.agents
        after = None if page.next is None else Place.from_text(page.next.text())
    assert after is None
    assert [item.id for item in found] == [numbered(number).id for number in (1, 2, 3, 4)]
    await store.close()


# a whole daemon


@pytest.mark.engine
def test_a_daemon_with_a_long_past_stops_an_old_agent_and_lists_all(engine: Any, image_pins: dict[str, str]) -> None:
    with running_daemon(engine, image_pins, ISOLATOR_RECORDS_KEPT="100") as daemon:
        old = daemon.spawn("sleep", "600", team="past")
        daemon.stop()
        asyncio.run(add_past(daemon, old["id"], 120))
        daemon.start()
        stopped = daemon.delete(f"/v1/agents/{old['id']}?grace=0")
        assert (stopped.status, stopped.json["state"]) == (200, "removed")
        assert daemon.get(f"/v1/agents/{old['id']}").status == 200
        first = daemon.get("/v1/agents?all=1&limit=40").json
        assert (len(first["items"]), first["items"][0]["id"]) == (40, old["id"])
        rest = daemon.get(f"/v1/agents?all=1&after={quote(first['next'])}").json
        assert (len(rest["items"]), rest["next"]) == (60, None)
        with Client(daemon.socket) as client:
            assert len(client.agents(removed=True)) == 100


async def add_past(daemon: RunningDaemon, like: str, count: int) -> None:
    """Give a daemon that does not run records of younger agents that were removed."""
    store = await Store.open(daemon.home / "state" / "isolator.db", 1000)
    model = await store.agent(like)
    assert model is not None
    for number in range(count):
        agent_id = f"p{number:015}"
        spec = replace(model.spec, agent=agent_id, name=f"past-{number}")
        moment = model.created_at + 1 + number
        past = replace(model, id=agent_id, spec=spec, state="removed", created_at=moment, finished_at=moment)
        await store.add_agent(past)
    await store.close()
