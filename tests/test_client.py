"""The Python client against a real HTTP server on a real Unix socket, answers that end too early included."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from client_helpers import AGENT_ID, Asked, StandIn, Talk, agent, ended, event, frame, serving

from isolator.client import (
    STDERR,
    STDOUT,
    AnswerInvalid,
    AnswerTimeout,
    Client,
    ConnectionLost,
    ProblemError,
    SocketDenied,
    SocketNotFound,
    SocketUntrusted,
    transport,
)
from isolator.client import location as locations
from isolator.client.location import Location, find_socket
from isolator.client.streams import EventDecoder, FrameDecoder

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def folder() -> Iterator[Path]:
    # pytest's own folders make paths that are too long for a socket.
    path = Path(tempfile.mkdtemp(prefix="iso-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def server(folder: Path) -> Iterator[StandIn]:
    with serving(folder / "s") as standin:
        yield standin


@pytest.fixture
def client(server: StandIn) -> Iterator[Client]:
    with Client(server.path, timeout=5) as made:
        yield made


# what is sent


def test_spawn_sends_what_was_said_and_nothing_else(server: StandIn, client: Client) -> None:
    server.on("POST", "/v1/agents", agent(), 201)
    found = client.spawn(
        "red",
        ["python3", "-V"],
        name="worker",
        idempotency_key="k1",
        limits={"memory": "256m"},
        secrets=["host-key", {"name": "k", "value": "v", "as": "env"}],
        workspace={"source": "/srv/x", "mode": "ro"},
        create_team=False,
        ttl=60,
    )
    asked = server.asked[0]
    assert asked.body == {
        "team": "red",
        "name": "worker",
        "command": ["python3", "-V"],
        "limits": {"memory": "256m"},
        "secrets": ["host-key", {"name": "k", "value": "v", "as": "env"}],
        "workspace": {"source": "/srv/x", "mode": "ro"},
        "create_team": False,
        "ttl": 60,
    }
    assert asked.headers["idempotency-key"] == "k1"
    assert (found.id, found.live, found.receipt["lsm"].held) == (AGENT_ID, True, False)


def test_what_is_sent_satisfies_the_daemons_own_model(server: StandIn, client: Client) -> None:
    from isolator.model.request import SpawnRequest

    server.on("POST", "/v1/agents", agent(), 201)
    client.spawn("red", ["a"], secrets=[{"name": "k", "value": "v", "as": "env", "env": "K"}], network="none", ttl=1.5)
    assert SpawnRequest.model_validate(server.asked[0].body).secrets[0].delivery == "env"


def test_a_command_that_is_one_text_is_refused_before_anything_is_sent(server: StandIn, client: Client) -> None:
    with pytest.raises(TypeError, match="no shell"):
        client.spawn("red", "rm -rf /")
    assert server.asked == []


def test_ensure_tells_whether_it_was_created(server: StandIn, client: Client) -> None:
    server.on("PUT", "/v1/teams/red/agents/worker", agent(), 201)
    assert client.ensure("red", "worker", ["x"])[1] is True
    server.on("PUT", "/v1/teams/red/agents/worker", agent(), 200)
    assert client.ensure("red", "worker", ["x"])[1] is False


def test_names_can_not_climb_out_of_their_place_in_the_path(server: StandIn, client: Client) -> None:
    with pytest.raises(ProblemError):
        client.team("../agents?x=/y")
    assert server.asked[0].path == "/v1/teams/..%2Fagents%3Fx%3D%2Fy"
    for name in ("", ".", ".."):
        with pytest.raises(AnswerInvalid):
            client.agent(name)
    assert len(server.asked) == 1


def test_filters_are_sent_and_absent_ones_are_not(server: StandIn, client: Client) -> None:
    server.on("GET", "/v1/agents", {"items": [agent()], "next": None})
    client.agents()
    client.agents(team="a b", session="s&t", removed=True)
    assert [asked.query for asked in server.asked] == [{}, {"team": "a b", "session": "s&t", "all": "true"}]


def test_a_list_is_followed_to_its_last_page(server: StandIn, client: Client) -> None:
    pages = {None: (["a", "b"], "p/2="), "p/2=": ([], "p3"), "p3": (["c"], None)}

    def answer(talk: Talk, asked: Asked) -> None:
        ids, following = pages[asked.query.get("after")]
        talk.answer({"items": [agent(id=name) for name in ids], "next": following})

    server.routes["GET", "/v1/agents"] = answer
    assert [found.id for found in client.agents(team="red")] == ["a", "b", "c"]
    assert [asked.query for asked in server.asked] == [
        {"team": "red"},
        {"team": "red", "after": "p/2="},
        {"team": "red", "after": "p3"},
    ]


@pytest.mark.parametrize("following", ["round", 7, {}, ""])
def test_a_list_without_an_end_is_told_so(server: StandIn, client: Client, following: object) -> None:
    server.on("GET", "/v1/agents", {"items": [agent()], "next": following})
    with pytest.raises(AnswerInvalid):
        client.agents()
    assert len(server.asked) <= 2


# what is answered


def test_members_of_a_newer_daemon_are_kept_and_those_an_older_one_lacks_are_empty(
    server: StandIn, client: Client
) -> None:
    server.on("GET", "/v1/agents/new", {**agent(), "colour": "red", "exit": {"reason": "oom", "code": 137, "x": 1}})
    server.on("GET", "/v1/agents/old", {"id": "old", "state": "running"})
    new, old = client.agent("new"), client.agent("old")
    assert new.raw["colour"] == "red"
    assert new.exit is not None
    assert (new.exit.code, new.exit.signal, new.exit.reason) == (137, None, "oom")
    assert (old.name, old.command, old.exit, old.receipt) == ("", (), None, {})
    with pytest.raises(FrozenInstanceError):
        new.state = "exited"  # type: ignore[misc]


def test_info_team_image_audit(server: StandIn, client: Client) -> None:
    image = {"name": "isolator/skill", "digest": "sha256:1", "present": True}
    server.on("GET", "/v1/info", {"version": "9", "images": [image], "network": {"status": "proven"}, "guarantees": {}})
    server.on("GET", "/v1/images", {"items": [image], "next": None})
    team = {"id": "red", "owner": "uid:0", "network": "openclaw-team-red", "subnet": "10.0.0.0/24", "agents": 2}
    server.on("POST", "/v1/teams", team, 201)
    server.on("GET", "/v1/teams", {"items": [team], "next": None})
    server.on("DELETE", "/v1/teams/red", {"id": "red", "removed_agents": ["a", "b"]})
    server.on("GET", "/v1/audit", {"items": [{"seq": 3, "act": "agent.spawn", "actor": "uid:0", "time": "t"}]})
    server.on("POST", "/v1/audit/verify", {"entries": 3, "head": "h"})
    assert client.info().images[0].present
    assert client.images()[0].name == "isolator/skill"
    assert client.create_team("red").network == "openclaw-team-red"
    assert client.teams()[0].agents == 2
    assert client.remove_team("red") == ["a", "b"]
    assert client.audit(limit=1)[0].sequence == 3
    assert not client.verify_audit().ok  # it did not say so


def test_a_problem_keeps_its_code_status_and_members(server: StandIn, client: Client) -> None:
    server.routes["POST", "/v1/agents"] = lambda talk, _: talk.problem(403, "mount_outside_roots", "no", source="/x")
    with pytest.raises(ProblemError) as caught:
        client.spawn("red")
    error = caught.value
    assert (error.code, error.status, error.detail) == ("mount_outside_roots", 403, "no")
    assert error.fields == {"source": "/x"}


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b'"x"', b'{"detail": 5}'])
def test_a_failure_that_is_no_problem_json_is_still_a_problem(server: StandIn, client: Client, body: bytes) -> None:
    server.routes["GET", "/v1/info"] = lambda talk, _: talk.raw(body, 502)
    with pytest.raises(ProblemError) as caught:
        client.info()
    assert caught.value.code == "http_502"


@pytest.mark.parametrize("body", [b"<html>hi", b"[1]", b"null", b""])
def test_an_answer_that_is_not_ours_is_told_so(server: StandIn, client: Client, body: bytes) -> None:
    server.routes["GET", "/v1/agents"] = lambda talk, _: talk.raw(body)
    with pytest.raises(AnswerInvalid):
        client.agents()


@pytest.mark.parametrize("how", ["length", "chunked", "nothing", "no-http"])
def test_a_truncated_answer_is_never_taken_for_a_whole_one(server: StandIn, client: Client, how: str) -> None:
    def answer(talk: Talk, _: Asked) -> None:
        if how == "length":
            talk.raw(b'{"items": []}', length=500)
        elif how == "chunked":
            talk.chunks([b'{"items": []}'], whole=False)
        elif how == "no-http":
            talk.wfile.write(b"SSH-2.0-x\r\n")
        talk.close_connection = True

    server.routes["GET", "/v1/agents"] = answer
    with pytest.raises(AnswerInvalid if how == "no-http" else ConnectionLost):
        client.agents()


def test_an_answer_that_never_comes_and_one_that_drips_both_end(server: StandIn) -> None:
    over = threading.Event()

    def silent(_: Talk, __: Asked) -> None:
        over.wait(10)

    def dripping(talk: Talk, _: Asked) -> None:
        talk.send_response(200)
        talk.send_header("Content-Length", "1000")
        talk.end_headers()
        while not over.wait(0.05):
            talk.wfile.write(b" ")

    server.routes["GET", "/v1/info"] = silent
    server.routes["GET", "/v1/images"] = dripping
    client = Client(server.path, timeout=0.4)
    try:
        for call in (client.info, client.images):
            started = time.monotonic()
            with pytest.raises(AnswerTimeout):
                call()
            assert time.monotonic() - started < 3
    finally:
        over.set()


def test_health(server: StandIn, client: Client) -> None:
    assert client.healthy() is False  # 404: something answers, but not well
    server.routes["GET", "/healthz"] = lambda talk, _: talk.raw(b"ok\n", kind="text/plain")
    assert client.healthy() is True


def test_many_threads_may_use_one_client(server: StandIn, client: Client) -> None:
    server.on("GET", "/v1/agents", {"items": [agent()], "next": None})
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(len(client.agents()))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found == [1] * 16


# waiting and stopping


def test_wait_asks_again_until_the_end(server: StandIn, client: Client) -> None:
    def answer(talk: Talk, _: Asked) -> None:
        talk.answer(ended(code=3) if len(server.asked) > 2 else agent())

    server.routes["GET", f"/v1/agents/{AGENT_ID}"] = answer
    final = client.wait(AGENT_ID)
    assert final.exit is not None
    assert final.exit.code == 3
    assert all(0 < float(asked.query["wait"]) <= 60 for asked in server.asked)


def test_wait_has_an_end_of_its_own(server: StandIn, client: Client) -> None:
    server.on("GET", f"/v1/agents/{AGENT_ID}", agent())
    with pytest.raises(AnswerTimeout, match="still runs"):
        client.wait(AGENT_ID, timeout=0.3)
    assert len(server.asked) < 10


def test_stop_sends_the_grace_only_if_given(server: StandIn, client: Client) -> None:
    server.on("DELETE", "/v1/agents/x", ended("killed", None, 15))
    client.stop("x")
    client.stop("x", 0)
    client.stop("x", 2.5)
    assert [asked.query for asked in server.asked] == [{}, {"grace": "0"}, {"grace": "2.5"}]


# logs


def test_frames_come_out_whole_wherever_they_were_cut(server: StandIn, client: Client) -> None:
    whole = frame(1, b"out\n") + frame(2, b"\x00\xff\n") + frame(1, b"x" * 300)
    server.routes["GET", "/v1/agents/a/logs"] = lambda talk, _: talk.chunks(
        [whole[i : i + 7] for i in range(0, len(whole), 7)]
    )
    assert list(client.logs("a", tail=5)) == [(STDOUT, b"out\n"), (STDERR, b"\x00\xff\n"), (STDOUT, b"x" * 300)]
    assert server.asked[0].query == {"follow": "false", "tail": "5", "format": "frames"}


def test_frames_split_at_every_byte() -> None:
    whole = frame(1, b"ab") + frame(0, b"keep-alive") + frame(2, b"") + frame(2, b"c")
    for cut in range(len(whole) + 1):
        decoder = FrameDecoder()
        assert [*decoder.feed(whole[:cut]), *decoder.feed(whole[cut:])] == [(1, b"ab"), (2, b"c")]
        assert not decoder.incomplete


@pytest.mark.parametrize("bad", [b"plain text output", bytes((1, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF))])
def test_what_is_no_frame_is_refused(bad: bytes) -> None:
    with pytest.raises(AnswerInvalid):
        list(FrameDecoder().feed(bad))


@pytest.mark.parametrize("whole", [True, False])
def test_logs_that_break_off_are_told_so(server: StandIn, client: Client, whole: bool) -> None:
    server.routes["GET", "/v1/agents/a/logs"] = lambda talk, _: talk.chunks(
        [frame(1, b"first"), frame(1, b"second")[:10]], whole=whole
    )
    got = []
    with pytest.raises(ConnectionLost):
        got.extend(client.logs("a", follow=True))
    server.routes["GET", "/v1/agents/a/logs"] = lambda talk, _: talk.chunks([frame(1, b"first")])
    assert list(client.logs("a", follow=True)) == [(1, b"first")]


def test_logs_of_a_stranger_are_a_problem(server: StandIn, client: Client) -> None:
    server.routes["GET", "/v1/agents/a/logs"] = lambda talk, _: talk.problem(404, "agent_not_found", "none")
    with pytest.raises(ProblemError, match="agent_not_found"):
        client.logs("a")


def test_closing_a_stream_wakes_its_reader(server: StandIn, client: Client) -> None:
    over = threading.Event()

    def answer(talk: Talk, _: Asked) -> None:
        talk.chunks([frame(1, b"x")], whole=False)
        over.wait(20)

    server.routes["GET", "/v1/agents/a/logs"] = answer
    stream = client.logs("a", follow=True)
    got: list[tuple[int, bytes]] = []
    reader = threading.Thread(target=lambda: got.extend(stream))
    reader.start()
    time.sleep(0.3)
    client.close()
    reader.join(5)
    alive = reader.is_alive()
    over.set()
    assert not alive
    assert got in ([(1, b"x")], [])


# events


def test_events_resume_after_a_broken_connection_none_twice_none_missed(server: StandIn, client: Client) -> None:
    def answer(talk: Talk, asked: Asked) -> None:
        last = int(asked.query.get("after", 0))
        if last == 0:
            talk.chunks([b": hello\n\n", event(5), event(6)[:20]], whole=False)
        elif last == 5 and len(server.asked) == 2:
            talk.problem(503, "starting", "not yet")
        else:
            # One that was had already, as a daemon that counts inclusively would send it.
            talk.chunks([event(5), event(6)[:9], event(6)[9:] + event(9)])

    server.routes["GET", "/v1/events"] = answer
    stream = client.events(follow=False, patience=10)
    assert [found.id for found in stream] == [5, 6, 9]
    assert [asked.headers.get("last-event-id") for asked in server.asked] == [None, "5", "5"]


def test_followed_events_go_on_when_the_daemon_closes_cleanly(server: StandIn, client: Client) -> None:
    server.routes["GET", "/v1/events"] = lambda talk, asked: talk.chunks([event(int(asked.query.get("after", 0)) + 1)])
    stream = client.events(follow=True, patience=10)
    ids = []
    for found in stream:
        ids.append(found.id)
        if len(ids) == 4:
            stream.close()
    assert ids == [1, 2, 3, 4]


def test_a_place_told_without_an_event_is_resumed_from(server: StandIn, client: Client) -> None:
    def answer(talk: Talk, asked: Asked) -> None:
        if "after" in asked.query:
            talk.chunks([event(int(asked.query["after"]) + 1)])
        else:
            talk.chunks([b"id: 41\n\n"], whole=False)

    server.routes["GET", "/v1/events"] = answer
    with client.events(patience=10) as stream:
        assert next(iter(stream)).id == 42


def test_resuming_gives_up_after_its_patience(server: StandIn, client: Client) -> None:
    server.routes["GET", "/v1/events"] = lambda talk, _: talk.chunks([event(1)], whole=False)
    stream = iter(client.events(patience=0.5))
    assert next(stream).id == 1
    server.routes["GET", "/v1/events"] = lambda talk, _: talk.chunks([], whole=False)
    started = time.monotonic()
    with pytest.raises(ConnectionLost):
        next(stream)
    assert 0.4 < time.monotonic() - started < 5


def test_a_refusal_while_resuming_is_not_tried_again(server: StandIn, client: Client) -> None:
    server.routes["GET", "/v1/events"] = lambda talk, _: talk.chunks([event(1)], whole=False)
    stream = iter(client.events(patience=20))
    next(stream)
    server.routes["GET", "/v1/events"] = lambda talk, _: talk.problem(403, "forbidden", "no")
    with pytest.raises(ProblemError, match="forbidden"):
        next(stream)
    assert len(server.asked) == 2


def test_a_daemon_that_is_not_there_is_told_at_once(folder: Path) -> None:
    started = time.monotonic()
    with pytest.raises(SocketNotFound):
        Client(folder / "none").events()
    assert time.monotonic() - started < 1


def test_event_streams_lines() -> None:
    text = b"id: 7\r\nevent: x\r\ndata: {\r\ndata:  }\r\n\r\n: comment\n\ndata: y\nretry: 5\n\n"
    for cut in range(len(text)):
        decoder = EventDecoder()
        found = [*decoder.feed(text[:cut]), *decoder.feed(text[cut:])]
        assert [(each.id, each.name, each.data) for each in found] == [("7", "x", "{\n }"), (None, "message", "y")]


@pytest.mark.parametrize("piece", [b"data: " + b"x" * 5_000_000, b"data: xxxxx\n" * 1_000_000])
def test_an_event_without_end_is_bounded(piece: bytes) -> None:
    with pytest.raises(AnswerInvalid):
        list(EventDecoder().feed(piece))


# the socket


def test_no_socket_and_a_dead_one_say_whether_it_runs(folder: Path) -> None:
    with pytest.raises(SocketNotFound, match="Is it running") as caught:
        Client(folder / "none").info()
    assert str(folder / "none") in str(caught.value)
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(folder / "dead"))
    dead.close()
    with pytest.raises(SocketNotFound, match="nobody listens"):
        Client(folder / "dead").info()
    with pytest.raises(SocketNotFound, match="too long"):
        Client(folder / ("x" * 200)).info()
    with pytest.raises(SocketNotFound):
        Client(folder / "dead" / "below").info()


_AS_NOBODY = """
import os, sys
from pathlib import Path
from isolator.client import Client, IsolatorClientError
import isolator.client.location as locations
os.setgroups([]); os.setgid(65534); os.setuid(65534)
locations.SYSTEM_SOCKET = Path(sys.argv[1])
os.environ.pop("ISOLATOR_SOCKET", None); os.environ.pop("ISOLATOR_RUNTIME_DIR", None)
try:
    Client(Path(sys.argv[1])).info()
except IsolatorClientError as error:
    print(error.code, error.detail)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
@pytest.mark.parametrize(("gid", "told"), [(1, "group daemon"), (0, "only root may")])
def test_who_may_not_connect_is_told_which_group_may_but_never_to_join_roots(
    server: StandIn, gid: int, told: str
) -> None:
    server.path.chmod(0o660)
    os.chown(server.path, 0, gid)
    ran = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, str(server.path)], capture_output=True, text=True, timeout=30, check=True
    )
    assert ran.stdout.startswith("socket_denied")
    assert told in ran.stdout
    assert "aG root" not in ran.stdout
    assert server.asked == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a socket of somebody else's")
def test_a_strangers_socket_in_a_default_place_gets_nothing(folder: Path) -> None:
    folder.chmod(0o777)
    path = folder / "s"
    code = f"""
import os, socket, sys
os.setgid(65534); os.setuid(65534)
s = socket.socket(socket.AF_UNIX); s.bind({str(path)!r}); s.listen(); print("ready", flush=True)
connection, _ = s.accept(); connection.settimeout(5); print(len(connection.recv(100)), flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as stranger:
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == "ready\n"
        with pytest.raises(SocketUntrusted):
            transport.request(Location(path, named=False), "POST", "/v1/agents", body={"secret": "x"}, timeout=2)
        assert stranger.stdout.readline() == "0\n"
        assert stranger.wait(10) == 0


def test_our_own_socket_in_a_default_place_is_trusted(server: StandIn) -> None:
    server.on("GET", "/v1/info", {"version": "1"})
    answer = transport.request(Location(server.path, named=False), "GET", "/v1/info", timeout=2)
    assert answer.body == {"version": "1"}


def test_where_the_socket_is(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    config = folder / "c.toml"
    config.write_text('runtime_dir = "/srv/run"\n')
    for name in ("ISOLATOR_SOCKET", "ISOLATOR_RUNTIME_DIR", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ISOLATOR_CONFIG", str(config))
    assert find_socket() == Location(Path("/srv/run/isolator.sock"), named=True)
    config.write_text('socket = "/srv/s"\nruntime_dir = "/srv/run"\n')
    assert find_socket() == Location(Path("/srv/s"), named=True)
    monkeypatch.setenv("ISOLATOR_RUNTIME_DIR", "/r")
    assert find_socket().path == Path("/srv/s"), "the daemon listens there, wherever its runtime folder is"
    config.write_text('runtime_dir = "/srv/run"\n')
    assert find_socket().path == Path("/r/isolator.sock")
    monkeypatch.setenv("ISOLATOR_SOCKET", "/e")
    assert find_socket().path == Path("/e")
    assert find_socket(Path("/given")).path == Path("/given")
    monkeypatch.delenv("ISOLATOR_SOCKET")
    monkeypatch.delenv("ISOLATOR_RUNTIME_DIR")
    config.write_text("not toml [")
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    monkeypatch.setattr(locations, "SYSTEM_SOCKET", folder / "system")
    assert find_socket() == Location(Path("/tmp/isolator-1234/isolator/isolator.sock"), named=False)
    (folder / "system").touch()
    assert find_socket() == Location(folder / "system", named=False)


def test_the_path_is_the_one_the_settings_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from isolator.settings import Settings

    for name in ("ISOLATOR_SOCKET", "ISOLATOR_RUNTIME_DIR", "ISOLATOR_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    if os.geteuid() == 0:
        assert find_socket().path == Settings().socket_path


def test_light_enough_for_the_command_line() -> None:
    code = (
        "import sys, isolator.client; print(*sorted(set(sys.modules) & {'aiohttp', 'pydantic', 'docker', 'tenacity'}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert ran.stdout.strip() == ""


def test_denied_is_an_error_of_its_own() -> None:
    assert SocketDenied(Path("/nonexistent/s")).group == "isolator"
