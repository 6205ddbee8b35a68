"""Every route, in one table: the whole attack surface at a glance. A row without an access rule does not exist."""

from __future__ import annotations

from isolator.api import agents, answers, openapi, system, teams
from isolator.api.access import Admin, AgentOwner, AnyPeer, TeamOwner
from isolator.api.route import Route
from isolator.model.request import EnsureRequest, SpawnRequest, TeamRequest

ANY, TEAM, AGENT, ADMIN = AnyPeer(), TeamOwner(), AgentOwner(), Admin()

ROUTES: tuple[Route, ...] = (
    Route("GET", "/healthz", system.health, ANY, "Is the daemon alive", {200: answers.Health}),
    Route("GET", "/readyz", system.ready, ANY, "Can it spawn now", {200: answers.Health, 503: answers.Health}),
    Route("GET", "/metrics", system.metrics, ANY, "Figures for Prometheus", {200: "text/plain"}),
    Route("GET", "/v1/openapi.json", openapi.document, ANY, "This document", {200: "application/json"}),
    Route(
        "GET",
        "/v1/info",
        system.info,
        ANY,
        "Version, guarantees, what is degraded",
        {200: answers.InfoAnswer},
    ),
    Route("GET", "/v1/images", system.list_images, ANY, "Pinned images", {200: answers.ItemList}),
    Route("POST", "/v1/teams", teams.create, ANY, "Create a team", {201: answers.TeamAnswer}, body=TeamRequest),
    Route("GET", "/v1/teams", teams.list_teams, ANY, "List teams", {200: answers.TeamList}),
    Route("GET", "/v1/teams/{team}", teams.inspect, TEAM, "Inspect a team", {200: answers.TeamAnswer}),
    Route(
        "DELETE",
        "/v1/teams/{team}",
        teams.delete,
        TEAM,
        "Delete a team with its agents",
        {200: answers.TeamDeleted},
    ),
    Route(
        "PUT",
        "/v1/teams/{team}/agents/{name}",
        agents.ensure,
        ANY,  # the team may not exist yet; a foreign one is refused where it is looked up
        "Ensure an agent",
        {200: answers.AgentAnswer, 201: answers.AgentAnswer},
        body=EnsureRequest,
    ),
    Route(
        "POST",
        "/v1/agents",
        agents.spawn,
        ANY,  # as above
        "Spawn an agent",
        {201: answers.AgentAnswer},
        body=SpawnRequest,
        headers={"Idempotency-Key": "A retry with the same key returns the first answer."},
    ),
    Route(
        "GET",
        "/v1/agents",
        agents.list_agents,
        ANY,
        "List agents",
        {200: answers.AgentList},
        query={
            "team": "Only this team's.",
            "state": "Only these states, comma-separated.",
            "session": "Only this session's.",
            "all": "Removed ones too.",
            "limit": "At most so many (1 to 1000); fewer where they are large.",
            "after": "`next` of the page before.",
        },
    ),
    Route(
        "GET",
        "/v1/agents/{agent}",
        agents.inspect,
        AGENT,
        "Inspect an agent",
        {200: answers.AgentAnswer},
        query={"wait": "Answer when it has ended, at most after this many seconds (0 to 60)."},
    ),
    Route(
        "DELETE",
        "/v1/agents/{agent}",
        agents.stop,
        AGENT,
        "Stop and remove an agent",
        {200: answers.AgentAnswer},
        query={"grace": "Seconds between SIGTERM and SIGKILL (0 to 600)."},
    ),
    Route(
        "GET",
        "/v1/agents/{agent}/logs",
        agents.logs,
        AGENT,
        "Output of an agent",
        {200: "text/plain"},
        query={
            "follow": "Go on until it ends.",
            "tail": "Only the last lines, counted over both streams.",
            "stream": "stdout or stderr; both if absent.",
            "format": "raw, or frames (u8 stream, 3 zero bytes, u32 length, payload).",
        },
    ),
    Route(
        "GET",
        "/v1/events",
        system.events,
        ANY,
        "Events, server-sent",
        {200: "text/event-stream"},
        query={
            "follow": "false: end after what there is.",
            "after": "As Last-Event-ID.",
            "team": "Only this team's.",
            "agent": "Only this agent's.",
        },
        headers={"Last-Event-ID": "Resume after this event."},
    ),
    Route(
        "GET",
        "/v1/audit",
        system.audit_search,
        ANY,
        "Search the audit log",
        {200: answers.ItemList},
        query={
            "act": "An act or its first part: agent, agent.spawn.",
            "actor": "Who, as uid:1000.",
            "team": "Which team.",
            "agent": "Which agent.",
            "since": "RFC 3339, UTC.",
            "until": "RFC 3339, UTC.",
            "limit": "The newest so many (1 to 10000).",
        },
    ),
    Route(
        "POST",
        "/v1/audit/verify",
        system.audit_verify,
        ADMIN,
        "Verify the audit log",
        {200: answers.Verified},
    ),
)
