"""Routes about the daemon itself: info, health, metrics, events, audit, images."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

from aiohttp import web

from isolator import __version__
from isolator.api.access import caller_of
from isolator.api.metrics import CONTENT_TYPE
from isolator.api.parts import PARTS, Parts
from isolator.api.wire import json_answer, query_flag, query_number, query_text
from isolator.audit.reading import Query, find, moment_text, verify
from isolator.model.agent import timestamp
from isolator.model.errors import BadRequest, TooMany
from isolator.model.identity import Principal

MOST_ENTRIES = 10_000
_MOST_ANSWER = 4 << 20
_MOST_EVENT = 2**53
_MOST_DIGITS = 20


async def info(request: web.Request) -> web.StreamResponse:
    """GET /v1/info."""
    parts, caller = request.app[PARTS], caller_of(request)
    settings = parts.settings
    visible = parts.teams.visible(caller)
    mine = {team.id for team in visible}
    agents = sum(1 for live in parts.lifecycle.live() if live.record.spec.team in mine)
    engine = await parts.engine_facts()
    images = await parts.images.overview() if parts.engine_up() else []
    return json_answer(
        {
            "version": __version__,
            "instance": settings.instance,
            "backend": parts.backend.name,
            "uptime": round(time.time() - parts.started_at, 3),
            "engine": {"up": parts.engine_up(), **engine},
            "guarantees": {name: {"held": item.held, "how": item.how} for name, item in parts.guarantees().items()},
            "degraded": parts.degraded(),
            "network": parts.proof.result.answer(),
            "images": images,
            "caller": {"uid": caller.uid, "owner": caller.owner, "admin": caller.is_admin},
            "limits": _limits(parts),
            "workspace_roots": [str(root) for root in settings.workspace_roots],
            "counts": {"agents": agents, "teams": len(visible)},
        }
    )


def _limits(parts: Parts) -> dict[str, Any]:
    settings = parts.settings
    return {
        "defaults": {
            "cpus": settings.default_cpus,
            "memory": settings.default_memory,
            "pids": settings.default_pids,
            "disk": settings.default_disk,
            "nofile": settings.default_nofile,
        },
        "most": {
            "cpus": settings.max_cpus,
            "memory": settings.max_memory,
            "pids": settings.max_pids,
            "disk": settings.max_disk,
            "nofile": settings.max_nofile,
            "agents": settings.max_agents,
            "concurrent_spawns": settings.max_concurrent_spawns,
        },
    }


async def health(request: web.Request) -> web.StreamResponse:
    """GET /healthz: the loop turns."""
    del request
    return json_answer({"status": "ok"})


async def ready(request: web.Request) -> web.StreamResponse:
    """GET /readyz: spawns can be served now."""
    parts = request.app[PARTS]
    up = parts.engine_up()
    body = {"ready": up, "engine": "up" if up else "down", "network": parts.proof.result.status}
    return json_answer(body, 200 if up else 503)


async def metrics(request: web.Request) -> web.StreamResponse:
    """GET /metrics."""
    parts = request.app[PARTS]
    counts: dict[str, int] = dict.fromkeys(("creating", "running", "exited", "stopping", "lost"), 0)
    for live in parts.lifecycle.live():
        counts[live.record.state] = counts.get(live.record.state, 0) + 1
    for state, count in counts.items():
        parts.metrics.agents.labels(state).set(count)
    parts.metrics.teams.set(len(parts.teams.all()))
    parts.metrics.pool_boxes.set(len(parts.pool.overview()))
    parts.metrics.count_claims(parts.pool.claims)
    parts.metrics.engine_up.set(int(parts.engine_up()))
    return web.Response(body=parts.metrics.render(), headers={"Content-Type": CONTENT_TYPE})


async def list_images(request: web.Request) -> web.StreamResponse:
    """GET /v1/images."""
    return json_answer({"items": await request.app[PARTS].images.overview(), "next": None})


async def list_pool(request: web.Request) -> web.StreamResponse:
    """GET /v1/pool: boxes that wait for an agent, of the caller's teams."""
    parts = request.app[PARTS]
    mine = {team.id for team in parts.teams.visible(caller_of(request))}
    items = [
        {
            "id": ready.spec.agent,
            "team": profile.team,
            "profile": profile.key,
            "image": profile.image,
            "image_digest": profile.image_digest,
            "created_at": timestamp(ready.made_at),
            "container_id": ready.box.box_id,
        }
        for profile, ready in parts.pool.overview()
        if profile.team in mine
    ]
    return json_answer({"items": items, "next": None})


async def events(request: web.Request) -> web.StreamResponse:
    """GET /v1/events: server-sent, resumable by Last-Event-ID."""
    parts, caller = request.app[PARTS], caller_of(request)
    follow = query_flag(request, "follow", default=True)
    team, agent = query_text(request, "team"), query_text(request, "agent")
    after = await _resume_point(request, parts)
    if parts.followers.locked():
        raise TooMany("followers_exhausted", "Too many streams are open; close some.", retry_after=5)
    async with parts.followers:
        headers = {
            "Content-Type": "text/event-stream",
            "Cache-Control": "no-store",
            # Where this stream begins, so that a client whose connection breaks before its first event loses none.
            "Last-Event-ID": str(after),
        }
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        stopping = asyncio.create_task(parts.stopping.wait())
        writing = asyncio.create_task(_write_events(parts, response, caller, after, follow, team, agent))
        try:
            await asyncio.wait({stopping, writing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            writing.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await writing
        return response


async def _write_events(
    parts: Parts,
    response: web.StreamResponse,
    caller: Principal,
    after: int,
    follow: bool,
    team: str | None,
    agent: str | None,
) -> None:
    async with contextlib.aclosing(parts.events.after(after, follow=follow)) as stream:  # type: ignore[type-var]
        async for event in stream:
            if event is None:
                await response.write(b": keep-alive\n\n")
                continue
            mine = caller.is_admin or (event.owner is not None and event.owner == caller.owner)
            if not mine or team not in (None, event.team) or agent not in (None, event.agent):
                continue
            text = f"id: {event.id}\nevent: {event.type}\ndata: {json.dumps(event.answer())}\n\n"
            await response.write(text.encode())
    await response.write_eof()


async def _resume_point(request: web.Request, parts: Parts) -> int:
    text = request.headers.get("Last-Event-ID") or query_text(request, "after")
    if text is None:
        return await parts.events.last() if query_flag(request, "follow", default=True) else 0
    if not text.isascii() or not text.isdigit() or len(text) > _MOST_DIGITS or int(text) > _MOST_EVENT:
        raise BadRequest("invalid_query", "Last-Event-ID must be the id of an event.")
    return int(text)


async def audit_search(request: web.Request) -> web.StreamResponse:
    """GET /v1/audit: admins see all, others what they did."""
    parts, caller = request.app[PARTS], caller_of(request)
    limit = query_number(request, "limit", 1, MOST_ENTRIES)
    actor = query_text(request, "actor")
    if not caller.is_admin:
        actor = caller.owner
    query = Query(
        act=query_text(request, "act"),
        actor=actor,
        team=query_text(request, "team"),
        agent=query_text(request, "agent"),
        since=_moment(request, "since"),
        until=_moment(request, "until"),
        limit=100 if limit is None else int(limit),
    )
    body = await parts.searches.run(lambda stop: _found(parts.audit.path, query, stop))
    return web.Response(body=body, content_type="application/json")


def _found(path: Path, query: Query, stop: threading.Event) -> bytes:
    """The answer, written out on the reader's thread: some megabytes would hold up the loop."""
    found = find(path, query, most_bytes=_MOST_ANSWER, stop=stop)
    answer: dict[str, Any] = {"items": found.items, "next": None}
    if found.truncated:
        answer["truncated"] = True
    return json.dumps(answer, separators=(",", ":")).encode()


def _moment(request: web.Request, name: str) -> str | None:
    """A query parameter that names a moment, as the log writes moments."""
    text = query_text(request, name)
    if text is None:
        return None
    try:
        return moment_text(text)
    except (ValueError, OverflowError):
        raise BadRequest(
            "invalid_query", f"?{name}= must be a moment such as 2030-01-31T12:00:00Z (RFC 3339)."
        ) from None


async def audit_verify(request: web.Request) -> web.StreamResponse:
    """POST /v1/audit/verify."""
    parts = request.app[PARTS]
    path, head = parts.audit.path, parts.audit.head
    found = await parts.verifications.run(
        lambda stop: verify(path, expected_entries=head.sequence, size=head.size, stop=stop)
    )
    return json_answer(found.answer())
