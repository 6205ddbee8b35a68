"""A box that differs from its spec is refused and removed, whoever made it differ.

First the comparison alone, on a real inspect answer with one field weakened at a time. Then a daemon on an engine
that forgets what it was asked, with and without owning up to it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attack_helpers import audit_entries, promised, team
from conftest import RunningDaemon, running_daemon
from forgetful_engine import Forgetful, forgetful_engine

from isolator.backends.docker.compare import compare
from isolator.backends.docker.render import render
from isolator.model.errors import BoxFailed
from isolator.seccomp import load_profile

pytestmark = pytest.mark.engine

Pair = tuple[dict[str, Any], dict[str, Any]]

WEAKENED: dict[str, Any] = {
    "HostConfig.Privileged": True,
    "HostConfig.CapAdd": ["SYS_ADMIN"],
    "HostConfig.CapDrop": [],
    "HostConfig.Devices": [{"PathOnHost": "/dev/sda", "PathInContainer": "/dev/sda", "CgroupPermissions": "rwm"}],
    "HostConfig.DeviceRequests": [{"Driver": "nvidia", "Count": -1}],
    "HostConfig.DeviceCgroupRules": ["a *:* rwm"],
    "HostConfig.Binds": ["/:/host"],
    "HostConfig.VolumesFrom": ["other"],
    "HostConfig.Mounts": [],
    "HostConfig.Tmpfs": {"/tmp": "rw,exec"},
    "HostConfig.PidMode": "host",
    "HostConfig.IpcMode": "host",
    "HostConfig.UTSMode": "host",
    "HostConfig.UsernsMode": "host",
    "HostConfig.CgroupnsMode": "host",
    "HostConfig.CgroupParent": "/elsewhere",
    "HostConfig.NetworkMode": "host",
    "HostConfig.SecurityOpt": ["no-new-privileges:true", "seccomp=unconfined"],
    "HostConfig.ReadonlyRootfs": False,
    "HostConfig.MaskedPaths": [],
    "HostConfig.ReadonlyPaths": None,
    "HostConfig.Memory": 0,
    "HostConfig.MemorySwap": -1,
    "HostConfig.NanoCpus": 0,
    "HostConfig.PidsLimit": None,
    "HostConfig.ShmSize": 2**40,
    "HostConfig.OomKillDisable": True,
    "HostConfig.OomScoreAdj": -999,
    "HostConfig.Ulimits": [{"Name": "core", "Hard": 0, "Soft": 0}],
    "HostConfig.RestartPolicy": {"Name": "always", "MaximumRetryCount": 0},
    "HostConfig.AutoRemove": True,
    "HostConfig.LogConfig": {"Type": "json-file", "Config": {}},
    "HostConfig.Dns": [],
    "HostConfig.DnsOptions": ["ndots:9"],
    "HostConfig.DnsSearch": ["example.org"],
    "HostConfig.ExtraHosts": ["host:host-gateway"],
    "HostConfig.Links": ["/other:/other"],
    "HostConfig.PortBindings": {"80/tcp": [{"HostIp": "", "HostPort": "80"}]},
    "HostConfig.PublishAllPorts": True,
    "HostConfig.GroupAdd": ["0"],
    "HostConfig.Sysctls": {"net.ipv4.ip_forward": "1"},
    "HostConfig.StorageOpt": {"size": "1T"},
    "HostConfig.Runtime": "kata",
    "HostConfig.Init": True,
    "Config.User": "0:0",
    "Config.Entrypoint": ["/bin/sh", "-c"],
    "Config.Cmd": ["evil"],
    "Config.WorkingDir": "/proc/self/fd/8",
    "Config.Image": "sha256:" + "0" * 64,
    "Config.Hostname": "other",
    "Config.Healthcheck": {"Test": ["CMD", "evil"]},
    "Config.StopSignal": "SIGSTOP",
    "Config.Volumes": {"/data": {}},
    "Config.Tty": True,
    "Config.OpenStdin": True,
    "Config.AttachStdin": True,
    "Config.Env": ["LD_PRELOAD=/evil.so"],
    "Config.Labels": {},
    "Mounts": [],
    "NetworkSettings.Networks": {"bridge": {}},
}


@pytest.fixture(scope="module")
def pair(daemon: RunningDaemon, engine) -> Pair:
    """What was asked and what a real engine made of it."""
    folder = daemon.workspace("compared")
    mounts = [{"source": str(daemon.workspace("compared-too")), "target": "/data"}]
    agent = daemon.spawn("sleep", "60", team=team(daemon), workspace={"source": str(folder)}, mounts=mounts)
    found = engine.api.inspect_container(agent["container_id"])
    spec = promised(daemon, agent["id"]).spec
    wanted = render(spec, load_profile().docker_json(), engine.api._version)
    daemon.delete(f"/v1/agents/{agent['id']}?grace=0")
    return wanted, found


def test_what_the_engine_made_is_what_was_asked(pair: Pair) -> None:
    compare(*pair)


@pytest.mark.parametrize("field", WEAKENED)
def test_a_weakened_field_is_found(pair: Pair, field: str) -> None:
    wanted, found = copy.deepcopy(pair)
    *path, last = field.split(".")
    part = found
    for step in path:
        part = part[step]
    part[last] = WEAKENED[field]
    with pytest.raises(BoxFailed) as refused:
        compare(wanted, found)
    assert refused.value.code == "box_mismatch"
    assert refused.value.fields["field"].startswith(field)


def _writable_mount(found: dict[str, Any]) -> None:
    next(mount for mount in found["Mounts"] if mount["Destination"] == "/data")["RW"] = True


def _further_mount(found: dict[str, Any]) -> None:
    found["Mounts"].append({"Type": "volume", "Destination": "/var/lib/x", "RW": True})


def _further_network(found: dict[str, Any]) -> None:
    found["NetworkSettings"]["Networks"]["bridge"] = {}


def _further_variable(found: dict[str, Any]) -> None:
    found["Config"]["Env"].append("LD_PRELOAD=/evil.so")


def _false_label(found: dict[str, Any]) -> None:
    found["Config"]["Labels"]["openclaw.role"] = "lead"


def _shared_propagation(found: dict[str, Any]) -> None:
    found["HostConfig"]["Mounts"][1]["BindOptions"]["Propagation"] = "rshared"


@pytest.mark.parametrize(
    "weaken",
    [_writable_mount, _further_mount, _further_network, _further_variable, _false_label, _shared_propagation],
)
def test_what_is_added_is_found(pair: Pair, weaken: Callable[[dict[str, Any]], None]) -> None:
    wanted, found = copy.deepcopy(pair)
    weaken(found)
    with pytest.raises(BoxFailed, match="box_mismatch"):
        compare(wanted, found)


def test_an_image_label_of_anybody_else_is_no_mismatch(pair: Pair) -> None:
    wanted, found = copy.deepcopy(pair)
    found["Config"]["Labels"]["maintainer"] = "somebody"
    compare(wanted, found)


@pytest.fixture(scope="module")
def forgetful(
    engine, image_pins, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningDaemon, Forgetful]]:
    """A daemon on an engine that can be told to forget."""
    with (
        forgetful_engine(Path(tmp_path_factory.mktemp("engine"))) as proxy,
        running_daemon(engine, image_pins, ISOLATOR_DOCKER_SOCKET=str(proxy.socket)) as running,
    ):
        running.workspace("own")  # its owner, uid 1000, is not the image's own user
        yield running, proxy


def _body(daemon: RunningDaemon) -> dict[str, Any]:
    return {
        "team": team(daemon),
        "command": ["sh", "-c", "echo ran"],
        "workspace": {"source": str(daemon.roots / "own")},
    }


def _refused(forgetful: tuple[RunningDaemon, Forgetful], engine, *fields: str, pretend: bool) -> str:
    """The field a spawn was refused for; nothing of the box may be left."""
    daemon, proxy = forgetful
    proxy.forget, proxy.pretend, proxy.asked = fields, pretend, {}
    try:
        answer = daemon.post("/v1/agents", _body(daemon))
    finally:
        proxy.forget = ()
    assert proxy.asked, "nothing was forgotten"
    assert answer.status == 502, answer.content
    assert answer.json["code"] == "box_mismatch", answer.json
    assert not engine.containers.list(all=True, filters={"label": f"isolator.instance={daemon.instance}"})
    assert not list((daemon.home / "run" / "agents").iterdir())
    outcome = [entry for entry in audit_entries(daemon) if entry.get("act") == "agent.spawn"][-1]
    assert "box_mismatch" in str(outcome)
    field: str = answer.json["field"]
    return field


@pytest.mark.parametrize(
    "field", ["ReadonlyRootfs", "PidsLimit", "SecurityOpt", "CapDrop", "Memory", "MaskedPaths", "CgroupnsMode", "User"]
)
def test_an_engine_that_ignores_an_option_is_found_out_before_the_start(forgetful, engine, field: str) -> None:
    forgotten = (field, "MemorySwap") if field == "Memory" else (field,)
    assert _refused(forgetful, engine, *forgotten, pretend=False).endswith(f".{field}")


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("SecurityOpt", ("NoNewPrivs", "Seccomp")),
        ("CapDrop", ("CapBnd", "CapPrm", "CapEff")),
        ("User", ("CapInh", "CapPrm", "CapEff", "Uid")),
        ("Memory", ("limits.memory",)),
        ("PidsLimit", ("limits.pids",)),
        ("NanoCpus", ("limits.cpus",)),
    ],
)
def test_an_engine_that_lies_is_found_out_by_the_kernel(forgetful, engine, field: str, told: tuple[str, ...]) -> None:
    forgotten = (field, "MemorySwap") if field == "Memory" else (field,)
    assert _refused(forgetful, engine, *forgotten, pretend=True) in told


def test_the_same_engine_that_forgets_nothing_serves(forgetful) -> None:
    daemon, _ = forgetful
    agent = daemon.post("/v1/agents", _body(daemon)).json
    assert daemon.wait(agent)["exit"]["code"] == 0
    assert daemon.output(agent) == "ran\n"
