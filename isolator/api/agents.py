"""Routes of agents: spawn, ensure, list, inspect, stop, logs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time

from aiohttp import web

from isolator.api.access import caller_of
from isolator.api.parts import PARTS
from isolator.api.wire import json_answer, query_flag, query_number, query_text, read_model
from isolator.model.agent import Agent, State
from isolator.model.errors import BadRequest, IsolatorError, NotFound, TooMany
from isolator.model.request import EnsureRequest, SpawnRequest
from isolator.store.listing import HELD_STATES, PAGE_BYTES, Place, Wanted

STATES: tuple[State, ...] = (*HELD_STATES, "removed")
LONGEST_WAIT = 60.0
MOST_LISTED = 1000
_PIECE = 256 * 1024
MOST_LINES = 1_000_000
_STREAM_NUMBERS = {"stdout": 1, "stderr": 2}


async def spawn(request: web.Request) -> web.StreamResponse:
    """POST /v1/agents."""
    parts, caller = request.app[PARTS], caller_of(request)
    body = await read_model(request, SpawnRequest, parts.settings.request_timeout)
    began = time.monotonic()
    agent = await parts.spawner.spawn(body, caller, request.headers.get("Idempotency-Key"))
    parts.metrics.spawn_seconds.observe(time.monotonic() - began)
    return json_answer(agent.answer(), 201, {"Location": f"/v1/agents/{agent.id}"})


async def ensure(request: web.Request) -> web.StreamResponse:
    """PUT /v1/teams/{team}/agents/{name}."""
    parts, caller = request.app[PARTS], caller_of(request)
    body = await read_model(request, EnsureRequest, parts.settings.request_timeout)
    team, name = request.match_info["team"], request.match_info["name"]
    agent, is_new = await parts.spawner.ensure(team, name, body, caller)
    return json_answer(agent.answer(), 201 if is_new else 200)


async def list_agents(request: web.Request) -> web.StreamResponse:
    """GET /v1/agents, a page of it."""
    parts, caller = request.app[PARTS], caller_of(request)
    wanted = Wanted(
        states=_states(request),
        team=query_text(request, "team"),
        session=query_text(request, "session"),
        owner=None if caller.is_admin else caller.owner,
    )
    limit = query_number(request, "limit", 1, MOST_LISTED)
    left = MOST_LISTED if limit is None else int(limit)
    page = await parts.store.page(wanted, after=_place(request), limit=left, most_bytes=_PIECE)
    # Written piece by piece as it is taken: many callers who ask and do not read cost a piece each, not a page.
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    await response.write(b'{"items":[')
    size = 0
    while True:
        items = _items(request, page.agents)
        left -= len(page.agents)
        place = page.next
        if items:
            await response.write(b"," + items if size else items)
        size += len(items)
        if place is None or left <= 0 or size > PAGE_BYTES - _PIECE:
            break
        try:
            page = await parts.store.page(wanted, after=place, limit=left, most_bytes=_PIECE)
        except IsolatorError:  # a page may end anywhere; whoever asks for the next one is told the reason
            break
    await response.write_eof(f'],"next":{json.dumps(None if place is None else place.text())}}}'.encode())
    return response


def _items(request: web.Request, agents: list[Agent]) -> bytes:
    answers = (_current(request, agent).answer() for agent in agents)
    return ",".join(json.dumps(answer, separators=(",", ":")) for answer in answers).encode()


def _states(request: web.Request) -> tuple[State, ...]:
    text = query_text(request, "state")
    if text is None:
        return STATES if query_flag(request, "all") else HELD_STATES
    chosen = tuple(known for known in STATES if known in text.split(","))
    if len(chosen) != len(set(text.split(","))):
        raise BadRequest("invalid_query", f"?state= must be of {', '.join(STATES)}.")
    return chosen


def _place(request: web.Request) -> Place | None:
    text = query_text(request, "after")
    if text is None:
        return None
    try:
        return Place.from_text(text)
    except ValueError:
        raise BadRequest("invalid_query", "?after= must be `next` of an earlier page, unchanged.") from None


def _current(request: web.Request, agent: Agent) -> Agent:
    live = request.app[PARTS].lifecycle.find(agent.id)
    return agent if live is None else live.record


async def _record(request: web.Request) -> Agent:
    parts, agent_id = request.app[PARTS], request.match_info["agent"]
    live = parts.lifecycle.find(agent_id)
    record = live.record if live is not None else await parts.store.agent(agent_id)
    if record is None:
        raise NotFound("agent_not_found", "There is no such agent.")
    return record


async def inspect(request: web.Request) -> web.StreamResponse:
    """GET /v1/agents/{agent}, with ?wait= until it has ended."""
    parts = request.app[PARTS]
    wait = query_number(request, "wait", 0, LONGEST_WAIT)
    live = parts.lifecycle.find(request.match_info["agent"])
    if wait and live is not None and live.record.state in ("creating", "running", "stopping"):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(live.ended.wait(), wait)
    return json_answer((await _record(request)).answer())


async def stop(request: web.Request) -> web.StreamResponse:
    """DELETE /v1/agents/{agent}."""
    parts, caller = request.app[PARTS], caller_of(request)
    grace = query_number(request, "grace", 0, 600)
    live = parts.lifecycle.find(request.match_info["agent"])
    if live is None:
        return json_answer((await _record(request)).answer())
    # A caller who hangs up has still asked for it: the stop goes on.
    grace = parts.settings.stop_grace if grace is None else grace
    stopped = await asyncio.shield(asyncio.create_task(parts.lifecycle.stop(live, caller, grace)))
    # Not looked up again: records of removed agents are dropped by number, perhaps this one already.
    return json_answer(stopped.answer())


async def logs(request: web.Request) -> web.StreamResponse:
    """GET /v1/agents/{agent}/logs."""
    parts = request.app[PARTS]
    follow = query_flag(request, "follow")
    tail = query_number(request, "tail", 0, MOST_LINES)
    wanted = query_text(request, "stream")
    if wanted not in (None, "stdout", "stderr"):
        raise BadRequest("invalid_query", "?stream= must be stdout or stderr.")
    form = query_text(request, "format") or "raw"
    if form not in ("raw", "frames"):
        raise BadRequest("invalid_query", "?format= must be raw or frames.")
    record = await _record(request)
    if record.container_id is None or record.state == "removed":
        raise NotFound("logs_gone", "The agent's box is gone, and its output with it.")
    if parts.followers.locked():
        raise TooMany("followers_exhausted", "Too many streams are open; close some.", retry_after=5)
    async with parts.followers:
        content_type = "application/vnd.docker.multiplexed-stream" if form == "frames" else "text/plain"
        response = web.StreamResponse(headers={"Content-Type": content_type, "X-Content-Type-Options": "nosniff"})
        await response.prepare(request)
        chunks = parts.backend.logs(record.container_id, follow=follow, tail=None if tail is None else int(tail))
        async with contextlib.aclosing(chunks):  # type: ignore[type-var]
            async for chunk in chunks:
                if wanted is not None and chunk.stream != wanted:
                    continue
                if form == "frames":
                    header = bytes((_STREAM_NUMBERS[chunk.stream], 0, 0, 0)) + len(chunk.data).to_bytes(4, "big")
                    await response.write(header + chunk.data)
                else:
                    await response.write(chunk.data)
        await response.write_eof()
        return response
