"""A secret reaches its agent and shows up nowhere else: every test uses canaries and searches for them."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attack_helpers import attack, program, said, team
from conftest import RunningDaemon, running_daemon

pytestmark = pytest.mark.engine


def canary() -> str:
    return f"canary-{uuid.uuid4().hex}"


def sha(value: str | bytes) -> str:
    return hashlib.sha256(value if isinstance(value, bytes) else value.encode()).hexdigest()


def forms(value: str) -> list[bytes]:
    """A secret as it might be found: plain, base64, hex."""
    raw = value.encode()
    return [raw, base64.b64encode(raw)[:-4], raw.hex().encode()]


def holders(folder: Path, values: list[str]) -> list[Path]:
    """Files below the folder that hold one of the values in any form."""
    wanted = [form for value in values for form in forms(value)]
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            found += [path for form in wanted if form in data]
    return found


def test_as_a_file_on_a_tmpfs(daemon: RunningDaemon) -> None:
    value = canary() + "\nsecond line \u00fc \n"
    given = [{"name": "api-key", "value": value}, {"name": "Empty.1", "value": ""}]
    seen = attack(daemon, "secrets", "API_KEY", secrets=given)
    assert seen["files"] == {
        "api-key": {"sha256": sha(value), "mode": "0o400", "uid": 10001},
        "Empty.1": {"sha256": sha(""), "mode": "0o400", "uid": 10001},
    }
    assert seen["kind"] == "tmpfs"
    assert seen["folder"] == "0o700"
    assert seen["env"] == {}


def test_as_environment_when_asked(daemon: RunningDaemon) -> None:
    first, second = canary(), canary()
    given = [
        {"name": "api-key", "value": first, "as": "env"},
        {"name": "other", "value": second, "as": "env", "env": "TOKEN"},
    ]
    seen = attack(daemon, "secrets", "API_KEY", "TOKEN", secrets=given)
    assert seen["env"] == {"API_KEY": sha(first), "TOKEN": sha(second)}
    assert seen["files"] == {}


def test_without_secrets_there_are_none(daemon: RunningDaemon) -> None:
    seen = attack(daemon, "secrets")
    assert seen["files"] == {}


def test_a_large_one_arrives_whole(daemon: RunningDaemon) -> None:
    value = canary() * 6000
    assert len(value) <= 262_144
    seen = attack(daemon, "secrets", secrets=[{"name": "large", "value": value}])
    assert seen["files"]["large"]["sha256"] == sha(value)


def test_it_is_nowhere_else(daemon: RunningDaemon, engine) -> None:
    file, variable = canary(), canary()
    given = [{"name": "f", "value": file}, {"name": "v", "value": variable, "as": "env"}]
    agent = daemon.spawn(*program("secrets", "V"), team=team(daemon), secrets=given, env={"STAY": "1"})
    seen = json.loads(said(daemon, agent, "}"))
    assert seen["files"]["f"]["sha256"] == sha(file)
    assert seen["env"]["V"] == sha(variable)
    inspected = json.dumps(engine.api.inspect_container(agent["container_id"]))
    image = json.dumps(engine.api.inspect_image(agent["image_digest"])) + json.dumps(
        engine.api.history(agent["image_digest"])
    )
    told = [
        inspected,
        image,
        json.dumps(agent),
        daemon.get(f"/v1/agents/{agent['id']}").content.decode(),
        daemon.get("/v1/agents").content.decode(),
        daemon.get("/v1/audit?limit=1000").content.decode(),
        daemon.request("GET", "/v1/events?follow=false&after=0").content.decode(),
        daemon.get("/metrics").content.decode(),
        daemon.output(agent),
        engine.api.logs(agent["container_id"]).decode(),
        daemon.log,
        command_lines(),
        json.dumps(engine.api.diff(agent["container_id"])),
    ]
    for value in (file, variable):
        for form in forms(value):
            assert not [text for text in told if form.decode() in text]
    assert holders(daemon.home, [file, variable]) == []
    layers = engine.api.inspect_container(agent["container_id"])["GraphDriver"]["Data"]
    assert holders(Path(layers["UpperDir"]), [file, variable]) == []
    kept = Path(engine.info()["DockerRootDir"]) / "containers" / agent["container_id"]
    assert (kept / "hostconfig.json").is_file()
    assert holders(kept, [file, variable]) == []
    daemon.delete(f"/v1/agents/{agent['id']}?grace=0")
    assert holders(daemon.home, [file, variable]) == []
    # The search finds what is there.
    (daemon.home / "planted").write_text(f"x{file}x")
    assert holders(daemon.home, [file]) == [daemon.home / "planted"]
    (daemon.home / "planted").unlink()


def command_lines() -> str:
    """Arguments of every process on the host."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return "\n".join(found)


def test_failures_do_not_tell_it(daemon: RunningDaemon) -> None:
    value = canary()
    secret = {"name": "s", "value": value}
    bodies: list[dict[str, Any]] = [
        {"command": ["no-such-program"], "secrets": [secret]},
        {"command": ["/etc/passwd"], "secrets": [secret]},
        {"command": ["true"], "secrets": [secret, secret]},
        {"command": ["true"], "secrets": [{**secret, "name": "a/b"}]},
        {"command": ["true"], "secrets": [{**secret, "unknown": value}]},
        {"command": ["true"], "secrets": [{"name": value + "/", "value": value}], "image": "no/such"},
        {"command": ["true"], "secrets": [{"name": "s", "value": [value]}]},
        {"command": ["true"], "secrets": [{"name": "s", "value": value + "x" * 300_000}]},
        {"command": ["true"], "secrets": [{"name": "s", "value": value + "\0", "as": "env"}]},
        {"command": ["true"], "secrets": [{"name": "s", "value": value, "as": "env", "env": "LD_PRELOAD"}]},
        {"command": ["true"], "secrets": [{"name": "s", "value": value, "as": "argument"}]},
        {"command": ["true"], "secrets": [secret], "limits": {"memory": 0}},
        {"command": ["true"], "secrets": {"s": value}},
    ]
    codes = set()
    for body in bodies:
        answer = daemon.post("/v1/agents", {"team": team(daemon), **body})
        assert 400 <= answer.status < 500, (body["command"], answer.content[:300])
        if body["secrets"] != bodies[5]["secrets"]:
            assert value.encode() not in answer.content, answer.content[:500]
        codes.add(answer.json["code"])
    assert {"command_not_found", "command_not_executable", "secret_duplicate", "secret_name_invalid"} <= codes
    assert value not in daemon.log
    assert holders(daemon.home, [value]) == []
    half = json.dumps({"team": team(daemon), "secrets": [secret]}).encode()[:-3]
    broken = daemon.post("/v1/agents", half)
    assert broken.status == 400
    assert value.encode() not in broken.content


@pytest.mark.parametrize(
    "name", ["a/b", "../x", "..", ".hidden", ".", "", "a b", "a\0b", "\u0430pi", "x" * 65, "a\n", "/etc/shadow"]
)
def test_names_that_are_paths_or_worse_are_refused(daemon: RunningDaemon, name: str) -> None:
    answer = daemon.post("/v1/agents", {"team": team(daemon), "command": ["true"], "secrets": [{"name": name}]})
    assert answer.status == 400
    assert answer.json["code"] in ("secret_name_invalid", "invalid_request")


def test_too_many_or_twice_the_same_is_refused(daemon: RunningDaemon) -> None:
    def code(*secrets: Any, **body: Any) -> str:
        answer = daemon.post(
            "/v1/agents", {"team": team(daemon), "command": ["true"], "secrets": list(secrets), **body}
        )
        assert answer.status == 400, answer.content[:300]
        found: str = answer.json["code"]
        return found

    one = {"name": "one", "value": "1"}
    assert code(one, one) == "secret_duplicate"
    assert code({**one, "as": "env"}, {"name": "two", "value": "2", "as": "env", "env": "ONE"}) == "secret_duplicate"
    assert code({**one, "as": "env"}, env={"ONE": "1"}) == "secret_duplicate"
    assert code(*({"name": f"n{number}", "value": ""} for number in range(10_000))) == "invalid_request"
    many = [{"name": f"n{number}", "value": "v"} for number in range(64)]
    assert len(attack(daemon, "secrets", secrets=many)["files"]) == 64


@pytest.fixture
def hosts(daemon: RunningDaemon) -> Path:
    """The host's folder of secrets, as an operator keeps it."""
    folder = daemon.home / "secrets"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def keep(folder: Path, name: str, value: str, mode: int = 0o600, uid: int = 0) -> None:
    path = folder / name
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.write_text(value)
    path.chmod(mode)
    os.chown(path, uid, 0)


def test_from_the_hosts_folder(daemon: RunningDaemon, hosts: Path) -> None:
    value = canary()
    keep(hosts, "kept", value + "\n")
    seen = attack(daemon, "secrets", "KEPT", secrets=["kept"])
    assert seen["files"]["kept"]["sha256"] == sha(value + "\n")
    seen = attack(daemon, "secrets", "KEPT", secrets=[{"name": "kept", "as": "env"}])
    assert seen["env"] == {"KEPT": sha(value)}
    answer = daemon.post("/v1/agents", {"team": team(daemon), "command": ["true"], "secrets": ["absent"]})
    assert (answer.status, answer.json["code"]) == (404, "secret_not_found")


def test_a_file_that_is_not_roots_alone_is_refused(daemon: RunningDaemon, hosts: Path) -> None:
    value = canary()
    keep(hosts, "group-writable", value, 0o660)
    keep(hosts, "group-readable", value, 0o640)
    keep(hosts, "world-readable", value, 0o604)
    keep(hosts, "somebodys", value, 0o600, uid=1000)
    keep(hosts, "good", value)
    (hosts / "linked").symlink_to(hosts / "good")
    (hosts / "away").symlink_to("/etc/shadow")
    os.mkfifo(hosts / "pipe", 0o600)
    (hosts / "folder").mkdir()
    for name in ("group-writable", "group-readable", "world-readable", "somebodys", "linked", "away", "pipe", "folder"):
        answer = daemon.post("/v1/agents", {"team": team(daemon), "command": ["true"], "secrets": [name]})
        assert (answer.status, answer.json["code"]) == (403, "secret_unsafe"), (name, answer.content)
        assert value.encode() not in answer.content
    keep(hosts, "huge", "x" * 300_000)
    answer = daemon.post("/v1/agents", {"team": team(daemon), "command": ["true"], "secrets": ["huge"]})
    assert (answer.status, answer.json["code"]) == (413, "secret_too_large")
    assert attack(daemon, "secrets", secrets=["good"])["files"]["good"]["sha256"] == sha(value)


def test_a_user_gets_their_own_subfolder_only(
    daemon: RunningDaemon, hosts: Path, as_user: Callable[[int], Any]
) -> None:
    daemon.socket.chmod(0o666)
    mine, roots, other = canary(), canary(), canary()
    keep(hosts / "uid-1000", "mine", mine)
    keep(hosts / "uid-2000", "other", other)
    keep(hosts, "roots", roots)
    where = team(daemon, "user")
    with as_user(1000):
        assert attack(daemon, "secrets", team=where, secrets=["mine"])["files"]["mine"]["sha256"] == sha(mine)
        for name in ("roots", "other"):
            answer = daemon.post("/v1/agents", {"team": where, "command": ["true"], "secrets": [name]})
            assert (answer.status, answer.json["code"]) == (404, "secret_not_found"), name
        climbing = daemon.post("/v1/agents", {"team": where, "command": ["true"], "secrets": ["uid-2000/other"]})
        assert climbing.json["code"] == "secret_name_invalid"
    assert attack(daemon, "secrets", secrets=["roots"])["files"]["roots"]["sha256"] == sha(roots)


def test_from_systemd_credentials(engine, image_pins, tmp_path: Path, as_user: Callable[[int], Any]) -> None:
    value = canary()
    keep(tmp_path, "from-systemd", value, 0o400)
    with running_daemon(engine, image_pins, CREDENTIALS_DIRECTORY=str(tmp_path)) as daemon:
        seen = attack(daemon, "secrets", secrets=["from-systemd"])
        assert seen["files"]["from-systemd"]["sha256"] == sha(value)
        daemon.socket.chmod(0o666)
        with as_user(1000):
            answer = daemon.post(
                "/v1/agents", {"team": team(daemon, "u"), "command": ["true"], "secrets": ["from-systemd"]}
            )
            assert (answer.status, answer.json["code"]) == (404, "secret_not_found")
        assert holders(daemon.home, [value]) == []
