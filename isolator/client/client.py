"""The Python client: every call of the API as a method, on the standard library alone.

The command line uses nothing else, so what it can do a program can do. Calls are synchronous and one client
may be used by many threads at once: it holds no connection.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self, Unpack
from urllib.parse import quote

from isolator.client.answers import Agent, AuditEntry, AuditState, Image, Info, PoolBox, Team
from isolator.client.errors import AnswerInvalid, AnswerTimeout, ProblemError
from isolator.client.exec_calls import ExecCalls
from isolator.client.execs import Exec
from isolator.client.files import AgentFiles
from isolator.client.following import EventStream, LogStream, Opened
from isolator.client.location import find_socket
from isolator.client.messages import MessageCalls, MessageStream
from isolator.client.spawning import Options, spawn_body
from isolator.client.stats import AgentStats, AllStats
from isolator.client.transport import Answer, open_stream, request

# A spawn may wait for the network self-test and for the engine; the daemon bounds both (60 s each).
SPAWN_TIMEOUT: Final = 150.0
LONGEST_POLL: Final = 60.0
_SPARE: Final = 15.0
# The daemon says something at least every 15 s.
_EVENTS_SILENCE: Final = 45.0


class Client(ExecCalls, MessageCalls):
    """A client of one daemon. As a context manager it closes the streams that are still open.

    Every method raises SocketNotFound, SocketDenied, SocketUntrusted, ConnectionLost, AnswerTimeout,
    AnswerInvalid, or ProblemError with the daemon's own code; all are IsolatorClientError.
    """

    def __init__(self, socket: Path | None = None, *, timeout: float = 30.0) -> None:
        """Connects to nothing yet.

        Args:
            socket: the daemon's socket; None looks where `find_socket` says.
            timeout: seconds for one call that does not say otherwise.
        """
        self.location = find_socket(socket)
        self.timeout = timeout
        self._streams: weakref.WeakSet[LogStream | EventStream | Exec | MessageStream] = weakref.WeakSet()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the streams that are still open; the client can be used on."""
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            with contextlib.suppress(OSError):
                stream.close()

    # the daemon

    def info(self) -> Info:
        """Version, backend, guarantees, what is degraded, the network's proof, who you are to it."""
        return Info.from_answer(_object(self._call("GET", "/v1/info")))

    def healthy(self) -> bool:
        """Whether the daemon says that it is alive; one that does not answer raises."""
        try:
            request(self.location, "GET", "/healthz", timeout=self.timeout, decode=False)
        except ProblemError:
            return False
        return True

    def openapi(self) -> dict[str, Any]:
        """The API's own description, OpenAPI 3.1."""
        return _object(self._call("GET", "/v1/openapi.json"))

    # teams

    def create_team(self, team: str) -> Team:
        """Create a team, yours from then on. ProblemError `team_exists` and the like otherwise."""
        return Team.from_answer(_object(self._call("POST", "/v1/teams", body={"id": team})))

    def teams(self) -> list[Team]:
        """The teams you may see."""
        return [Team.from_answer(item) for item in _items(self._call("GET", "/v1/teams"))]

    def team(self, team: str) -> Team:
        """One team."""
        return Team.from_answer(_object(self._call("GET", f"/v1/teams/{_quoted(team)}")))

    def remove_team(self, team: str) -> list[str]:
        """Remove a team with its agents and its network; the ids of the agents that were removed."""
        answer = _object(self._call("DELETE", f"/v1/teams/{_quoted(team)}", timeout=SPAWN_TIMEOUT))
        return [str(agent) for agent in answer.get("removed_agents") or ()]

    # agents

    def spawn(
        self,
        team: str,
        command: Sequence[str] = (),
        *,
        name: str | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[Options],
    ) -> Agent:
        """Start an agent; it runs when this returns.

        Args:
            team: created if absent, unless create_team=False.
            command: argv, no shell; empty: the box stays up and waits.
            name: unique among the team's agents; default: its id.
            idempotency_key: a retry with the same key gets the first answer instead of a second agent.
            options: see `Options`.
        """
        body = {**spawn_body(command, options), "team": team}
        if name is not None:
            body["name"] = name
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else None
        answer = self._call("POST", "/v1/agents", body=body, headers=headers, timeout=SPAWN_TIMEOUT)
        return Agent.from_answer(_object(answer))

    def ensure(
        self, team: str, name: str, command: Sequence[str] = (), **options: Unpack[Options]
    ) -> tuple[Agent, bool]:
        """The running agent of that name if its spec is equal, else a new one; and whether it is new.

        ProblemError `spec_differs` when one of that name runs with another spec.
        """
        path = f"/v1/teams/{_quoted(team)}/agents/{_quoted(name)}"
        answer = self._call("PUT", path, body=spawn_body(command, options), timeout=SPAWN_TIMEOUT)
        return Agent.from_answer(_object(answer)), answer.status == 201

    def agents(
        self,
        *,
        team: str | None = None,
        state: str | None = None,
        session: str | None = None,
        removed: bool = False,
    ) -> list[Agent]:
        """The agents you may see; removed ones only if asked for, or by state."""
        query = {"team": team, "state": state, "session": session, "all": True if removed else None}
        found: list[Agent] = []
        places: set[str | None] = {None}
        place: str | None = None
        while True:
            answer = self._call("GET", "/v1/agents", query={**query, "after": place})
            found += (Agent.from_answer(item) for item in _items(answer))
            place = _next_page(answer)
            if place is None:
                return found
            if place in places:
                raise AnswerInvalid("The daemon's list leads back to a page of its own and has no end.")
            places.add(place)

    def agent(self, agent: str) -> Agent:
        """One agent, by id."""
        return Agent.from_answer(_object(self._call("GET", f"/v1/agents/{_quoted(agent)}")))

    def wait(self, agent: str, timeout: float | None = None) -> Agent:
        """Wait until an agent has ended.

        Args:
            agent: its id.
            timeout: seconds; None waits for as long as it runs.

        Raises:
            AnswerTimeout: it still runs after `timeout`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            poll = LONGEST_POLL if deadline is None else min(LONGEST_POLL, deadline - time.monotonic())
            asked = time.monotonic()
            answer = self._call(
                "GET",
                f"/v1/agents/{_quoted(agent)}",
                query={"wait": f"{max(poll, 0):.3f}"},
                timeout=max(poll, 0) + _SPARE,
            )
            found = Agent.from_answer(_object(answer))
            if not found.live:
                return found
            if deadline is not None and time.monotonic() >= deadline:
                raise AnswerTimeout(f"Agent {agent} still runs after {timeout:g} s.")
            if time.monotonic() - asked < min(0.5, poll):  # a daemon that does not long-poll is not hammered
                time.sleep(0.2)

    def stop(self, agent: str, grace: float | None = None) -> Agent:
        """Stop an agent and remove its box: signal, `grace` seconds, kill. Default: stop_grace."""
        answer = self._call(
            "DELETE",
            f"/v1/agents/{_quoted(agent)}",
            query={"grace": None if grace is None else f"{grace:g}"},
            timeout=SPAWN_TIMEOUT + (grace or 0),
        )
        return Agent.from_answer(_object(answer))

    def logs(self, agent: str, *, follow: bool = False, tail: int | None = None) -> LogStream:
        """An agent's output: iterate for (stream, bytes), 1 stdout and 2 stderr, from the oldest kept.

        Args:
            agent: its id.
            follow: go on until it ends.
            tail: only about so many last lines.
        """
        query = {"follow": follow, "tail": tail, "format": "frames"}
        timeout = None if follow else self.timeout  # an agent may say nothing for days
        path = f"/v1/agents/{_quoted(agent)}/logs"
        stream = LogStream(open_stream(self.location, "GET", path, query=query, timeout=timeout))
        with self._lock:
            self._streams.add(stream)
        return stream

    def _keep(self, stream: Exec | MessageStream) -> None:
        with self._lock:
            self._streams.add(stream)

    def files(self, agent: str) -> AgentFiles:
        """The files in an agent's mounts, by its id: read, write, list, rename and so on."""
        return AgentFiles(self, agent)

    def stats(self, agent: str) -> AgentStats:
        """What a running agent uses now, against its limits. ProblemError `agent_not_running` of one that does not."""
        return AgentStats.from_answer(_object(self._call("GET", f"/v1/agents/{_quoted(agent)}/stats")))

    def all_stats(self, *, team: str | None = None) -> AllStats:
        """The same of all running agents you may see."""
        return AllStats.from_answer(_object(self._call("GET", "/v1/stats", query={"team": team})))

    # what happened

    def events(
        self,
        after: int | None = None,
        *,
        follow: bool = True,
        team: str | None = None,
        agent: str | None = None,
        patience: float = 60.0,
    ) -> EventStream:
        """Events after an id, each once. A broken connection is resumed for up to `patience` seconds.

        Args:
            after: id of the last event you have; None: see the daemon's answer for a stream without one.
            follow: False ends after what is kept.
            team: only this team's.
            agent: only this agent's (id).
            patience: seconds to try to reach the daemon again.
        """

        def connect(last: int | None) -> Opened:
            return open_stream(
                self.location,
                "GET",
                "/v1/events",
                query={"follow": follow, "team": team, "agent": agent, "after": last},
                headers={
                    "Accept": "text/event-stream",
                    **({} if last is None else {"Last-Event-ID": str(last)}),
                },
                timeout=_EVENTS_SILENCE,
            )

        stream = EventStream(connect, after, follow=follow, patience=patience)
        with self._lock:
            self._streams.add(stream)
        return stream

    def audit(
        self,
        *,
        act: str | None = None,
        actor: str | None = None,
        team: str | None = None,
        agent: str | None = None,
        since: str | None = None,
        until: str | None = None,
        limit: int | None = None,
    ) -> list[AuditEntry]:
        """The newest entries of the audit log that match, oldest first; `since`, `until` in RFC 3339, UTC."""
        query = {
            "act": act,
            "actor": actor,
            "team": team,
            "agent": agent,
            "since": since,
            "until": until,
            "limit": limit,
        }
        return [AuditEntry.from_answer(item) for item in _items(self._call("GET", "/v1/audit", query=query))]

    def verify_audit(self) -> AuditState:
        """Have the daemon check its whole audit log."""
        answer = self._call("POST", "/v1/audit/verify", timeout=SPAWN_TIMEOUT)
        return AuditState.from_answer(_object(answer))

    def pool(self) -> list[PoolBox]:
        """The boxes of your teams that wait for an agent."""
        return [PoolBox.from_answer(item) for item in _items(self._call("GET", "/v1/pool"))]

    def images(self) -> list[Image]:
        """The pinned images, and whether the engine has each."""
        return [Image.from_answer(item) for item in _items(self._call("GET", "/v1/images"))]

    def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Answer:
        return request(
            self.location,
            method,
            path,
            query=query,
            body=body,
            headers=headers,
            timeout=timeout or self.timeout,
        )


def _quoted(segment: str) -> str:
    """One piece of a path; nothing in it can make it two, or climb."""
    if segment in ("", ".", ".."):
        raise AnswerInvalid(f"{segment!r} names nothing.")
    return quote(segment, safe="")


def _object(answer: Answer) -> dict[str, Any]:
    if not isinstance(answer.body, dict):
        raise AnswerInvalid("The daemon's answer is not an object: is something else listening there?")
    return answer.body


def _items(answer: Answer) -> list[dict[str, Any]]:
    items = _object(answer).get("items")
    if not isinstance(items, list):
        raise AnswerInvalid("The daemon's answer holds no items: is something else listening there?")
    return [item for item in items if isinstance(item, dict)]


def _next_page(answer: Answer) -> str | None:
    """What to ask for the page after this one with, None if it is the last."""
    place = _object(answer).get("next")
    if place is not None and not isinstance(place, str):
        raise AnswerInvalid("The daemon's answer names no next page that could be asked for.")
    return place
