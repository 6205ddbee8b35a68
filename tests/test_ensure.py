"""Asking twice gives one agent: ensure by name, and Idempotency-Key for a spawn whose answer was lost."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import pytest
from conftest import Answer, RunningDaemon, wait_for
from engine_helpers import containers_of, knock, settled, shown, spawn_bytes

pytestmark = pytest.mark.engine

BODY: dict[str, Any] = {"command": ["sleep", "600"], "network": "none"}


def ensure(daemon: RunningDaemon, team: str, name: str, **changes: Any) -> Answer:
    return daemon.request("PUT", f"/v1/teams/{team}/agents/{name}", {**BODY, **changes})


def keyed(daemon: RunningDaemon, key: str, **changes: Any) -> Answer:
    return daemon.post("/v1/agents", {"team": "en-keys", **BODY, **changes}, headers={"Idempotency-Key": key})


def team_boxes(engine: Any, daemon: RunningDaemon, team: str) -> int:
    boxes = containers_of(engine, daemon.instance).values()
    return sum(1 for box in boxes if box.labels["openclaw.team"] == team)


def test_an_absent_one_is_made_and_the_same_request_finds_it_again(daemon: RunningDaemon, engine) -> None:
    first = ensure(daemon, "en-same", "worker", env={"A": "1"})
    second = ensure(daemon, "en-same", "worker", env={"A": "1"})
    assert (first.status, second.status) == (201, 200)
    assert first.json["id"] == second.json["id"]
    assert first.json["name"] == "worker"
    assert second.json["state"] == "running"
    assert team_boxes(engine, daemon, "en-same") == 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"command": ["sleep", "601"]}, "command"),
        ({"env": {"A": "2"}}, "environment"),
        ({"limits": {"memory": "100m"}}, "limits"),
        ({"network": "team"}, "network"),
        ({"image": "isolator/agent-node"}, "image"),
        ({"ttl": 500}, "ttl"),
        ({"secrets": [{"name": "s", "value": "v"}]}, "secrets"),
    ],
)
def test_another_spec_under_the_name_is_refused_with_the_fields_named(
    daemon: RunningDaemon, changes: dict[str, Any], field: str
) -> None:
    agent = ensure(daemon, "en-other", "worker").json
    answer = ensure(daemon, "en-other", "worker", **changes)
    assert (answer.status, answer.json["code"]) == (409, "spec_differs")
    assert field in answer.json["fields"]
    assert answer.json["agent"] == agent["id"]
    assert shown(daemon, agent)["state"] == "running", "a refusal touches nothing"
    assert ensure(daemon, "en-other", "worker").status == 200


def test_after_it_has_ended_another_one_is_made(daemon: RunningDaemon) -> None:
    first = ensure(daemon, "en-again", "brief", command=["true"]).json
    daemon.wait(first)
    second = ensure(daemon, "en-again", "brief", command=["true"])
    assert second.status == 201
    assert second.json["id"] != first["id"]


def test_a_name_is_one_agent_in_its_team_and_another_in_another(daemon: RunningDaemon) -> None:
    here, there = ensure(daemon, "en-here", "worker"), ensure(daemon, "en-there", "worker")
    assert (here.status, there.status) == (201, 201)
    assert here.json["id"] != there.json["id"]
    taken = daemon.post("/v1/agents", {"team": "en-here", "name": "worker", **BODY})
    assert (taken.status, taken.json["code"]) == (409, "name_taken")


def test_ten_at_once_make_one_agent(daemon: RunningDaemon, engine) -> None:
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: ensure(daemon, "en-ten", "worker"), range(10)))
    assert sorted(answer.status for answer in answers) == [200] * 9 + [201]
    assert len({answer.json["id"] for answer in answers}) == 1
    assert {answer.json["state"] for answer in answers} == {"running"}
    assert team_boxes(engine, daemon, "en-ten") == 1


def test_ensure_waits_for_a_spawn_of_the_same_name(daemon: RunningDaemon, engine) -> None:
    """Neither `creating` as an answer, nor a name that is taken by what fails a moment later."""
    connection = knock(daemon)
    connection.sendall(spawn_bytes({"team": "en-join", "name": "worker", **BODY}))
    wait_for(lambda: daemon.get("/v1/agents?team=en-join&state=creating").json["items"], 10)
    joined = ensure(daemon, "en-join", "worker")
    assert connection.recv(65536).startswith(b"HTTP/1.1 201")
    connection.close()
    assert (joined.status, joined.json["state"]) == (200, "running")
    failing = knock(daemon)
    failing.sendall(spawn_bytes({"team": "en-join", "name": "other", **BODY, "command": ["no-such-program"]}))
    wait_for(lambda: daemon.get("/v1/agents?team=en-join&state=creating").json["items"], 10)
    assert ensure(daemon, "en-join", "other").status == 201
    failing.close()
    assert team_boxes(engine, daemon, "en-join") == 2


def test_ensure_is_not_given_an_agent_that_is_being_taken_back(daemon: RunningDaemon, engine) -> None:
    for _ in range(3):
        connection = knock(daemon)
        connection.sendall(spawn_bytes({"team": "en-doomed", "name": "worker", **BODY}))
        doomed = wait_for(lambda: daemon.get("/v1/agents?team=en-doomed&state=creating").json["items"], 10)[0]
        connection.close()
        agent = ensure(daemon, "en-doomed", "worker")
        assert agent.status == 201
        assert agent.json["id"] != doomed["id"]
        assert shown(daemon, agent.json)["state"] == "running"
        assert team_boxes(engine, daemon, "en-doomed") == 1
        daemon.delete(f"/v1/agents/{agent.json['id']}?grace=0")


def test_a_retry_under_a_key_gives_the_first_answer(daemon: RunningDaemon, engine) -> None:
    first, second = keyed(daemon, "retry", env={"A": "1"}), keyed(daemon, "retry", env={"A": "1"})
    assert (first.status, second.status) == (201, 201)
    assert first.json["id"] == second.json["id"]
    other = keyed(daemon, "another", env={"A": "1"})
    assert other.json["id"] != first.json["id"]
    assert team_boxes(engine, daemon, "en-keys") == 2


def test_a_key_is_for_one_request(daemon: RunningDaemon) -> None:
    agent = keyed(daemon, "one-request").json
    answer = keyed(daemon, "one-request", env={"B": "2"})
    assert (answer.status, answer.json["code"]) == (409, "idempotency_key_reused")
    assert shown(daemon, agent)["state"] == "running"


def test_a_key_belongs_to_its_caller(daemon: RunningDaemon, as_user) -> None:
    daemon.socket.chmod(0o666)
    root = keyed(daemon, "shared").json
    with as_user(2000):
        other = daemon.post("/v1/agents", {"team": "en-theirs", **BODY}, headers={"Idempotency-Key": "shared"})
    assert other.status == 201
    assert other.json["id"] != root["id"]


@pytest.mark.parametrize("key", ["", "x" * 256, "tab\there"])
def test_a_key_that_is_none_is_refused(daemon: RunningDaemon, key: str) -> None:
    answer = keyed(daemon, key)
    assert (answer.status, answer.json["code"]) == (400, "idempotency_key_invalid")


def test_a_refused_spawn_uses_up_no_key(daemon: RunningDaemon) -> None:
    assert keyed(daemon, "free-again", command=["no-such-program"]).json["code"] == "command_not_found"
    assert keyed(daemon, "free-again").status == 201


def test_many_at_once_under_one_key_make_one_agent(daemon: RunningDaemon, engine) -> None:
    before = team_boxes(engine, daemon, "en-keys")
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: keyed(daemon, "at-once"), range(10)))
    assert {answer.status for answer in answers} == {201}
    assert len({answer.json["id"] for answer in answers}) == 1
    assert team_boxes(engine, daemon, "en-keys") == before + 1


def test_a_retry_after_hanging_up_begins_anew(daemon: RunningDaemon, engine) -> None:
    for number in range(3):
        connection = knock(daemon)
        key = f"hung-up-{number}"
        connection.sendall(spawn_bytes({"team": "en-hung", **BODY}, f"Idempotency-Key: {key}"))
        doomed = wait_for(lambda: daemon.get("/v1/agents?team=en-hung&state=creating").json["items"], 10)[0]
        connection.close()
        retried = daemon.post("/v1/agents", {"team": "en-hung", **BODY}, headers={"Idempotency-Key": key})
        assert retried.status == 201
        assert retried.json["id"] != doomed["id"]
        assert shown(daemon, retried.json)["state"] == "running"
        assert team_boxes(engine, daemon, "en-hung") == number + 1


def test_both_hold_after_the_daemon_was_killed(own_daemon: RunningDaemon, engine) -> None:
    ensured = ensure(own_daemon, "en-crash", "worker").json
    spawned = own_daemon.post("/v1/agents", {"team": "en-crash", **BODY}, headers={"Idempotency-Key": "k"}).json
    own_daemon.kill()
    own_daemon.start(proven=False)
    again = ensure(own_daemon, "en-crash", "worker")
    assert (again.status, again.json["id"]) == (200, ensured["id"])
    retried = own_daemon.post("/v1/agents", {"team": "en-crash", **BODY}, headers={"Idempotency-Key": "k"})
    assert retried.json["id"] == spawned["id"]
    settled(own_daemon)
    assert team_boxes(engine, own_daemon, "en-crash") == 2
