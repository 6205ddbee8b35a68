"""Events: everything once, in order, to whoever may know; resumable across a restart, whoever reads slowly or not."""

from __future__ import annotations

import itertools
import json
import threading
import time
from typing import Any

import pytest
from api_helpers import raw_connection
from conftest import RunningDaemon, wait_for

pytestmark = pytest.mark.engine


def parse(text: str) -> list[dict[str, Any]]:
    """The events of a server-sent stream; their form is part of the test."""
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if fields:
            event = json.loads(fields["data"])
            assert fields["id"] == str(event["id"])
            assert fields["event"] == event["type"]
            events.append(event)
    return events


def past(daemon: RunningDaemon, query: str = "", **headers: str) -> list[dict[str, Any]]:
    """What there is, without following."""
    answer = daemon.get(f"/v1/events?follow=false{query}", headers={k.replace("_", "-"): v for k, v in headers.items()})
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream"
    return parse(answer.content.decode())


class Follower:
    """A reader of the stream in a thread of its own."""

    def __init__(self, daemon: RunningDaemon, query: str = "") -> None:
        self.text = ""
        self.ended = threading.Event()
        self._daemon, self._query = daemon, query
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._ready.wait(10)

    def _read(self) -> None:
        with raw_connection(self._daemon.socket, 60) as connection:
            connection.sendall(f"GET /v1/events{self._query} HTTP/1.0\r\nHost: x\r\n\r\n".encode())
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(1)
            self._ready.set()
            while data := connection.recv(4096):
                self.text += data.decode()
        self.ended.set()

    def events(self) -> list[dict[str, Any]]:
        return parse(self.text[: self.text.rfind("\n\n") + 2])


def test_the_life_of_an_agent_is_told_in_order(daemon: RunningDaemon) -> None:
    follower = Follower(daemon, "?team=life")
    agent = daemon.spawn("sh", "-c", "exit 3", team="life", name="worker")
    daemon.wait(agent)
    daemon.delete(f"/v1/agents/{agent['id']}")
    daemon.delete("/v1/teams/life")
    wait_for(lambda: any(event["type"] == "team.deleted" for event in follower.events()), 10, lambda: follower.text)
    events = follower.events()
    assert [event["type"] for event in events] == [
        "team.created", "agent.started", "agent.exited", "agent.removed", "team.deleted",
    ]  # fmt: skip
    assert {event["agent"] for event in events[1:4]} == {agent["id"]}
    assert events[2]["data"] == {"name": "worker", "reason": "exited", "code": 3, "signal": None}
    assert [event["id"] for event in events] == sorted(event["id"] for event in events)
    assert past(daemon, "&team=life") == events


def test_filters(daemon: RunningDaemon) -> None:
    agents = [daemon.spawn("sleep", "60", team=team) for team in ("filter-a", "filter-b")]
    assert {event["team"] for event in past(daemon, "&team=filter-a")} == {"filter-a"}
    assert {event["agent"] for event in past(daemon, f"&agent={agents[1]['id']}")} == {agents[1]["id"]}
    assert past(daemon, f"&team=filter-a&agent={agents[1]['id']}") == []
    assert past(daemon, "&team=absent") == []


def test_resuming_gives_what_came_after_and_nothing_twice(daemon: RunningDaemon) -> None:
    daemon.post("/v1/teams", {"id": "resume"})
    everything = past(daemon)
    middle = everything[len(everything) // 2]["id"]
    assert past(daemon, Last_Event_ID=str(middle)) == [event for event in everything if event["id"] > middle]
    assert past(daemon, f"&after={middle}") == [event for event in everything if event["id"] > middle]
    assert past(daemon, Last_Event_ID=str(everything[-1]["id"])) == []
    # the header is what a browser's reconnect sends: it wins over the address it first asked for
    assert past(daemon, "&after=0", Last_Event_ID=str(everything[-1]["id"])) == []
    assert past(daemon, Last_Event_ID="9007199254740992") == []


def test_following_begins_now_unless_told_otherwise(daemon: RunningDaemon) -> None:
    last = past(daemon)[-1]["id"]
    fresh, resumed = Follower(daemon), Follower(daemon, f"?after={last - 1}")
    daemon.post("/v1/teams", {"id": "now"})
    wait_for(lambda: fresh.events() and len(resumed.events()) > 1, 10, lambda: fresh.text)
    assert all(event["id"] > last for event in fresh.events())
    assert resumed.events()[0]["id"] == last


def test_a_restart_loses_and_doubles_nothing(own_daemon: RunningDaemon) -> None:
    own_daemon.post("/v1/teams", {"id": "before"})
    seen = past(own_daemon)
    for stop in (own_daemon.stop, own_daemon.kill):
        follower = Follower(own_daemon, f"?after={seen[-1]['id']}")
        own_daemon.spawn("sleep", "300", team="before")
        wait_for(follower.events, 10)
        stop()
        assert follower.ended.wait(15), "the stream did not end with the daemon"
        seen += follower.events()
        own_daemon.start()
        own_daemon.spawn("true", team="before")
        seen += past(own_daemon, Last_Event_ID=str(seen[-1]["id"]))
    ids = [event["id"] for event in seen]
    assert ids == list(range(ids[0], ids[0] + len(ids)))
    assert seen == past(own_daemon)
    assert sum(event["type"] == "agent.started" for event in seen) == 4


def test_a_reader_that_does_not_read_holds_up_nobody_and_misses_nothing(daemon: RunningDaemon) -> None:
    daemon.post("/v1/teams", {"id": "slow"})
    first = past(daemon)[-1]["id"]
    with raw_connection(daemon.socket) as lazy:
        # Hundreds of requests for everything there is, on one connection, and not one answer read.
        lazy.setblocking(False)
        request = b"GET /v1/events?follow=false HTTP/1.1\r\nHost: x\r\n\r\n"
        for _ in range(50):
            try:
                lazy.send(request)
            except BlockingIOError:
                break
        began = time.monotonic()
        for number in range(5):
            daemon.post("/v1/teams", {"id": f"slow-{number}"})
        assert time.monotonic() - began < 20
        assert len([event for event in past(daemon, f"&after={first}") if event["type"] == "team.created"]) == 5


def test_streams_are_bounded_and_told_so(engine, image_pins) -> None:
    from conftest import running_daemon

    with running_daemon(engine, image_pins, ISOLATOR_MAX_FOLLOWERS="2") as daemon:
        followers = [Follower(daemon), Follower(daemon)]
        refused = daemon.get("/v1/events")
        assert (refused.status, refused.json["code"]) == (429, "followers_exhausted")
        assert refused.headers["retry-after"]
        assert daemon.get("/healthz").status == 200
        del followers
        daemon.stop()
        daemon.start()
        assert daemon.get("/v1/events?follow=false").status == 200


def test_a_quiet_stream_is_kept_alive(daemon: RunningDaemon) -> None:
    follower = Follower(daemon, "?team=nobody")
    wait_for(lambda: ": keep-alive\n\n" in follower.text, 20, lambda: follower.text)
    assert follower.events() == []


def test_a_new_daemon_tells_of_its_engine_and_its_network(daemon: RunningDaemon) -> None:
    types = [event["type"] for event in past(daemon)]
    for kind in ("engine.up", "daemon.reconciled", "network.tested"):
        assert kind in types
    ids = [event["id"] for event in past(daemon)]
    assert all(later == earlier + 1 for earlier, later in itertools.pairwise(ids))
