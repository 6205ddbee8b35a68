"""Who sees what: the kernel names the caller, and what is not theirs does not exist for them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import docker
import pytest
from api_helpers import AsUser, assert_problem, open_to_everybody, traces
from conftest import Answer, RunningDaemon, running_daemon

from isolator.api.access import Admin, AgentOwner, AnyPeer, TeamOwner
from isolator.api.route import Route
from isolator.api.routes import ROUTES

pytestmark = pytest.mark.engine

OWNER, STRANGER, ROOT = 1000, 2000, 0
ABSENT_AGENT = "z" * 16


class Scene(NamedTuple):
    """A daemon whose team "hers" with one agent belongs to uid 1000, and "his" with another to uid 2000."""

    daemon: RunningDaemon
    hers: dict[str, Any]
    his: dict[str, Any]


@pytest.fixture(scope="module")
def module_user() -> AsUser:
    """The fixture as_user, for a module."""
    import conftest

    switch: AsUser = conftest.as_user.__wrapped__()  # type: ignore[attr-defined]
    return switch


@pytest.fixture(scope="module")
def scene(engine: docker.DockerClient, image_pins: dict[str, str], module_user: AsUser) -> Iterator[Scene]:
    with running_daemon(engine, image_pins) as daemon:
        open_to_everybody(daemon)
        agents = {}
        for team, uid in (("hers", OWNER), ("his", STRANGER)):
            with module_user(uid):
                agents[team] = daemon.spawn("sleep", "600", team=team, name="worker", session=f"session-{team}")
        yield Scene(daemon, agents["hers"], agents["his"])


def _fill(route: Route, team: str, agent: str) -> str:
    return route.path.replace("{team}", team).replace("{agent}", agent).replace("{name}", "worker")


def _ask(daemon: RunningDaemon, route: Route, team: str, agent: str) -> Answer:
    body: dict[str, Any] | None = None
    if route.path == "/v1/agents" and route.method == "POST":
        body = {"team": team, "command": ["true"], "create_team": False}
    elif route.body is not None:
        body = {"create_team": False} if "{team}" in route.path else {"id": team}
    return daemon.request(route.method, _fill(route, team, agent), body)


OWNED = [route for route in ROUTES if "{team}" in route.path or "{agent}" in route.path]
SPAWN = next(route for route in ROUTES if (route.method, route.path) == ("POST", "/v1/agents"))


def test_every_route_with_an_owner_is_tried() -> None:
    """The rows below are the table's own; a new noun in a path needs a rule and a test of its own."""
    assert len(OWNED) >= 6
    for route in ROUTES:
        for word in ("{team}", "{agent}"):
            if word in route.path and route.path != "/v1/teams/{team}/agents/{name}":
                expected = TeamOwner if word == "{team}" else AgentOwner
                assert isinstance(route.access, expected), route
        assert isinstance(route.access, AnyPeer | TeamOwner | AgentOwner | Admin)
        assert route.access.summary
    assert {route.path for route in ROUTES if isinstance(route.access, Admin)} == {"/v1/audit/verify"}


@pytest.mark.parametrize("route", [*OWNED, SPAWN], ids=lambda route: f"{route.method} {route.path}")
def test_what_is_foreign_is_told_as_if_it_were_absent(scene: Scene, as_user: AsUser, route: Route) -> None:
    daemon, agent = scene.daemon, scene.hers["id"]
    with as_user(STRANGER):
        foreign = _ask(daemon, route, "hers", agent)
        absent = _ask(daemon, route, "gone", ABSENT_AGENT)
    assert (foreign.status, absent.status) == (404, 404)
    assert foreign.content.replace(b"hers", b"gone").replace(agent.encode(), ABSENT_AGENT.encode()) == absent.content
    names = {"date", "content-length"}
    assert {k: v for k, v in foreign.headers.items() if k not in names} == {
        k: v for k, v in absent.headers.items() if k not in names
    }
    with as_user(OWNER):
        assert daemon.get(f"/v1/agents/{agent}").json["state"] == "running"
        assert daemon.get("/v1/teams/hers").status == 200


def test_a_refusal_comes_before_the_body_and_the_parameters_are_read(scene: Scene, as_user: AsUser) -> None:
    with as_user(STRANGER):
        for path in (f"/v1/agents/{scene.hers['id']}?nonsense=1", f"/v1/agents/{scene.hers['id']}/logs?tail=x"):
            assert_problem(scene.daemon.get(path), 404, "agent_not_found")


def test_each_sees_their_own_in_lists_and_the_admin_all(scene: Scene, as_user: AsUser) -> None:
    seen = {}
    for uid in (OWNER, STRANGER, ROOT, 3000):
        with as_user(uid):
            agents = scene.daemon.get("/v1/agents?all=1").json["items"]
            teams = scene.daemon.get("/v1/teams").json["items"]
            info = scene.daemon.get("/v1/info").json
        seen[uid] = sorted({item["team"] for item in agents} | {item["id"] for item in teams})
        assert info["caller"] == {"uid": uid, "owner": f"uid:{uid}", "admin": uid == 0}
        assert info["counts"] == {"agents": len(agents), "teams": len(teams)}
    assert seen == {OWNER: ["hers"], STRANGER: ["his"], ROOT: ["hers", "his"], 3000: []}


def test_a_filter_finds_nothing_foreign(scene: Scene, as_user: AsUser) -> None:
    for uid, count in ((OWNER, 1), (STRANGER, 0), (ROOT, 1)):
        with as_user(uid):
            assert len(scene.daemon.get("/v1/agents?team=hers").json["items"]) == count
            assert len(scene.daemon.get("/v1/agents?session=session-hers").json["items"]) == count


def test_events_are_told_to_their_owner_only(scene: Scene, as_user: AsUser) -> None:
    told = {}
    for uid in (OWNER, STRANGER, ROOT, 3000):
        with as_user(uid):
            text = scene.daemon.get("/v1/events?follow=false").content.decode()
        told[uid] = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert {event["team"] for event in told[OWNER]} == {"hers"}
    assert {event["team"] for event in told[STRANGER]} == {"his"}
    assert {event["team"] for event in told[ROOT]} == {"hers", "his", None}
    assert told[3000] == []
    with as_user(STRANGER):
        assert b"data" not in scene.daemon.get("/v1/events?follow=false&team=hers").content
        assert b"data" not in scene.daemon.get(f"/v1/events?follow=false&agent={scene.hers['id']}").content


def test_the_audit_log_is_searched_by_an_admin_and_by_others_for_what_they_did(scene: Scene, as_user: AsUser) -> None:
    for uid in (OWNER, STRANGER):
        with as_user(uid):
            for query in ("", f"?actor=uid:{ROOT}", f"?actor=uid:{OWNER}", "?team=hers", f"?agent={scene.hers['id']}"):
                items = scene.daemon.get(f"/v1/audit{query}").json["items"]
                assert {item["actor"] for item in items} <= {f"uid:{uid}"}
            assert scene.daemon.get("/v1/audit?act=team.create").json["items"]
    actors = {item["actor"] for item in scene.daemon.get("/v1/audit?limit=10000").json["items"]}
    assert actors >= {f"uid:{OWNER}", f"uid:{STRANGER}", "isolator"}


def test_only_an_admin_verifies_the_audit_log(scene: Scene, as_user: AsUser) -> None:
    with as_user(OWNER):
        assert_problem(scene.daemon.post("/v1/audit/verify"), 403, "admin_only")
    assert scene.daemon.post("/v1/audit/verify").json["ok"] is True
    refused = scene.daemon.get("/v1/audit?act=request.refused").json["items"]
    assert refused[-1]["actor"] == f"uid:{OWNER}"
    assert refused[-1]["detail"] == {"code": "admin_only", "route": "POST /v1/audit/verify"}


def test_nobody_gets_into_a_foreign_team(scene: Scene, engine: docker.DockerClient, as_user: AsUser) -> None:
    before = traces(scene.daemon, engine)
    with as_user(STRANGER):
        for body in ({"team": "hers"}, {"team": "hers", "name": "worker"}, {"team": "hers", "create_team": True}):
            assert_problem(scene.daemon.post("/v1/agents", body), 404, "team_not_found")
        for name in ("worker", "other"):
            answer = scene.daemon.request("PUT", f"/v1/teams/hers/agents/{name}", {"command": ["true"]})
            assert_problem(answer, 404, "team_not_found")
        assert_problem(scene.daemon.post("/v1/teams", {"id": "hers"}), 409, "team_exists")
        parent = {"team": "his", "parent": scene.hers["id"], "command": ["true"]}
        assert_problem(scene.daemon.post("/v1/agents", parent), 404, "agent_not_found")
    # An admin sees both, and still can't make one team's agent the child of another's.
    assert_problem(scene.daemon.post("/v1/agents", parent), 404, "agent_not_found")
    assert traces(scene.daemon, engine) == before


def test_in_ones_own_team_all_of_it_works(scene: Scene, as_user: AsUser) -> None:
    with as_user(OWNER):
        child = scene.daemon.spawn("true", team="hers", parent=scene.hers["id"])
        assert (child["owner"], child["parent"]) == (f"uid:{OWNER}", scene.hers["id"])
        same = scene.daemon.request(
            "PUT", "/v1/teams/hers/agents/worker", {"command": ["sleep", "600"], "session": "session-hers"}
        )
        assert (same.status, same.json["id"]) == (200, scene.hers["id"])
        assert scene.daemon.delete(f"/v1/agents/{child['id']}").status == 200


def test_what_an_admin_spawns_in_a_team_belongs_to_its_owner(scene: Scene, as_user: AsUser) -> None:
    agent = scene.daemon.spawn("sleep", "60", team="hers")
    assert agent["owner"] == f"uid:{OWNER}"
    with as_user(OWNER):
        assert scene.daemon.delete(f"/v1/agents/{agent['id']}").json["state"] == "removed"


def test_a_key_of_one_user_is_not_another_users(scene: Scene, as_user: AsUser) -> None:
    ids = []
    for uid, team in ((OWNER, "hers"), (STRANGER, "his")):
        with as_user(uid):
            answer = scene.daemon.post(
                "/v1/agents", {"team": team, "command": ["true"]}, headers={"Idempotency-Key": "one"}
            )
            ids.append(answer.json["id"])
            assert answer.json["owner"] == f"uid:{uid}"
    assert len(set(ids)) == 2


def test_nothing_a_request_says_changes_who_asks(scene: Scene, as_user: AsUser) -> None:
    headers = {
        "X-Forwarded-User": "root",
        "X-Remote-User": "root",
        "Authorization": "Basic cm9vdDo=",
        "Cookie": "uid=0",
    }
    with as_user(STRANGER):
        info = scene.daemon.get("/v1/info", headers=headers).json
        assert info["caller"] == {"uid": STRANGER, "owner": f"uid:{STRANGER}", "admin": False}
        answer = scene.daemon.get(f"/v1/agents/{scene.hers['id']}", headers=headers)
        assert_problem(answer, 404, "agent_not_found")
        assert_problem(scene.daemon.post("/v1/teams", {"id": "x", "owner": "uid:0"}), 400, "unknown_field")


def test_a_removed_agent_stays_its_owners(scene: Scene, as_user: AsUser) -> None:
    with as_user(OWNER):
        agent = scene.daemon.spawn("true", team="hers")
        scene.daemon.delete(f"/v1/agents/{agent['id']}")
        assert scene.daemon.get(f"/v1/agents/{agent['id']}").json["state"] == "removed"
    with as_user(STRANGER):
        assert_problem(scene.daemon.get(f"/v1/agents/{agent['id']}"), 404, "agent_not_found")
        assert_problem(scene.daemon.get(f"/v1/agents/{agent['id']}/logs"), 404, "agent_not_found")
