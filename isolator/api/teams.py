"""Routes of teams: create, list, inspect, delete."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from isolator.api.access import caller_of
from isolator.api.parts import PARTS, Parts
from isolator.api.wire import json_answer, read_model
from isolator.model.agent import timestamp
from isolator.model.identity import Principal
from isolator.model.request import TeamRequest
from isolator.model.team import Team, network_name


def team_answer(parts: Parts, team: Team) -> dict[str, Any]:
    """A team in JSON."""
    agents = sum(1 for live in parts.lifecycle.live() if live.record.spec.team == team.id)
    return {
        "id": team.id,
        "owner": team.owner,
        "network": network_name(team.id),
        "network_id": team.network_id,
        "subnet": team.subnet,
        "created_at": timestamp(team.created_at),
        "agents": agents,
    }


async def create(request: web.Request) -> web.StreamResponse:
    """POST /v1/teams."""
    parts, caller = request.app[PARTS], caller_of(request)
    body = await read_model(request, TeamRequest, parts.settings.request_timeout)
    team = await asyncio.shield(asyncio.create_task(parts.teams.create(body.id, caller)))
    return json_answer(team_answer(parts, team), 201, {"Location": f"/v1/teams/{team.id}"})


async def list_teams(request: web.Request) -> web.StreamResponse:
    """GET /v1/teams."""
    parts = request.app[PARTS]
    items = [team_answer(parts, team) for team in parts.teams.visible(caller_of(request))]
    return json_answer({"items": items, "next": None})


async def inspect(request: web.Request) -> web.StreamResponse:
    """GET /v1/teams/{team}."""
    parts = request.app[PARTS]
    return json_answer(team_answer(parts, parts.teams.get(request.match_info["team"], caller_of(request))))


async def delete(request: web.Request) -> web.StreamResponse:
    """DELETE /v1/teams/{team}: its agents, its network, itself."""
    parts, caller = request.app[PARTS], caller_of(request)
    team = parts.teams.get(request.match_info["team"], caller)
    removed = await asyncio.shield(asyncio.create_task(_delete(parts, team, caller)))
    return json_answer({"id": team.id, "removed_agents": removed})


async def _delete(parts: Parts, team: Team, caller: Principal) -> list[str]:
    removed: list[str] = []

    async def stop_members() -> None:
        members = [live for live in parts.lifecycle.live() if live.record.spec.team == team.id]
        grace = parts.settings.stop_grace
        await asyncio.gather(*(parts.lifecycle.stop(live, caller, grace) for live in members))
        removed.extend(live.record.id for live in members)

    await parts.teams.delete(team, caller, empty=stop_members)
    return removed
