"""The HTTP side of bad input: paths, methods, parameters, headers, half requests, unknown encodings."""

from __future__ import annotations

import gzip
import threading
import time

import docker
import pytest
from api_helpers import assert_problem, raw_connection, read_to_end, traces
from conftest import Answer, RunningDaemon

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/", "route_not_found"),
        ("/v1", "route_not_found"),
        ("/v1/", "route_not_found"),
        ("/v2/agents", "route_not_found"),
        ("/v1//agents", "route_not_found"),
        ("/v1/agents/", "route_not_found"),
        ("/V1/agents", "route_not_found"),
        ("/v1/agents/%2e%2e/healthz", "route_not_found"),
        ("/v1/teams/x/../../agents", "route_not_found"),
        ("/%2e%2e/%2e%2e/etc/passwd", "route_not_found"),
        ("/v1/agents/%00", "agent_not_found"),
        ("/v1/agents/..%2f..%2fetc%2fpasswd", "agent_not_found"),
        ("/v1/agents/%ff%fe", "agent_not_found"),
        ("/v1/agents/" + "a" * 16, "agent_not_found"),
        ("/v1/agents/" + "A" * 16, "agent_not_found"),
        ("/v1/agents/" + "a" * 16 + "%0a", "agent_not_found"),
        ("/v1/agents/" + "a" * 4000, "agent_not_found"),
        ("/v1/agents/%00/logs", "agent_not_found"),
        ("/v1/teams/%2e%2e", "team_not_found"),
        ("/v1/teams/%00", "team_not_found"),
        ("/v1/teams/%0a", "team_not_found"),
        ("/v1/teams/" + "a" * 4000, "team_not_found"),
        ("/v1/teams/..%2f..%2f..%2fetc", "team_not_found"),
    ],
)
def test_a_path_that_leads_nowhere(daemon: RunningDaemon, path: str, code: str) -> None:
    answer = daemon.get(path)
    assert_problem(answer, 404, code)
    assert len(answer.content) < 1000


@pytest.mark.parametrize(
    ("team", "name"),
    [("Fresh", "a"), ("%2e%2e", "a"), ("fresh", "%2e%2e"), ("fresh", "a%00"), ("fresh", "A"), ("fresh", "a" * 41)],
)
def test_ensure_checks_the_names_in_its_path(
    daemon: RunningDaemon, engine: docker.DockerClient, team: str, name: str
) -> None:
    before = traces(daemon, engine)
    assert_problem(daemon.request("PUT", f"/v1/teams/{team}/agents/{name}", {}), 400, "name_invalid")
    assert traces(daemon, engine) == before


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/agents", "GET, POST"),
        ("PATCH", "/v1/agents/aaaaaaaaaaaaaaaa", "DELETE, GET"),
        ("PUT", "/v1/teams", "GET, POST"),
        ("POST", "/v1/teams/x", "DELETE, GET"),
        ("GET", "/v1/audit/verify", "POST"),
        ("HEAD", "/healthz", "GET"),
        ("OPTIONS", "/v1/info", "GET"),
        ("TRACE", "/metrics", "GET"),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(daemon: RunningDaemon, method: str, path: str, allowed: str) -> None:
    answer = daemon.request(method, path)
    assert answer.status == 405
    assert answer.headers["allow"] == allowed
    if method != "HEAD":
        assert allowed.split(", ", maxsplit=1)[0] in assert_problem(answer, 405, "method_not_allowed")["detail"]


@pytest.mark.parametrize(
    "query",
    [
        "/v1/agents?state=alive",
        "/v1/agents?state=",
        "/v1/agents?team=a&team=b",
        "/v1/agents?all=maybe",
        "/v1/agents?limit=0",
        "/v1/agents?team=a%00b",
        "/v1/agents?team=" + "a" * 257,
        "/v1/info?verbose=1",
        "/healthz?x=1",
        "/v1/events?follow=perhaps",
        "/v1/events?follow=false&after=-1",
        "/v1/events?follow=false&after=1.5",
        "/v1/events?follow=false&after=99999999999999999999999",
        "/v1/events?follow=false&after=%D9%A1",
        "/v1/audit?limit=0",
        "/v1/audit?limit=10001",
        "/v1/audit?limit=nan",
        "/v1/audit?limit=many",
        "/v1/audit?since=yesterday",
        "/v1/audit?until=2026-13-45",
        "/v1/audit?since=99999999999",
    ],
)
def test_a_bad_parameter_is_named(daemon: RunningDaemon, query: str) -> None:
    assert_problem(daemon.get(query), 400, "invalid_query")


@pytest.mark.parametrize(
    ("method", "parameter"),
    [
        ("GET", "?wait=61"),
        ("GET", "?wait=-1"),
        ("GET", "?wait=nan"),
        ("GET", "?wait=soon"),
        ("GET", "?wait=1&wait=2"),
        ("GET", "/logs?stream=stdin"),
        ("GET", "/logs?format=xml"),
        ("GET", "/logs?tail=-1"),
        ("GET", "/logs?tail=all"),
        ("GET", "/logs?follow=no-thanks"),
        ("DELETE", "?grace=-1"),
        ("DELETE", "?grace=601"),
        ("DELETE", "?force=1"),
    ],
)
def test_a_bad_parameter_changes_nothing(daemon: RunningDaemon, method: str, parameter: str) -> None:
    found = daemon.get("/v1/agents?team=parameters").json["items"]
    agent = found[0] if found else daemon.spawn("sleep", "100", team="parameters")
    assert_problem(daemon.request(method, f"/v1/agents/{agent['id']}{parameter}"), 400, "invalid_query")
    assert daemon.get(f"/v1/agents/{agent['id']}").json["state"] == "running"


def test_good_parameters_are_taken(daemon: RunningDaemon) -> None:
    agent = daemon.spawn("echo", "out", team="good")
    for query in ("/v1/agents?state=running,exited&team=good&all=1", "/v1/audit?limit=1&since=2020-01-01T00:00:00Z"):
        assert daemon.get(query).status == 200
        assert len(daemon.get(query).json["items"]) == 1
    assert daemon.get("/v1/audit?until=2020-01-01T02:00:00%2B02:00").json["items"] == []
    assert daemon.wait(agent)["state"] == "exited"
    assert daemon.get(f"/v1/agents/{agent['id']}/logs?tail=1&stream=stdout").content == b"out\n"


@pytest.mark.parametrize("key", ["", "k" * 256, "tab\there", "caf\xe9"])
def test_a_bad_idempotency_key_is_refused(daemon: RunningDaemon, engine: docker.DockerClient, key: str) -> None:
    before = traces(daemon, engine)
    answer = daemon.post("/v1/agents", {"team": "keys"}, headers={"Idempotency-Key": key})
    assert_problem(answer, 400, "idempotency_key_invalid")
    assert traces(daemon, engine) == before


def test_one_key_is_one_spawn_even_when_all_ask_at_once(daemon: RunningDaemon) -> None:
    body = {"team": "together", "command": ["sleep", "60"]}
    answers: list[Answer] = []
    start = threading.Barrier(12)

    def ask() -> None:
        start.wait(10)
        answers.append(daemon.post("/v1/agents", body, headers={"Idempotency-Key": "the same"}))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [answer.status for answer in answers] == [201] * 12
    assert len({answer.json["id"] for answer in answers}) == 1
    assert len(daemon.get("/v1/agents?team=together").json["items"]) == 1
    other = daemon.post("/v1/agents", {**body, "session": "x"}, headers={"Idempotency-Key": "the same"})
    assert_problem(other, 409, "idempotency_key_reused")
    fresh = daemon.post("/v1/agents", body, headers={"Idempotency-Key": "another"})
    assert fresh.json["id"] != answers[0].json["id"]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "nonsense"])
def test_an_encoded_body_is_refused_before_it_is_unpacked(daemon: RunningDaemon, encoding: str) -> None:
    for body in (gzip.compress(b" " * 20_000_000), b"not gzip at all"):
        answer = daemon.post("/v1/agents", body, headers={"Content-Encoding": encoding})
        assert_problem(answer, 400, "encoding_unsupported")
    plain = daemon.post("/v1/teams", {"id": f"enc-{encoding}"}, headers={"Content-Encoding": "identity"})
    assert plain.status == 201


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 9000 + b"\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X%d: y\r\n" % n for n in range(500)) + b"\r\n",
        b"POST /v1/agents HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/agents HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/agents HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nabc\r\n",
    ],
)
def test_what_is_no_http_is_turned_away(daemon: RunningDaemon, request_bytes: bytes) -> None:
    with raw_connection(daemon.socket) as connection:
        connection.sendall(request_bytes)
        answer = read_to_end(connection)
    assert answer.split(b" ", 2)[1] in (b"400", b"431"), answer
    # Or any peer could fill the host's log, a traceback for each line of rubbish.
    assert "Traceback" not in daemon.log
    assert daemon.get("/healthz").status == 200


def test_half_a_request_and_silence_is_cut_off(daemon: RunningDaemon) -> None:
    halves = (
        b"",
        b"GET /hea",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n",
        b'POST /v1/agents HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{"team"',
    )
    answers: dict[bytes, bytes] = {}

    def hang(half: bytes) -> None:
        with raw_connection(daemon.socket, 40) as connection:
            connection.sendall(half)
            answers[half] = read_to_end(connection)

    began = time.monotonic()
    threads = [threading.Thread(target=hang, args=(half,)) for half in halves]
    for thread in threads:
        thread.start()
    # The others are served meanwhile.
    assert daemon.get("/healthz").status == 200
    for thread in threads:
        thread.join(45)
    # request_timeout is 10 s, and what is left of a body is read for as long again before the door is shut
    assert 8 < time.monotonic() - began < 30
    assert set(answers) == set(halves)
    assert b"408" in answers[halves[-1]]
    assert b"request_timeout" in answers[halves[-1]]
    assert daemon.get("/v1/teams/").status == 404
