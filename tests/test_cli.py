"""The command line: what it sends, what it shows, how it exits; against a server that answers as told."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from client_helpers import AGENT_ID, Asked, StandIn, Talk, agent, ended, event, frame, serving

from isolator.audit.log import AuditLog
from isolator.cli.checks.holes import HOLES, parse_version
from isolator.cli.main import main
from isolator.cli.text import cut, escape, table, width

pytestmark = pytest.mark.timeout(60)
Run = Callable[..., Result]
OTHER_ID = "abcdzzzzzzzzzzzz"


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="iso-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    for name in [name for name in os.environ if name.startswith("ISOLATOR_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ISOLATOR_SOCKET", str(folder / "s"))
    with serving(folder / "s") as standin:
        standin.on("POST", "/v1/agents", agent(), 201)
        standin.on("GET", "/v1/agents", {"items": [agent()], "next": None})
        standin.on("GET", f"/v1/agents/{AGENT_ID}", ended())
        standin.on("DELETE", f"/v1/agents/{AGENT_ID}", ended("killed", None, 15))
        standin.routes["GET", f"/v1/agents/{AGENT_ID}/logs"] = lambda talk, _: talk.chunks(
            [frame(1, b"out\x00\xff\n"), frame(2, b"err\n")]
        )
        yield standin


@pytest.fixture
def run(server: StandIn) -> Run:
    def call(*arguments: str, **more: object) -> Result:
        result = CliRunner().invoke(main, list(arguments), **more)  # type: ignore[arg-type]
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


# spawn


def test_spawn_prints_the_id_and_sends_every_option(run: Run, server: StandIn, folder: Path) -> None:
    result = run(
        *("spawn", "--team", "red", "--name", "w", "--image", "i", "--workspace", f"{folder}:ro"),
        *("--mount", f"{folder}:/data", "--mount", "rel:/more:rw", "--env", "A=b=c", "--cpus", "0.5"),
        *("--memory", "256m", "--pids", "9", "--disk", "1m", "--wall", "3", "--ttl", "4", "--idle-ttl", "5"),
        *("--network", "none", "--session", "s", "--parent", "p", "--cleanup-grace", "0", "--no-create-team"),
        *("--idempotency-key", "k", "--skill", "sk", "--secret", "host", "--", "ls", "-l", "--json"),
    )
    assert (result.exit_code, result.stdout) == (0, f"{AGENT_ID}\n")
    assert server.asked[0].body == {
        "team": "red",
        "name": "w",
        "image": "i",
        "workspace": {"source": str(folder), "mode": "ro"},
        "mounts": [
            {"source": str(folder), "target": "/data", "mode": "ro"},
            {"source": f"{Path.cwd()}/rel", "target": "/more", "mode": "rw"},
        ],
        "env": {"A": "b=c"},
        "limits": {"cpus": 0.5, "memory": "256m", "pids": 9, "disk": "1m", "wall": 3.0},
        "ttl": 4.0,
        "idle_ttl": 5.0,
        "network": "none",
        "session": "s",
        "parent": "p",
        "cleanup_grace": 0.0,
        "create_team": False,
        "skills": ["sk"],
        "secrets": [{"name": "host", "as": "file"}],
        "command": ["ls", "-l", "--json"],
    }
    assert server.asked[0].headers["idempotency-key"] == "k"


def test_spawn_says_only_what_was_said(run: Run, server: StandIn) -> None:
    run("spawn", "--team", "red", "ls", "-l")
    assert server.asked[0].body == {"team": "red", "command": ["ls", "-l"]}


def test_a_workspace_behind_a_link_is_not_resolved(run: Run, server: StandIn, folder: Path) -> None:
    (folder / "link").symlink_to("/etc")
    run("spawn", "--team", "red", "--workspace", str(folder / "link"))
    assert server.asked[0].body["workspace"] == {"source": str(folder / "link"), "mode": "rw"}


@pytest.mark.parametrize("option", ["--secret", "--secret-env"])
@pytest.mark.parametrize("text", ["KEY=hunter2", "KEY=hunter2=@x", "KEY=", "=@x", "KEY=sk-ABC=", "KEY=VAR=hunter2"])
def test_a_secret_on_the_command_line_is_refused_and_never_repeated(
    run: Run, server: StandIn, option: str, text: str
) -> None:
    result = run("spawn", "--team", "red", option, text, "--", "true")
    assert result.exit_code == 125
    assert "hunter2" not in result.output
    assert "sk-ABC" not in result.output
    assert server.asked == []
    if "hunter2" in text:
        assert "visible to everybody" in result.output


def test_secrets_come_from_the_host_a_file_or_standard_input(run: Run, server: StandIn, folder: Path) -> None:
    (folder / "k").write_text("from file\n")
    result = run(
        *("spawn", "--team", "red", "--secret", "A", "--secret", f"B=@{folder}/k", "--secret-env", "c=-"),
        *("--secret-env", f"d=D_VAR=@{folder}/k", "--secret-env", "e", "--secret-env", "f=F_VAR"),
        input="typed\n",
    )
    assert result.exit_code == 0, result.output
    assert server.asked[0].body["secrets"] == [
        {"name": "A", "as": "file"},
        {"name": "B", "as": "file", "value": "from file\n"},
        {"name": "c", "as": "env", "value": "typed"},
        {"name": "d", "as": "env", "env": "D_VAR", "value": "from file"},
        {"name": "e", "as": "env"},
        {"name": "f", "as": "env", "env": "F_VAR"},
    ]
    assert "from file" not in result.output
    assert "typed" not in result.output


@pytest.mark.parametrize(
    "wrong",
    [
        ["--secret", "A=@/nonexistent/file"],
        ["--secret", "A", "--secret", "A"],
        ["--secret", "A=-", "--secret", "B=-"],
        ["--mount", "/only-source"],
        ["--mount", "/a:relative"],
        ["--env", "NOT_SET_ANYWHERE"],
        ["--env", "=x"],
        ["--network", "host"],
        ["--privileged"],
    ],
)
def test_wrong_usage_sends_nothing_and_exits_125(run: Run, server: StandIn, wrong: list[str]) -> None:
    result = run("spawn", "--team", "red", *wrong, "--", "true")
    assert result.exit_code == 125
    assert server.asked == []


def test_a_secret_that_is_too_large_or_no_text_is_refused(run: Run, server: StandIn, folder: Path) -> None:
    for content in (b"x" * 262_145, b"\xff\xfe"):
        (folder / "k").write_bytes(content)
        assert run("spawn", "--team", "red", "--secret", f"A=@{folder}/k").exit_code == 125
    assert server.asked == []


# spawn --wait


def test_wait_passes_the_very_bytes_and_the_exit_code(run: Run, server: StandIn) -> None:
    server.on("GET", f"/v1/agents/{AGENT_ID}", ended(code=7))
    result = run("spawn", "--team", "red", "--wait", "--", "x")
    assert (result.exit_code, result.stdout_bytes, result.stderr_bytes) == (7, b"out\x00\xff\n", b"err\n")


@pytest.mark.parametrize(
    ("reason", "code", "number", "exits", "says"),
    [
        ("exited", 0, None, 0, ""),
        ("exited", 255, None, 255, ""),
        ("killed", None, 15, 143, "SIGTERM"),
        ("killed", 137, 9, 137, "SIGKILL"),
        ("killed", None, None, 137, "ended"),
        ("oom", 137, None, 137, "memory"),
        ("oom", 0, None, 137, "memory"),
        ("oom", None, 9, 137, "memory"),
        ("wall", None, None, 137, "wall"),
        ("ttl", 143, None, 143, "time to live"),
        ("lost", None, None, 125, "not known"),
    ],
)
def test_every_end_has_its_exit_code(
    run: Run, server: StandIn, reason: str, code: int | None, number: int | None, exits: int, says: str
) -> None:
    server.on("GET", f"/v1/agents/{AGENT_ID}", ended(reason, code, number))
    result = run("spawn", "--team", "red", "--wait")
    assert result.exit_code == exits
    assert says in result.stderr.removeprefix("err\n")
    assert (says == "") == (result.stderr == "err\n")


def test_wait_json_is_one_document_and_the_output_is_not_mixed_in(run: Run, server: StandIn) -> None:
    server.on("GET", f"/v1/agents/{AGENT_ID}", ended(code=3))
    result = run("spawn", "--team", "red", "--wait", "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["exit"]["code"] == 3
    assert result.stderr == ""


def test_output_over_a_broken_connection_is_whole_and_not_doubled(run: Run, server: StandIn) -> None:
    tries: list[int] = []
    pieces = [frame(1, b"one\n"), frame(2, b"e1\n"), frame(1, b"two\n")]

    def logs(talk: Talk, _: Asked) -> None:
        tries.append(1)
        talk.chunks(pieces[:2] if len(tries) == 1 else pieces, whole=len(tries) > 1)

    server.routes["GET", f"/v1/agents/{AGENT_ID}/logs"] = logs
    server.on("GET", "/healthz", {})
    result = run("spawn", "--team", "red", "--wait")
    assert (result.exit_code, result.stdout_bytes) == (0, b"one\ntwo\n")
    assert result.stderr.count("e1\n") == 1
    assert "daemon went away" in result.stderr


def test_logs_that_are_gone_do_not_hide_the_exit_code(run: Run, server: StandIn) -> None:
    server.on("GET", f"/v1/agents/{AGENT_ID}", ended(code=4))
    server.routes["GET", f"/v1/agents/{AGENT_ID}/logs"] = lambda talk, _: talk.problem(404, "logs_gone", "too late")
    result = run("spawn", "--team", "red", "--wait")
    assert result.exit_code == 4
    assert "too late" in result.stderr


@pytest.mark.parametrize(
    ("number", "exits"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str
)
def test_an_interruption_stops_the_agent(server: StandIn, number: signal.Signals, exits: int) -> None:
    def logs(talk: Talk, _: Asked) -> None:
        talk.chunks([frame(1, b"running\n")], whole=False)
        time.sleep(20)

    server.routes["GET", f"/v1/agents/{AGENT_ID}/logs"] = logs
    command = [sys.executable, "-m", "isolator", "spawn", "--team", "red", "--wait", "--", "x"]
    # Whoever runs the tests in the background may have us ignore interruptions; a person's terminal does not.
    command = ["env", f"--default-signal={number.name.removeprefix('SIG')}", *command]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"running\n"
        process.send_signal(number)
        assert process.wait(15) == exits
    assert [asked.path for asked in server.asked if asked.method == "DELETE"] == [f"/v1/agents/{AGENT_ID}"]


def test_an_ignored_hang_up_stays_ignored(server: StandIn) -> None:
    hung_up = threading.Event()

    def logs(talk: Talk, _: Asked) -> None:
        talk.chunks([frame(1, b"running\n")], whole=False)
        hung_up.wait(10)
        last = frame(1, b"still\n")
        talk.wfile.write(f"{len(last):x}\r\n".encode() + last + b"\r\n0\r\n\r\n")

    server.routes["GET", f"/v1/agents/{AGENT_ID}/logs"] = logs
    command = ["env", "--ignore-signal=HUP", sys.executable, "-m", "isolator", "spawn", "--team", "red", "--wait", "x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"running\n"
        process.send_signal(signal.SIGHUP)
        hung_up.set()
        assert process.stdout.readline() == b"still\n"
        process.kill()


def test_a_reader_that_went_away_stops_the_agent(server: StandIn) -> None:
    def logs(talk: Talk, _: Asked) -> None:
        talk.chunks([frame(1, b"line\n")] * 50_000, whole=False)
        time.sleep(20)

    server.routes["GET", f"/v1/agents/{AGENT_ID}/logs"] = logs
    command = [sys.executable, "-m", "isolator", "spawn", "--team", "red", "--wait", "--", "x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(15) == 141
        assert b"Traceback" not in process.stderr.read()
    assert any(asked.method == "DELETE" for asked in server.asked)


# failures


def test_own_failures_exit_125_with_the_reason(run: Run, server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    server.routes["POST", "/v1/agents"] = lambda talk, _: talk.problem(403, "mount_outside_roots", "no \x1b[31m", x=1)
    result = run("spawn", "--team", "red")
    assert result.exit_code == 125
    assert result.stdout == ""
    assert result.stderr == "isolator: no \\x1b[31m [mount_outside_roots]\n"
    result = run("spawn", "--team", "red", "--json")
    assert result.exit_code == 125
    assert json.loads(result.stderr) == {"code": "mount_outside_roots", "status": 403, "detail": "no \x1b[31m", "x": 1}
    monkeypatch.setenv("ISOLATOR_SOCKET", "/nonexistent/s")
    result = run("ps")
    assert result.exit_code == 125
    assert "Is it running?" in result.stderr
    assert json.loads(run("ps", "--json").stderr)["code"] == "socket_not_found"
    assert run("no-such-command").exit_code == 125
    assert run("ps", "--nope").exit_code == 125


# which agent


def names(server: StandIn) -> None:
    agents = [
        agent(),
        agent(id=OTHER_ID, name="worker", team="blue"),
        agent(id="zzzz222222222222", name="abcd", team="blue"),
        {**ended(), "id": "yyyy222222222222", "name": "again", "team": "red"},
        agent(id="xxxx222222222222", name="again", team="red"),
    ]
    gone = {**ended(), "id": "wwww222222222222", "name": "gone", "state": "removed"}
    server.routes["GET", "/v1/agents"] = lambda talk, asked: talk.answer(
        {"items": [*agents, gone] if asked.query.get("all") else agents, "next": None}
    )
    for each in (*agents, gone):
        server.on("DELETE", f"/v1/agents/{each['id']}", each)
    server.on("GET", f"/v1/agents/{OTHER_ID}", agents[1])


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (OTHER_ID, OTHER_ID),  # an id
        ("abcdef", AGENT_ID),  # its beginning
        ("abcd", "zzzz222222222222"),  # a name before beginnings
        ("red/worker", AGENT_ID),
        ("blue/worker", OTHER_ID),
        ("again", "xxxx222222222222"),  # a live one before one that ended
        ("yyyy", "yyyy222222222222"),
        ("wwww", "wwww222222222222"),  # removed ones by their id
    ],
)
def test_an_agent_is_found(run: Run, server: StandIn, text: str, meant: str) -> None:
    names(server)
    result = run("stop", text)
    assert (result.exit_code, result.stdout) == (0, f"{meant}\n")
    assert [asked.path for asked in server.asked if asked.method == "DELETE"] == [f"/v1/agents/{meant}"]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("worker", "agent_ambiguous"),  # a name in two teams
        ("abc", "agent_ambiguous"),  # two ids begin so
        ("gone", "agent_not_found"),  # a removed agent's name
        ("red/abcd", "agent_not_found"),
        ("nobody", "agent_not_found"),
    ],
)
def test_what_is_not_one_agent_stops_none(run: Run, server: StandIn, text: str, code: str) -> None:
    names(server)
    result = run("stop", "again", text, "--json")
    assert result.exit_code == 125
    problem = json.loads(result.stderr)
    assert problem["code"] == code
    assert ("candidates" in problem) == (code == "agent_ambiguous")
    assert not any(asked.method == "DELETE" for asked in server.asked)


# what people and programs see


def test_ps_escapes_what_agents_called_themselves(run: Run, server: StandIn) -> None:
    evil = agent(name="\x1b[2Jx\u202ey", command=["a\nb", "\x07"])
    server.on("GET", "/v1/agents", {"items": [evil], "next": None})
    result = run("ps")
    assert "\x1b" not in result.stdout
    assert "\u202e" not in result.stdout
    assert "\\x1b[2Jx\\u202ey" in result.stdout
    assert "a\\nb \\x07" in result.stdout
    assert len(result.stdout.splitlines()) == 2
    assert json.loads(run("ps", "--json").stdout)["items"][0]["name"] == evil["name"]
    assert run("ps", "-q").stdout == f"{AGENT_ID}\n"


def test_ps_filters(run: Run, server: StandIn) -> None:
    run("ps", "--team", "red", "--state", "exited", "--session", "s", "-a")
    assert server.asked[0].query == {"team": "red", "state": "exited", "session": "s", "all": "true"}


def test_an_empty_list_is_an_empty_list(run: Run, server: StandIn) -> None:
    server.on("GET", "/v1/agents", {"items": [], "next": None})
    result = run("ps")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "No agents" in result.stderr
    assert json.loads(run("ps", "--json").stdout) == {"items": [], "next": None}


def test_inspect_shows_what_is_not_held(run: Run, server: StandIn) -> None:
    server.on("GET", f"/v1/agents/{AGENT_ID}", ended("oom", 137))
    shown = run("inspect", AGENT_ID).stdout
    assert "exited (oom)" in shown
    assert "memory 512m" in shown
    assert any("lsm" in line and "NOT HELD" in line for line in shown.splitlines())
    assert not any("seccomp" in line and "NOT HELD" in line for line in shown.splitlines())
    assert json.loads(run("inspect", AGENT_ID, "--json").stdout)["id"] == AGENT_ID


def test_logs_raw_escaped_and_for_programs(run: Run, server: StandIn) -> None:
    raw = run("logs", AGENT_ID, "--tail", "3")
    assert (raw.stdout_bytes, raw.stderr_bytes) == (b"out\x00\xff\n", b"err\n")
    assert server.asked[-1].query["tail"] == "3"
    assert run("logs", "--escape", "worker").stdout == "out\\x00\\xff\n"
    lines = [json.loads(line) for line in run("logs", "--json", "worker").stdout.splitlines()]
    assert [(line["stream"], base64.b64decode(line["data"])) for line in lines] == [
        ("stdout", b"out\x00\xff\n"),
        ("stderr", b"err\n"),
    ]


def test_events_one_a_line(run: Run, server: StandIn) -> None:
    server.routes["GET", "/v1/events"] = lambda talk, _: talk.chunks([event(3, "agent.exited\x1b"), event(4)])
    result = run("events", "--no-follow", "--after", "2", "--team", "red")
    assert server.asked[0].query == {"follow": "false", "after": "2", "team": "red"}
    assert result.stdout.splitlines()[0].startswith("3  ")
    assert "\\x1b" in result.stdout
    assert [json.loads(line)["id"] for line in run("events", "--no-follow", "--json").stdout.splitlines()] == [3, 4]


def test_teams(run: Run, server: StandIn) -> None:
    team = {"id": "red", "owner": "uid:0", "network": "openclaw-team-red", "subnet": "10.0.0.0/24", "agents": 2}
    server.on("POST", "/v1/teams", team, 201)
    server.on("GET", "/v1/teams", {"items": [team], "next": None})
    server.on("DELETE", "/v1/teams/red", {"id": "red", "removed_agents": ["a", "b"]})
    assert run("team", "create", "red").stdout == "red\n"
    assert "openclaw-team-red" in run("team", "ls").stdout
    assert run("team", "rm", "red").stdout == "red (2 agents removed)\n"
    removed = json.loads(run("team", "rm", "red", "--json").stdout)
    assert removed["items"] == [{"id": "red", "removed_agents": ["a", "b"]}]


def test_the_record_is_read_without_the_daemon(run: Run, folder: Path) -> None:
    """After damage no daemon starts, and somebody must look."""

    async def write() -> None:
        log = AuditLog(folder / "audit")
        for number in range(3):
            await log.note("agent.end", None, team="red", agent=f"a{number}")
        log.close()

    asyncio.run(write())
    where = ("--folder", str(folder / "audit"))
    assert "ok: 3 entries" in run("audit", "verify", *where).stdout
    found = json.loads(run("audit", "search", "--agent", "a1", "--since", "2020-01-01", *where, "--json").stdout)
    assert [item["agent"] for item in found["items"]] == ["a1"]
    assert run("audit", "search", "--since", "yesterday", *where).exit_code == 125
    path = folder / "audit" / "audit.jsonl"
    path.write_text(path.read_text().replace('"a1"', '"a7"'))
    broken = run("audit", "verify", *where)
    assert (broken.exit_code, "BROKEN after 2 good entries" in broken.stdout) == (1, True)
    path.unlink()
    assert "is gone, with 3 entries" in run("audit", "verify", *where).stdout


def test_audit(run: Run, server: StandIn) -> None:
    entry = {"seq": 1, "time": "t", "actor": "uid:0", "kind": "intent", "act": "agent.spawn", "detail": {"a": "\x1b"}}
    server.on("GET", "/v1/audit", {"items": [entry], "next": None})
    assert "agent.spawn" in run("audit", "search", "--act", "agent", "--limit", "5").stdout
    assert server.asked[0].query == {"act": "agent", "limit": "5"}
    server.on("POST", "/v1/audit/verify", {"ok": True, "entries": 1, "head": "h", "problem": None})
    assert run("audit", "verify").exit_code == 0
    server.on("POST", "/v1/audit/verify", {"ok": False, "entries": 1, "head": "h", "problem": "line 2 is not JSON"})
    broken = run("audit", "verify")
    assert broken.exit_code == 1
    assert "line 2" in broken.stdout


def test_images_are_asked_of_the_daemon(run: Run, server: StandIn) -> None:
    items = [{"name": "isolator/skill", "digest": "sha256:" + "1" * 64, "present": False}]
    server.on("GET", "/v1/images", {"items": items, "next": None})
    assert " NO " in run("image", "ls").stdout
    assert json.loads(run("image", "ls", "--json").stdout)["items"] == items


def test_images_without_a_daemon_come_from_the_pin_file(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from isolator.images.lock import write_lock

    write_lock(tmp_path / "images.json", {"isolator/skill": "sha256:" + "2" * 64})
    monkeypatch.setenv("ISOLATOR_SOCKET", "/nonexistent/s")
    monkeypatch.setenv("ISOLATOR_DOCKER_SOCKET", "/nonexistent/docker")
    monkeypatch.setenv("ISOLATOR_IMAGE_LOCK", str(tmp_path / "images.json"))
    result = run("image", "ls")
    assert result.exit_code == 0
    assert "isolator/skill" in result.stdout
    assert "unknown" in result.stdout
    assert "not running" in result.stderr


def test_image_build_refuses_what_has_no_recipe(run: Run) -> None:
    result = run("image", "build", "agent-pyhton")
    assert result.exit_code == 125
    assert "agent-python" in result.stderr


def test_every_command_takes_json_and_has_help(run: Run) -> None:
    names_ = main.list_commands(None)  # type: ignore[arg-type]
    for name in names_:
        command = main.get_command(None, name)  # type: ignore[arg-type]
        assert command is not None
        for path in [[name, sub] for sub in getattr(command, "commands", {})] or [[name]]:
            shown = run(*path, "--help")
            assert shown.exit_code == 0
            assert "--json" in shown.stdout, path


# completion


def complete(server: StandIn, words: str) -> list[str]:
    environment = {
        **os.environ,
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
        "_ISOLATOR_COMPLETE": "bash_complete",
        "ISOLATOR_SOCKET": str(server.path),
    }
    code = "from isolator.cli.main import main; main(prog_name='isolator')"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=20, check=False
    )
    return [line.partition(",")[2] for line in ran.stdout.splitlines() if line]


def test_completion_offers_commands_agents_and_teams(run: Run, server: StandIn) -> None:
    server.on("GET", "/v1/teams", {"items": [{"id": "red"}, {"id": "blue"}], "next": None})
    assert complete(server, "isolator te") == ["team"]
    assert complete(server, "isolator logs wo") == ["worker"]
    assert complete(server, "isolator logs red/") == ["red/worker"]
    assert complete(server, "isolator exec -t wo") == ["worker"]
    assert complete(server, "isolator spawn --team r") == ["red"]
    for shell in ("zsh", "fish"):
        assert "_ISOLATOR_COMPLETE" in run("completion", shell).stdout


def test_completion_is_quiet_and_quick_when_the_daemon_hangs(server: StandIn) -> None:
    server.routes["GET", "/v1/agents"] = lambda *_: time.sleep(10)
    started = time.monotonic()
    assert complete(server, "isolator logs wo") == []
    assert time.monotonic() - started < 5


# settings


def test_config_show_tells_where_a_value_comes_from(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "c.toml").write_text('max_pids = 770\nmax_memory = "1g"\n')
    monkeypatch.setenv("ISOLATOR_CONFIG", str(folder / "c.toml"))
    monkeypatch.setenv("ISOLATOR_MAX_MEMORY", "2g")
    settings = json.loads(run("config", "show", "--json").stdout)["settings"]
    assert settings["max_pids"] == {"value": 770, "origin": "file"}
    assert settings["max_memory"] == {"value": 2**31, "origin": "env"}
    assert settings["max_agents"]["origin"] == "default"
    everything = run("config", "show", "--all").stdout
    assert "Most memory a spawn may ask for." in everything
    assert "ISOLATOR_MAX_MEMORY" in everything


def test_config_check_names_unknown_keys(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "c.toml"
    file.write_text("max_pids = 770\n")
    assert run("config", "check", str(file)).exit_code == 0
    file.write_text("max_pidz = 77\nmax_pids = 1\n")
    # The environment's good value must not hide the file's bad one.
    monkeypatch.setenv("ISOLATOR_MAX_PIDS", "990")
    result = run("config", "check", str(file), "--json")
    assert result.exit_code == 1
    assert [problem.partition(":")[0] for problem in json.loads(result.stdout)["problems"]] == ["max_pids", "max_pidz"]
    assert os.environ["ISOLATOR_MAX_PIDS"] == "990"
    file.write_text("max_pids = [")
    assert run("config", "check", str(file)).exit_code == 1
    assert run("config", "check", str(folder / "none.toml")).exit_code == 1


def test_config_check_names_misspelt_variables(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("config", "check").exit_code == 0
    monkeypatch.setenv("ISOLATOR_MAX_MEMROY", "1g")
    result = run("config", "check")
    assert result.exit_code == 1
    assert "ISOLATOR_MAX_MEMROY" in result.stdout


def test_the_daemon_does_not_start_on_settings_it_can_not_use(run: Run, folder: Path) -> None:
    (folder / "c.toml").write_text("max_pidz = 77\n")
    result = run("daemon", "--config", str(folder / "c.toml"))
    os.environ.pop("ISOLATOR_CONFIG", None)
    assert result.exit_code == 125
    assert "max_pidz" in result.stderr


# doctor


@pytest.fixture
def engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """What a well-kept Docker Engine says of itself."""
    monkeypatch.setenv("ISOLATOR_DOCKER_SOCKET", str(folder / "d"))
    monkeypatch.setenv("ISOLATOR_STATE_DIR", str(folder))
    monkeypatch.setenv("ISOLATOR_RUNTIME_DIR", str(folder))
    monkeypatch.setenv("ISOLATOR_SECRET_DIR", str(folder / "secrets"))
    with serving(folder / "d") as standin:
        version = {"Version": "29.5.1", "ApiVersion": "1.54", "Components": [{"Name": "runc", "Version": "1.5.0"}]}
        standin.on("GET", "/version", version)
        options = ["name=seccomp,profile=builtin", "name=apparmor", "name=userns"]
        caps = dict.fromkeys(("MemoryLimit", "SwapLimit", "PidsLimit", "CpuCfsQuota", "LiveRestoreEnabled"), True)
        standin.on("GET", "/info", {"SecurityOptions": options, "CgroupVersion": "2", **caps})
        yield standin


def well(server: StandIn) -> None:
    server.path.chmod(0o660)
    image = {"name": "isolator/agent-python", "digest": "sha256:1", "present": True}
    info = {"version": "1", "network": {"status": "proven", "checks": []}, "images": [image], "degraded": []}
    server.on("GET", "/v1/info", info)
    server.on("POST", "/v1/audit/verify", {"ok": True, "entries": 3, "head": "h", "problem": None})


def levels(result: Result) -> dict[str, str]:
    findings = json.loads(result.stdout)["findings"]
    found: dict[str, str] = {}
    for finding in findings:
        order = ("ok", "weak", "broken")
        found[finding["name"]] = max(found.get(finding["name"], "ok"), finding["level"], key=order.index)
    return found


def test_doctor_finds_nothing_broken_on_a_well_kept_host(run: Run, server: StandIn, engine: StandIn) -> None:
    well(server)
    result = run("doctor", "--json")
    found = levels(result)
    assert result.exit_code == 0, result.stdout
    assert json.loads(result.stdout)["ok"] is True
    for name in (
        "engine",
        "caps",
        "engine seccomp",
        "known holes",
        "socket",
        "daemon",
        "network",
        "images",
        "audit log",
    ):
        assert found[name] == "ok", (name, result.stdout)
    assert "0 broken" in run("doctor").stdout


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        (
            "network",
            {"network": {"status": "failed", "checks": [{"name": "dns", "held": False, "detail": "answered"}]}},
        ),
        ("network", {"network": {}}),
        ("images", {"images": []}),
        ("images", {"images": [{"name": "isolator/agent-python", "digest": "sha256:1", "present": False}]}),
        ("images", {"images": [{"name": "isolator/skill", "digest": "sha256:1", "present": True}]}),
    ],
)
def test_doctor_sees_what_the_daemon_says_is_broken(
    run: Run, server: StandIn, engine: StandIn, name: str, spoil: dict[str, object]
) -> None:
    well(server)
    image = {"name": "isolator/agent-python", "digest": "sha256:1", "present": True}
    server.on("GET", "/v1/info", {"version": "1", "network": {"status": "proven"}, "images": [image], **spoil})
    result = run("doctor", "--json")
    assert result.exit_code == 1
    assert levels(result)[name] == "broken"


def test_doctor_sees_a_socket_open_to_all_and_a_broken_record(run: Run, server: StandIn, engine: StandIn) -> None:
    well(server)
    server.path.chmod(0o666)
    server.on("POST", "/v1/audit/verify", {"ok": False, "entries": 3, "head": "h", "problem": "line 2"})
    result = run("doctor", "--json")
    assert result.exit_code == 1
    assert (levels(result)["socket"], levels(result)["audit log"]) == ("broken", "broken")


def test_doctor_sees_what_the_engine_can_not_do(run: Run, server: StandIn, engine: StandIn) -> None:
    well(server)
    engine.on("GET", "/info", {"SecurityOptions": [], "MemoryLimit": False, "PidsLimit": True})
    engine.on("GET", "/version", {"Version": "19.03", "ApiVersion": "1.40"})
    found = levels(run("doctor", "--json"))
    assert (found["caps"], found["engine seccomp"], found["engine"]) == ("broken", "broken", "broken")
    assert found["second lock"] == "weak"


def test_doctor_without_engine_or_daemon(
    run: Run, server: StandIn, engine: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ISOLATOR_DOCKER_SOCKET", "/nonexistent/d")
    monkeypatch.setenv("ISOLATOR_SOCKET", str(tmp_path / "none"))
    result = run("doctor", "--json")
    found = levels(result)
    assert result.exit_code == 1
    assert (found["engine"], found["daemon"], found["images"]) == ("broken", "weak", "broken")
    assert found["audit log"] == "ok"  # there is none yet


def test_doctor_reads_the_record_and_the_pins_itself_when_the_daemon_is_away(
    run: Run, server: StandIn, engine: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isolator.images.lock import write_lock

    digest = "sha256:" + "3" * 64
    write_lock(folder / "images.json", {"isolator/agent-python": digest})
    engine.on("GET", f"/images/{digest}/json", {"Id": digest})
    monkeypatch.setenv("ISOLATOR_SOCKET", str(folder / "none"))
    assert levels(run("doctor", "--json"))["images"] == "ok"
    del engine.routes["GET", f"/images/{digest}/json"]
    assert levels(run("doctor", "--json"))["images"] == "broken"
    (folder / "audit").mkdir()
    (folder / "audit" / "audit.jsonl").write_text('{"seq": 7}\n')
    assert levels(run("doctor", "--json"))["audit log"] == "broken"


@pytest.mark.parametrize(
    ("component", "version", "number"),
    [
        ("runc", "1.1.5+ds1", {"CVE-2024-21626", "CVE-2025-31133", "CVE-2026-41579"}),
        ("runc", "1.1.15", {"CVE-2025-31133", "CVE-2026-41579"}),
        ("runc", "1.2.8", {"CVE-2026-41579"}),
        ("runc", "1.3.2", {"CVE-2025-31133", "CVE-2026-41579"}),
        ("runc", "1.3.6", set()),
        ("runc", "1.4.1", {"CVE-2026-41579"}),
        ("runc", "2.0.0", set()),
        ("engine", "20.10.24+dfsg1", {"CVE-2024-29018", "CVE-2026-41567"}),
        ("engine", "23.0.11", {"CVE-2026-41567"}),
        ("engine", "24.0.9", {"CVE-2024-29018", "CVE-2026-41567"}),
        ("engine", "25.0.5", {"CVE-2026-41567"}),
        ("engine", "28.5.2", {"CVE-2026-41567"}),
        ("engine", "29.5.1", set()),
    ],
)
def test_holes_by_version(component: str, version: str, number: set[str]) -> None:
    parsed = parse_version(version)
    assert parsed is not None
    found = {hole.names.split(",")[0] for hole in HOLES if hole.component == component and hole.concerns(parsed)}
    assert found == number


# text


def test_a_table_that_does_not_fit_is_cut_where_it_may_and_else_told_in_blocks() -> None:
    rows = [("abcdefghjkmnpqrs", "a very long command line that goes on"), ("x", None)]
    whole = table(("ID", "COMMAND"), rows, flexible=(1,))
    assert "goes on" in whole
    narrow = table(("ID", "COMMAND"), rows, flexible=(1,), columns=30)
    assert all(len(line) <= 30 for line in narrow.splitlines())
    assert "…" in narrow
    assert "abcdefghjkmnpqrs" in narrow
    blocks = table(("ID", "COMMAND"), rows, flexible=(1,), columns=20)
    assert blocks.splitlines()[:2] == ["ID: abcdefghjkmnpqrs", "COMMAND: a very long command line that goes on"]


def test_wide_letters_keep_the_columns_aligned() -> None:
    lines = table(("NAME", "X"), [("漢字", "1"), ("e\u0301", "2"), ("ascii", "3")]).splitlines()
    assert [width(line.removesuffix(line[-1])) for line in lines[1:]] == [7, 7, 7]
    assert cut("漢字漢字", 5) == "漢字…"


def test_escape() -> None:
    assert escape("plain é 漢") == "plain é 漢"
    assert escape("a\x1b\n\t\u202e\x7f\x00\udcff") == "a\\x1b\\n\\t\\u202e\\x7f\\x00\\udcff"
    assert escape("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_help_and_ps_load_nothing_heavy() -> None:
    code = (
        "import sys\nfrom isolator.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(*sorted(set(sys.modules) & {'aiohttp', 'pydantic', 'docker', 'tenacity'}), file=sys.stderr)"
    )
    for arguments in (["--help"], ["--socket", "/nonexistent/s", "ps"]):
        ran = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=30, check=True
        )
        assert ran.stderr.splitlines()[-1] == ""
