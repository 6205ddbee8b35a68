"""Routes of what agents use: of one, and of all the caller may see."""

from __future__ import annotations

import asyncio
import json

from aiohttp import web

from isolator.agents.stats import describe
from isolator.api.access import caller_of
from isolator.api.parts import PARTS
from isolator.api.wire import json_answer, query_text
from isolator.execs.service import refuse_not_running
from isolator.model.errors import Conflict

MOST_AGENTS = 1000
_PIECE = 64


async def of_one(request: web.Request) -> web.StreamResponse:
    """GET /v1/agents/{agent}/stats."""
    parts = request.app[PARTS]
    live = refuse_not_running(parts.lifecycle.find(request.match_info["agent"]))
    if not await parts.stats.refresh([live]):
        raise Conflict("agent_not_running", f"The box of agent {live.id} is not running any more.", state="exited")
    return json_answer(describe(live))


async def of_all(request: web.Request) -> web.StreamResponse:
    """GET /v1/stats: the running ones, the oldest first."""
    parts, caller = request.app[PARTS], caller_of(request)
    team = query_text(request, "team")
    wanted = [
        live
        for live in parts.lifecycle.live()
        if live.running and (caller.is_admin or live.owner == caller.owner) and team in (None, live.team)
    ]
    figures = [describe(live) for live in await parts.stats.refresh(wanted[:MOST_AGENTS])]
    items = []
    for start in range(0, len(figures), _PIECE):
        items += [json.dumps(each, separators=(",", ":")) for each in figures[start : start + _PIECE]]
        await asyncio.sleep(0)  # others have their turn between the pieces
    truncated = json.dumps(len(wanted) > MOST_AGENTS)
    body = f'{{"items":[{",".join(items)}],"next":null,"truncated":{truncated}}}'
    return web.Response(body=body.encode(), content_type="application/json")
