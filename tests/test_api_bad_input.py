"""What is not well-formed or can't be had is refused by name, says what to change, and leaves no trace."""

from __future__ import annotations

import json
from typing import Any

import docker
import pytest
from api_helpers import assert_problem, traces
from conftest import RunningDaemon

pytestmark = pytest.mark.engine

INVALID, RANGE = "invalid_request", "limit_out_of_range"


def _many_variables(count: int) -> dict[str, str]:
    return {f"VARIABLE_{number}": "x" for number in range(count)}


# What is added to {"team": "fresh", "command": ["true"]}, the status, the code, a word the answer must hold.
BODIES: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "unknown field": ({"privileged": True}, 400, "unknown_field", "privileged"),
    "unknown nested field": ({"limits": {"cpu": 1}}, 400, "unknown_field", "limits.cpu"),
    "host config": ({"HostConfig": {"Privileged": True}}, 400, "unknown_field", "HostConfig"),
    "bool for a number": ({"limits": {"pids": True}}, 400, INVALID, "limits.pids"),
    "bool for cores": ({"limits": {"cpus": True}}, 400, INVALID, "limits.cpus"),
    "bool for a size": ({"limits": {"memory": True}}, 400, INVALID, "limits.memory"),
    "string for a number": ({"limits": {"pids": "64"}}, 400, INVALID, "limits.pids"),
    "string for cores": ({"limits": {"cpus": "1"}}, 400, INVALID, "limits.cpus"),
    "fraction of a process": ({"limits": {"pids": 64.5}}, 400, INVALID, "limits.pids"),
    "float for a count": ({"limits": {"pids": 64.0}}, 400, INVALID, "limits.pids"),
    "size with a sign": ({"limits": {"memory": "-1"}}, 400, INVALID, "limits.memory"),
    "size in words": ({"limits": {"memory": "lots"}}, 400, INVALID, "limits.memory"),
    "command as text": ({"command": "rm -rf /"}, 400, INVALID, "command"),
    "command of numbers": ({"command": [1, 2]}, 400, INVALID, "command.0"),
    "env as a list": ({"env": ["A=b"]}, 400, INVALID, "env"),
    "env of numbers": ({"env": {"A": 1}}, 400, INVALID, "env.A"),
    "null team": ({"team": None}, 400, INVALID, "team"),
    "cpus 0": ({"limits": {"cpus": 0}}, 400, RANGE, "limits.cpus"),
    "cpus -1": ({"limits": {"cpus": -1}}, 400, RANGE, "limits.cpus"),
    "cpus of a dream": ({"limits": {"cpus": 1e9}}, 400, RANGE, "limits.cpus"),
    "memory 0": ({"limits": {"memory": 0}}, 400, RANGE, "limits.memory"),
    "memory -1": ({"limits": {"memory": -1}}, 400, RANGE, "limits.memory"),
    "memory of 4 petabytes": ({"limits": {"memory": 2**52}}, 400, RANGE, "limits.memory"),
    "memory beyond numbers": ({"limits": {"memory": 10**30}}, 400, INVALID, "limits.memory"),
    "pids 0": ({"limits": {"pids": 0}}, 400, RANGE, "limits.pids"),
    "pids -1": ({"limits": {"pids": -1}}, 400, RANGE, "limits.pids"),
    "pids of 400 digits": ({"limits": {"pids": 10**400}}, 400, RANGE, "limits.pids"),
    "disk 0": ({"limits": {"disk": 0}}, 400, RANGE, "limits.disk"),
    "disk -1": ({"limits": {"disk": -1}}, 400, RANGE, "limits.disk"),
    "nofile 0": ({"limits": {"nofile": 0}}, 400, RANGE, "limits.nofile"),
    "nofile -1": ({"limits": {"nofile": -1}}, 400, RANGE, "limits.nofile"),
    "wall 0": ({"limits": {"wall": 0}}, 400, RANGE, "limits.wall"),
    "wall -1": ({"limits": {"wall": -1}}, 400, RANGE, "limits.wall"),
    "wall of 1e308 s": ({"limits": {"wall": 1e308}}, 400, RANGE, "limits.wall"),
    "ttl 0": ({"ttl": 0}, 400, RANGE, "ttl"),
    "ttl -1": ({"ttl": -1}, 400, RANGE, "ttl"),
    "idle_ttl -1": ({"idle_ttl": -1}, 400, RANGE, "idle_ttl"),
    "cleanup_grace -1": ({"cleanup_grace": -1}, 400, RANGE, "cleanup_grace"),
    "team in capitals": ({"team": "Fresh"}, 400, "name_invalid", "team"),
    "team with a slash": ({"team": "a/b"}, 400, "name_invalid", "team"),
    "team with dots": ({"team": ".."}, 400, "name_invalid", "team"),
    "team with NUL": ({"team": "a\x00b"}, 400, "name_invalid", "team"),
    "team with a newline": ({"team": "fresh\n"}, 400, "name_invalid", "team"),
    "team with a Cyrillic a": ({"team": "te\u0430m"}, 400, "name_invalid", "team"),
    "team of full-width letters": ({"team": "\uff54eam"}, 400, "name_invalid", "team"),
    "team with a leading dash": ({"team": "-team"}, 400, "name_invalid", "team"),
    "team of 41 letters": ({"team": "a" * 41}, 400, "name_invalid", "team"),
    "team of 65 letters": ({"team": "a" * 65}, 400, INVALID, "team"),
    "empty team": ({"team": ""}, 400, INVALID, "team"),
    "name in capitals": ({"name": "Coder"}, 400, "name_invalid", "name"),
    "name with a newline": ({"name": "coder\n"}, 400, "name_invalid", "name"),
    "name with a dot": ({"name": "a.b"}, 400, "name_invalid", "name"),
    "10,000 env entries": ({"env": _many_variables(10_000)}, 400, INVALID, "env"),
    "a megabyte of env": ({"env": {f"V{n}": "x" * 100_000 for n in range(5)}}, 413, "env_too_large", "262144"),
    "LD_PRELOAD": ({"env": {"LD_PRELOAD": "/x.so"}}, 403, "env_name_refused", "LD_PRELOAD"),
    "LD_LIBRARY_PATH": ({"env": {"LD_LIBRARY_PATH": "/x"}}, 403, "env_name_refused", "LD_LIBRARY_PATH"),
    "ISOLATOR_AGENT": ({"env": {"ISOLATOR_AGENT": "me"}}, 403, "env_name_refused", "ISOLATOR_AGENT"),
    "env name with =": ({"env": {"A=B": "c"}}, 400, "env_name_invalid", "A=B"),
    "env name with NUL": ({"env": {"A\x00": "c"}}, 400, "env_name_invalid", "A"),
    "env name with a newline": ({"env": {"A\nLD_PRELOAD": "c"}}, 400, "env_name_invalid", "A"),
    "empty env name": ({"env": {"": "c"}}, 400, "env_name_invalid", "name"),
    "env value with NUL": ({"env": {"A": "b\x00c"}}, 400, "env_value_invalid", "A"),
    "command with NUL": ({"command": ["echo", "a\x00b"]}, 400, "command_invalid", "NUL"),
    "command with an empty program": ({"command": [""]}, 400, "command_invalid", "program"),
    "command of 10,000 arguments": ({"command": ["echo"] * 10_000}, 400, INVALID, "command"),
    "command of 131,073 bytes": ({"command": ["echo", "x" * 65_533, "x" * 65_533]}, 400, "command_too_long", "131072"),
    "one argument of 200 KB": ({"command": ["echo", "x" * 200_000]}, 400, INVALID, "command.1"),
    "command that is absent": ({"command": ["/no/such"]}, 400, "command_not_found", "/no/such"),
    "command that is a folder": ({"command": ["/etc"]}, 400, "command_not_executable", "/etc"),
    "unknown image": ({"image": "no/such"}, 404, "image_not_found", "no/such"),
    "image of ours not built": ({"image": "isolator/none"}, 404, "image_not_found", "isolator/none"),
    "image that wanders": ({"image": "../containers/x"}, 400, "image_invalid", "image"),
    "image with a query": ({"image": "x?all=1"}, 400, "image_invalid", "image"),
    "image with NUL": ({"image": "a\x00b"}, 400, "image_invalid", "image"),
    "image with a space": ({"image": "A B"}, 400, "image_invalid", "image"),
    "image the engine can't read": ({"image": "Upper/Case"}, 400, "image_invalid", "image"),
    "image of 512 letters": ({"image": "a" * 512}, 400, "image_invalid", "image"),
    "image of 600 letters": ({"image": "a" * 600}, 400, INVALID, "image"),
    "skills": ({"skills": ["web-search"]}, 403, "skills_unavailable", "skills"),
    "capabilities": ({"capabilities": ["net:example.org"]}, 403, "capabilities_unavailable", "capabilities"),
    "session with a newline": ({"session": "a\nb"}, 400, "session_invalid", "session"),
    "session of 257 letters": ({"session": "s" * 257}, 400, INVALID, "session"),
    "parent that is absent": ({"parent": "a" * 16}, 404, "agent_not_found", "agent"),
    "parent that is a path": ({"parent": "../x"}, 404, "agent_not_found", "agent"),
    "network of the host": ({"network": "host"}, 400, INVALID, "network"),
    "network of a container": ({"network": "container:x"}, 400, INVALID, "network"),
    "workspace without roots": ({"workspace": {"source": "/etc"}}, 403, "mount_system_folder", "/etc"),
    "workspace that is relative": ({"workspace": {"source": "x"}}, 400, "mount_path_invalid", "absolute"),
    "docker.sock": (
        {"mounts": [{"source": "/var/run/docker.sock", "target": "/d"}]}, 403, "mount_system_folder", "docker.sock",
    ),
    "mount with a foreign mode": ({"mounts": [{"source": "/a", "target": "/b", "mode": "rwx"}]}, 400, INVALID, "mode"),
    "secret that is absent": ({"secrets": ["NO_SUCH"]}, 404, "secret_not_found", "NO_SUCH"),
    "secret named as a path": ({"secrets": ["../shadow"]}, 400, "secret_name_invalid", "shadow"),
    "secret named twice": (
        {"secrets": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}, 400, "secret_duplicate", "A",
    ),
    "team that must exist": ({"create_team": False}, 404, "team_not_found", "fresh"),
}  # fmt: skip

# Whole bodies, as bytes.
RAW: dict[str, tuple[bytes, int, str]] = {
    "empty": (b"", 400, "invalid_json"),
    "not JSON": (b"team=fresh", 400, "invalid_json"),
    "half of it": (b'{"team": "fresh"', 400, "invalid_json"),
    "two of it": (b'{"team": "fresh"} {"team": "fresh"}', 400, "invalid_json"),
    "invalid UTF-8": (b'{"team": "fr\xff"}', 400, "invalid_json"),
    "twice the same key": (b'{"team": "fresh", "team": "other"}', 400, "invalid_json"),
    "twice the same nested key": (b'{"team": "fresh", "limits": {"pids": 5, "pids": 0}}', 400, "invalid_json"),
    "NaN": (b'{"team": "fresh", "ttl": NaN}', 400, "invalid_json"),
    "Infinity": (b'{"team": "fresh", "limits": {"cpus": Infinity}}', 400, "invalid_json"),
    "infinity by exponent": (b'{"team": "fresh", "limits": {"cpus": 1e999}}', 400, INVALID),
    "a number of 5,000 digits": (b'{"team": "fresh", "ttl": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
    "deep nesting": (b"[" * 100_000, 400, "invalid_json"),
    "deep nesting, closed": (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, 400, "invalid_json"),
    "a list": (b"[]", 400, INVALID),
    "a text": (b'"fresh"', 400, INVALID),
    "null": (b"null", 400, INVALID),
    "no team": (b'{"command": ["true"]}', 400, INVALID),
    "half a surrogate in a session": (b'{"team": "fresh", "session": "\\ud800"}', 400, INVALID),
    "half a surrogate in a command": (b'{"team": "fresh", "command": ["\\ud800"]}', 400, INVALID),
    "half a surrogate in an env name": (b'{"team": "fresh", "env": {"\\ud800": ""}}', 400, "env_name_invalid"),
    "half a surrogate in a field": (b'{"team": "fresh", "\\ud800": 1}', 400, INVALID),
    "10 MiB": (b'{"team": "' + b"a" * 10 * 2**20 + b'"}', 413, "body_too_large"),
}


@pytest.mark.parametrize("case", BODIES.values(), ids=BODIES.keys())
def test_a_bad_spawn_is_refused_by_name_and_leaves_nothing(
    daemon: RunningDaemon, engine: docker.DockerClient, case: tuple[dict[str, Any], int, str, str]
) -> None:
    change, status, code, word = case
    before = traces(daemon, engine)
    answer = daemon.post("/v1/agents", {"team": "fresh", "command": ["true"], **change})
    problem = assert_problem(answer, status, code)
    assert word.lower() in json.dumps(problem).lower(), problem
    assert traces(daemon, engine) == before


@pytest.mark.parametrize("case", RAW.values(), ids=RAW.keys())
def test_a_body_that_is_no_request_is_refused_and_leaves_nothing(
    daemon: RunningDaemon, engine: docker.DockerClient, case: tuple[bytes, int, str]
) -> None:
    body, status, code = case
    before = traces(daemon, engine)
    assert_problem(daemon.post("/v1/agents", body), status, code)
    if code in ("invalid_json", "body_too_large"):
        assert_problem(daemon.request("PUT", "/v1/teams/fresh/agents/worker", body), status, code)
        assert_problem(daemon.post("/v1/teams", body), status, code)
    assert traces(daemon, engine) == before


def test_the_same_body_without_the_flaw_is_spawned(daemon: RunningDaemon) -> None:
    ended, output = daemon.run("echo", "well-formed", team="fresh", env={"A": "b"}, session="s", limits={"pids": 64})
    assert (ended["exit"]["code"], output) == (0, "well-formed\n")
    assert daemon.delete("/v1/teams/fresh").status == 200


def test_a_secret_in_a_refused_request_is_not_repeated(daemon: RunningDaemon) -> None:
    secret = "xyzzy-5f1c-do-not-tell"
    for change in (
        {"secrets": [{"name": "A", "value": secret, "as": "nowhere"}]},
        {"secrets": [{"name": "A", "value": secret, "wrong": 1}]},
        {"secrets": [{"name": "A/B", "value": secret}]},
        {"secrets": [{"name": "A", "value": secret, "as": "env", "env": "LD_PRELOAD"}]},
        {"secrets": [{"name": "A", "value": secret}], "command": ["/no/such"]},
    ):
        answer = daemon.post("/v1/agents", {"team": "fresh", "command": ["true"], **change})
        assert 400 <= answer.status < 500
        assert secret not in answer.content.decode()
    assert secret not in daemon.log
    assert secret not in (daemon.home / "state" / "audit" / "audit.jsonl").read_text()


def test_a_foreign_image_is_refused_with_the_digest_to_allow(
    daemon: RunningDaemon, engine: docker.DockerClient, tmp_path_factory: pytest.TempPathFactory
) -> None:
    archive = tmp_path_factory.mktemp("image") / "empty.tar"
    archive.write_bytes(b"\0" * 10_240)
    loaded = engine.api.import_image_from_file(str(archive), repository=f"isolator-foreign-{daemon.instance}")
    digest = json.loads(loaded)["status"]
    try:
        before = traces(daemon, engine)
        for reference in (f"isolator-foreign-{daemon.instance}:latest", digest):
            answer = daemon.post("/v1/agents", {"team": "fresh", "image": reference, "command": ["true"]})
            problem = assert_problem(answer, 403, "image_not_allowed")
            assert problem["digest"] == digest
            assert digest in problem["detail"]
            assert "ISOLATOR_ALLOWED_IMAGES" in problem["detail"]
        assert traces(daemon, engine) == before
    finally:
        engine.images.remove(digest, force=True)
