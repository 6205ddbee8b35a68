"""An agent in a box that waited for it is the agent that would have been built: whatever it was asked to be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import docker
import pytest
from api_helpers import AsUser, assert_problem, open_to_everybody
from attack_helpers import audit_entries, said, team
from conftest import RunningDaemon, running_daemon, wait_for
from engine_helpers import events_of, gone
from pool_helpers import claimed, filled, primed, ran, waiting

pytestmark = pytest.mark.engine

SECRETS = [{"name": "token", "value": "hush\x00hush"}, {"name": "key", "value": "in the dark", "as": "env"}]


@pytest.fixture(scope="module")
def daemon(engine: docker.DockerClient, image_pins: dict[str, str]) -> Iterator[RunningDaemon]:
    """A daemon that keeps a box of each kind."""
    with running_daemon(engine, image_pins, ISOLATOR_POOL_DEPTH="1") as running:
        yield running


@pytest.fixture(scope="module")
def crew(daemon: RunningDaemon) -> str:
    """A team that has spawned."""
    return team(daemon, "pool")


@pytest.fixture(scope="module")
def kind(daemon: RunningDaemon, crew: str) -> str:
    """The profile of its boxes of the default kind, for its workspaces' owner."""
    return primed(daemon, crew, workspace={"source": str(daemon.workspace("first"))})


def names(engine: docker.DockerClient, daemon: RunningDaemon, **labels: str) -> list[str]:
    """Containers of the daemon, as `docker ps --filter` finds them."""
    filters = [f"isolator.instance={daemon.instance}", *(f"{k}={v}" if v else k for k, v in labels.items())]
    found = engine.api.containers(filters={"label": [name.replace("_", ".") for name in filters]})
    return sorted(item["Names"][0].removeprefix("/") for item in found)


def test_everything_that_is_handed_over_arrives(daemon: RunningDaemon, crew: str, kind: str) -> None:
    folder = daemon.workspace("whole")
    (folder / "in").write_text("from the host")
    filled(daemon, kind)
    script = (
        "import json, os, sys\n"
        "open('/workspace/out', 'w').write('from the box')\n"
        "print(json.dumps({'in': open('/workspace/in').read(), 'cwd': os.getcwd(), 'env': dict(os.environ),"
        "'secret': open('/run/secrets/token').read(), 'mode': oct(os.stat('/run/secrets/token').st_mode & 0o777),"
        "'argv': sys.argv[1:]}), flush=True)\n"
        "print('aside', file=sys.stderr, flush=True)\n"
        "sys.exit(7)"
    )
    agent = claimed(
        daemon,
        *("python3", "-c", script, "one", "zwei ü", ""),
        team=crew,
        workspace={"source": str(folder)},
        secrets=SECRETS,
        env={"GIVEN": "value with = and ü"},
        session="chat/1",
    )
    ended = daemon.wait(agent)
    assert (ended["exit"]["code"], ended["exit"]["reason"]) == (7, "exited")
    told = json.loads(daemon.get(f"/v1/agents/{agent['id']}/logs?stream=stdout").content)
    assert daemon.get(f"/v1/agents/{agent['id']}/logs?stream=stderr").content == b"aside\n"
    assert (told["in"], told["cwd"], told["secret"]) == ("from the host", "/workspace", "hush\x00hush")
    assert told["mode"] == "0o400"
    assert told["argv"] == ["one", "zwei ü", ""]
    assert told["env"]["GIVEN"] == "value with = and ü"
    assert told["env"]["KEY"] == "in the dark"
    assert told["env"]["ISOLATOR_AGENT"] == agent["id"] == agent["name"]
    assert (folder / "out").read_text() == "from the box"
    assert (folder / "out").stat().st_uid == 1000
    assert [mount["target"] for mount in agent["mounts"]] == ["/workspace"]
    assert agent["session"] == "chat/1"
    assert "hush" not in daemon.log + json.dumps(audit_entries(daemon))


def test_a_read_only_workspace_is_read_only(daemon: RunningDaemon, crew: str, kind: str) -> None:
    folder = daemon.workspace("read")
    (folder / "in").write_text("look")
    filled(daemon, kind)
    agent = claimed(daemon, "sh", "-c", "cat in; touch new", team=crew, workspace={"source": str(folder), "mode": "ro"})
    assert daemon.wait(agent)["exit"]["code"] == 1
    output = daemon.output(agent)
    assert "look" in output
    assert "Read-only file system" in output
    assert sorted(entry.name for entry in folder.iterdir()) == ["in"]


def test_exec_files_messages_and_stop_work_in_it(daemon: RunningDaemon, crew: str, kind: str, engine) -> None:
    folder = daemon.workspace("used")
    filled(daemon, kind)
    agent = claimed(
        daemon, "sleep", "600", team=crew, workspace={"source": str(folder)}, secrets=SECRETS, env={"GIVEN": "v"}
    )
    path = f"/v1/agents/{agent['id']}"
    assert ran(daemon, agent, "sh", "-c", "echo $GIVEN $KEY; pwd; hostname").splitlines() == [
        "v in the dark",
        "/workspace",
        agent["id"],
    ]
    written = daemon.request("PUT", f"{path}/files/workspace/note", b"by the gateway")
    assert written.status in (200, 201), written.content
    assert ran(daemon, agent, "cat", "note") == "by the gateway"
    assert daemon.get(f"{path}/files/workspace/note").content == b"by the gateway"
    sent = daemon.post(f"{path}/messages", {"type": "task", "body": {"n": 1}})
    assert sent.status in (200, 201, 202), sent.content
    stopped = daemon.delete(f"{path}?grace=5").json
    assert (stopped["state"], stopped["exit"]["signal"]) == ("removed", 15)
    gone(engine, agent)
    assert not (daemon.home / "run" / "agents" / agent["id"]).exists()


def test_docker_ps_tells_waiting_boxes_from_agents(daemon: RunningDaemon, crew: str, kind: str, engine) -> None:
    (box,) = filled(daemon, kind)
    assert f"openclaw-{crew}-pool-{box['id']}" in names(engine, daemon, isolator_pool="", openclaw_team=crew)
    assert box["profile"]
    inspected = engine.api.inspect_container(box["container_id"])
    assert inspected["Config"]["Labels"]["isolator.pool"] == box["profile"]
    assert inspected["Config"]["Cmd"] == []
    agent = claimed(daemon, "sleep", "600", team=crew, workspace={"source": str(daemon.roots / "first")})
    assert (agent["id"], agent["container_id"]) == (box["id"], box["container_id"])
    wait_for(lambda: f"openclaw-{crew}-{agent['id']}" in names(engine, daemon, openclaw_agent=agent["id"]), 5)
    assert box["id"] not in [item["id"] for item in waiting(daemon)]
    daemon.delete(f"/v1/agents/{agent['id']}?grace=0")


@pytest.mark.parametrize("limit", ["wall", "ttl", "idle_ttl"])
def test_its_time_ends_as_any_others(daemon: RunningDaemon, crew: str, kind: str, limit: str) -> None:
    filled(daemon, kind)
    time_of = {"limits": {"wall": 0.3}} if limit == "wall" else {limit: 0.3}
    agent = claimed(daemon, "sleep", "600", team=crew, workspace={"source": str(daemon.roots / "first")}, **time_of)
    time.sleep(0.6)  # whoever looks at it uses it
    ended = daemon.wait(agent)["exit"]
    assert (ended["code"], ended["reason"]) == (137, "wall" if limit == "wall" else "ttl")


def test_an_idempotency_key_finds_the_first_ones_agent(daemon: RunningDaemon, crew: str, kind: str) -> None:
    filled(daemon, kind)
    body = {"team": crew, "command": ["sleep", "600"], "workspace": {"source": str(daemon.roots / "first")}}
    headers = {"Idempotency-Key": "warm"}
    first = daemon.post("/v1/agents", body, headers=headers)
    again = daemon.post("/v1/agents", body, headers=headers)
    assert first.json["warm"] is True
    assert (first.status, again.json["id"]) == (201, first.json["id"])
    other = daemon.post("/v1/agents", {**body, "command": ["true"]}, headers=headers)
    assert_problem(other, 409, "idempotency_key_reused")
    daemon.delete(f"/v1/agents/{first.json['id']}?grace=0")


def test_events_and_audit_are_those_of_a_cold_spawn(daemon: RunningDaemon, crew: str, kind: str) -> None:
    kinds, acts, details = [], [], []
    for warm in (True, False):
        if warm:
            filled(daemon, kind)
        body = {"network": "team"} if warm else {"name": "built"}
        agent = daemon.spawn("true", team=crew, workspace={"source": str(daemon.roots / "first")}, **body)
        assert agent["warm"] is warm
        daemon.wait(agent)
        kinds.append([event["type"] for event in events_of(daemon) if event.get("agent") == agent["id"]])
        entries = [entry for entry in audit_entries(daemon) if entry.get("agent") == agent["id"]]
        acts.append([(entry["kind"], entry["act"], entry.get("result")) for entry in entries])
        details.append(entries[0]["detail"])
    assert kinds[0] == kinds[1] == ["agent.started", "agent.exited"]
    assert acts[0] == acts[1]
    assert acts[0][:2] == [("intent", "agent.spawn", None), ("outcome", "agent.spawn", "done")]
    assert details[0].keys() - details[1].keys() == {"warm"}
    assert details[1].keys() <= details[0].keys()


@pytest.mark.parametrize("program", ["no-such-program", "/etc/passwd"])
def test_a_command_that_can_not_run_is_told_as_cold_and_leaves_nothing(
    daemon: RunningDaemon, crew: str, kind: str, engine, program: str
) -> None:
    (box,) = filled(daemon, kind)
    body = {"team": crew, "command": [program], "workspace": {"source": str(daemon.roots / "first")}}
    warm = daemon.post("/v1/agents", body)
    cold = daemon.post("/v1/agents", {**body, "name": "cold"})
    assert warm.status == cold.status == 400
    assert warm.json == cold.json
    gone(engine, {**box, "id": box["id"]})
    assert not (daemon.home / "run" / "agents" / box["id"]).exists()
    assert daemon.get(f"/v1/agents/{box['id']}").status == 404
    results = [e.get("result") for e in audit_entries(daemon) if e.get("agent") == box["id"]]
    assert results == [None, "failed"]


@pytest.mark.parametrize("case", ["name", "mount", "image", "limits"])
def test_what_no_box_waits_for_is_built_with_the_same_result(
    daemon: RunningDaemon, crew: str, kind: str, case: str
) -> None:
    filled(daemon, kind)
    folder = daemon.roots / f"other-{case}"
    folder.mkdir()
    os.chown(folder, 1000, 1000)
    change = {
        "name": {"name": f"named-{case}"},
        "mount": {"mounts": [{"source": str(folder), "target": "/data"}]},
        "image": {"image": "isolator/skill", "network": "team"},
        "limits": {"limits": {"pids": 77}},
    }[case]
    agent = daemon.spawn(
        *("python3", "-c", "print(open('/workspace/in').read(), end='')"),
        team=crew,
        workspace={"source": str(daemon.roots / "whole")},
        **change,
    )
    assert agent["warm"] is False
    assert daemon.wait(agent)["exit"]["code"] == 0
    assert daemon.output(agent) == "from the host"


def test_a_drained_pool_is_no_refusal_and_is_filled_again(daemon: RunningDaemon, crew: str, kind: str) -> None:
    filled(daemon, kind)
    body = {"team": crew, "workspace": {"source": str(daemon.roots / "first")}}
    agents = [daemon.spawn("sleep", "600", **body) for _ in range(3)]
    assert [agent["warm"] for agent in agents[:1]] == [True]
    assert not all(agent["warm"] for agent in agents)
    assert {agent["state"] for agent in agents} == {"running"}
    assert len({agent["container_id"] for agent in agents}) == 3
    for agent in agents:
        assert ran(daemon, agent, "hostname").strip() == agent["id"]
        daemon.delete(f"/v1/agents/{agent['id']}?grace=0")
    filled(daemon, kind)


def test_agents_find_each_other_by_id(daemon: RunningDaemon, crew: str, kind: str) -> None:
    filled(daemon, kind)
    server = claimed(
        daemon,
        *("python3", "-u", "-m", "http.server", "8000"),
        team=crew,
        workspace={"source": str(daemon.roots / "whole")},
    )
    said(daemon, server, "Serving")
    fetch = f"import urllib.request; print(urllib.request.urlopen('http://{server['id']}:8000/in').read().decode())"
    agent = daemon.spawn("python3", "-c", fetch, team=crew, name="asks")
    assert daemon.wait(agent)["exit"]["code"] == 0, daemon.output(agent)
    assert daemon.output(agent).strip() == "from the host"
    daemon.delete(f"/v1/agents/{server['id']}?grace=0")


def test_deleting_the_team_leaves_nothing(daemon: RunningDaemon, engine) -> None:
    name = team(daemon, "gone")
    primed(daemon, name)
    assert daemon.delete(f"/v1/teams/{name}").status == 200
    assert names(engine, daemon, openclaw_team=name) == []
    assert waiting(daemon, name) == []
    # While boxes are still being made for it, too.
    daemon.spawn("true", team=name)
    assert daemon.delete(f"/v1/teams/{name}").status == 200
    assert names(engine, daemon, openclaw_team=name) == []
    assert engine.networks.list(filters={"label": f"openclaw.team={name}"}) == []


def test_a_box_serves_its_teams_owner_only(daemon: RunningDaemon, as_user: AsUser) -> None:
    open_to_everybody(daemon)
    folders = {uid: daemon.workspace(f"of-{uid}", uid) for uid in (1000, 2000)}
    teams = {uid: team(daemon, f"of-{uid}") for uid in (1000, 2000)}
    with as_user(1000):
        primed(daemon, teams[1000], workspace={"source": str(folders[1000])})
        (box,) = waiting(daemon)
    with as_user(2000):
        assert waiting(daemon) == [], "what waits for others is not theirs to see"
        agent = daemon.spawn("id", "-u", team=teams[2000], workspace={"source": str(folders[2000])})
        assert agent["warm"] is False
        refused = daemon.post("/v1/agents", {"team": teams[1000], "command": ["true"], "create_team": False})
        assert refused.status == 404
        daemon.wait(agent)
        assert daemon.output(agent).strip() == "2000"
    # Root, who may spawn in either team, gets the box of the folder's owner, never that team's other one.
    other = daemon.spawn("id", "-u", team=teams[1000], workspace={"source": str(folders[2000])})
    assert other["warm"] is False
    with as_user(1000):
        assert box["id"] in [item["id"] for item in waiting(daemon, teams[1000])]
        assert claimed(daemon, "true", team=teams[1000], workspace={"source": str(folders[1000])})["id"] == box["id"]


def test_a_folder_its_agent_may_not_enter_is_served_cold(daemon: RunningDaemon) -> None:
    """The engine enters the working folder with rights the agent does not have; nothing in the box could."""
    name, folder = team(daemon, "closed"), daemon.roots / "closed"
    folder.mkdir(mode=0o700)
    body: dict[str, Any] = {"team": name, "workspace": {"source": str(folder)}}
    primed(daemon, name, workspace=body["workspace"])
    agent = daemon.spawn("sh", "-c", "echo here; ls /workspace", **body)
    assert agent["warm"] is False
    assert daemon.wait(agent)["exit"]["code"] == 2
    assert daemon.output(agent).startswith("here")


def test_metrics_count_boxes_and_claims(daemon: RunningDaemon, crew: str, kind: str) -> None:
    def figure(name: str) -> float:
        lines = daemon.get("/metrics").content.decode().splitlines()
        return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    filled(daemon, kind)
    assert figure("isolator_pool_boxes") == len(waiting(daemon))
    before = figure('isolator_claims_total{kind="warm"}'), figure('isolator_claims_total{kind="cold"}')
    claimed(daemon, "true", team=crew, workspace={"source": str(daemon.roots / "first")})
    daemon.spawn("true", team=crew, name="counted")
    after = figure('isolator_claims_total{kind="warm"}'), figure('isolator_claims_total{kind="cold"}')
    assert (after[0] - before[0], after[1] - before[1]) == (1, 1)


def test_a_new_image_is_used_at_once_and_the_old_ones_boxes_go(
    engine: docker.DockerClient, image_pins: dict[str, str], daemon: RunningDaemon
) -> None:
    name, lock = team(daemon, "rebuilt"), daemon.home / "images.json"
    (old,) = filled(daemon, primed(daemon, name, network="none"))
    # Another build of it: the same content under another digest.
    container = engine.containers.create(image_pins["isolator/agent-python"], ["true"])
    try:
        rebuilt = container.commit(conf={"Labels": {"test": daemon.instance}})
    finally:
        container.remove()
    try:
        lock.write_text(json.dumps({**image_pins, "isolator/agent-python": rebuilt.id}))
        first = daemon.spawn("true", team=name, network="none")
        assert (first["warm"], first["image_digest"]) == (False, rebuilt.id)
        (new,) = wait_for(lambda: (f := waiting(daemon, name)) and f[0]["image_digest"] == rebuilt.id and f, 20)
        wait_for(lambda: names(engine, daemon, openclaw_agent=old["id"]) == [], 10)
        assert claimed(daemon, "true", team=name, network="none")["id"] == new["id"]
        assert daemon.delete(f"/v1/teams/{name}").status == 200
    finally:
        lock.write_text(json.dumps(image_pins))
        engine.images.remove(rebuilt.id, force=True)


def test_the_command_line_shows_what_waits(daemon: RunningDaemon, crew: str, kind: str) -> None:
    (box,) = filled(daemon, kind)

    def isolator(*arguments: str) -> str:
        command = [sys.executable, "-m", "isolator", *arguments]
        done = subprocess.run(command, env=daemon.environment(), capture_output=True, text=True, timeout=30, check=True)
        return done.stdout

    table = isolator("ps", "--pool", "--team", crew).splitlines()
    assert table[0].split() == ["ID", "TEAM", "PROFILE", "AGE", "IMAGE", "CONTAINER"]
    assert any(line.split()[:3] == [box["id"], crew, kind] for line in table[1:])
    assert box["id"] not in isolator("ps"), "it is no agent"
    listed = json.loads(isolator("ps", "--pool", "--json"))["items"]
    assert box in listed
    assert box["id"] in isolator("ps", "--pool", "--quiet").split()
    agent = claimed(daemon, "true", team=crew, workspace={"source": str(daemon.roots / "first")})
    assert "waited for it (warm)" in isolator("inspect", agent["id"])
