"""An agent reaches its own team by name and nothing else; each "cannot" is shown to be possible elsewhere."""

from __future__ import annotations

import contextlib
import ipaddress
import shutil
import socket
import subprocess
import time
import uuid
from pathlib import Path

import docker.types
import pytest
from attack_helpers import attack, team
from conftest import REQUIRE_DOCKER, RunningDaemon, running_daemon, wait_for
from network_helpers import ears, host_addresses, names_answered, plainly

pytestmark = pytest.mark.engine

SERVE = "import http.server as h; h.ThreadingHTTPServer(('', 8000), h.SimpleHTTPRequestHandler).serve_forever()"


@pytest.fixture(scope="session")
def docker_compose_command() -> str:
    """Whichever docker compose there is; Debian's is the one with a dash."""
    if shutil.which("docker-compose"):
        return "docker-compose"
    if shutil.which("docker") and not subprocess.run(["docker", "compose", "version"], check=False).returncode:
        return "docker compose"
    missing = "no docker compose: the host outside can't be brought up; install docker-compose"
    if REQUIRE_DOCKER:
        pytest.fail(missing)
    return pytest.skip(missing)


@pytest.fixture(scope="session")
def docker_compose_file() -> str:
    return str(Path(__file__).parent / "compose" / "docker-compose.yml")


@pytest.fixture(scope="session")
def docker_compose_project_name() -> str:
    return f"isolator-test-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="session")
def docker_setup() -> list[str]:
    return ["up --detach --no-build"]


@pytest.fixture(scope="module")
def outside(engine, docker_services, docker_compose_project_name: str) -> str:
    """Address of a host on another bridge, which answers HTTP and DNS there."""
    label = {"label": f"com.docker.compose.project={docker_compose_project_name}"}
    (container,) = engine.containers.list(filters=label)
    (endpoint,) = container.attrs["NetworkSettings"]["Networks"].values()
    address = str(endpoint["IPAddress"])

    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection((address, 8080), 1):
            return True
        return False

    wait_for(answers, 20, "the host outside does not answer")
    return address


@pytest.fixture(scope="module")
def neighbours(daemon: RunningDaemon) -> dict[str, str]:
    """A server in the agent's team and one in another; their addresses."""
    addresses = {}
    for name, where in (("friend", team(daemon)), ("stranger", team(daemon, "other"))):
        agent = daemon.spawn("python3", "-c", SERVE, team=where, name=name)
        addresses[name] = _address(agent["pid"], daemon.get(f"/v1/teams/{where}").json["subnet"])
    return addresses


def _address(pid: int, subnet: str) -> str:
    network = ipaddress.IPv4Network(subnet)
    for word in Path(f"/proc/{pid}/net/fib_trie").read_text().split():
        if word.count(".") == 3 and "/" not in word and ipaddress.IPv4Address(word) in network:
            address = ipaddress.IPv4Address(word)
            if address not in (network.network_address, network.broadcast_address):
                return word
    raise AssertionError("no address")


def test_the_same_team_is_reached_by_name(daemon: RunningDaemon, neighbours: dict[str, str]) -> None:
    seen = attack(daemon, "network", {"names": ["friend", "stranger"], "tcp": [["friend", 8000]]})
    assert seen["names"]["friend"] == neighbours["friend"]
    assert seen["tcp"]["friend 8000"] == "connected"
    assert seen["names"]["stranger"].startswith("gai")
    assert seen["seconds"]["stranger"] < 4, "a name nobody has must not hold the agent up"


def test_another_team_is_not_reached(daemon: RunningDaemon, neighbours: dict[str, str]) -> None:
    stranger = neighbours["stranger"]
    own = attack(daemon, "network", {"tcp": [[stranger, 8000]]}, team=team(daemon, "other"))
    assert own["tcp"] == {f"{stranger} 8000": "connected"}
    seen = attack(daemon, "network", {"tcp": [[stranger, 8000]], "udp": [[stranger, 8000]]})
    assert "connected" not in seen["tcp"].values()
    assert set(seen["tcp"].values()) | set(seen["udp"].values()) <= {"ENETUNREACH", "EHOSTUNREACH", "timeout"}


def test_no_address_of_the_host_is_reached(daemon: RunningDaemon, engine, outside: str) -> None:
    subnet = daemon.post("/v1/teams", {"id": team(daemon, "own")}).json["subnet"]
    with ears() as port:
        addresses = host_addresses()
        assert len(addresses) >= 3, "the host, its docker bridge and the bridge of the host outside"
        gateway = str(next(ipaddress.IPv4Network(subnet).hosts()))
        targets = [[address, port] for address in (*addresses, gateway)]
        task = {"tcp": targets, "udp": targets}
        plain = plainly(engine, {"tcp": targets[:-1], "udp": targets[:-1]})  # all but the agents' own gateway
        assert {plain["tcp"][f"{address} {port}"] for address in addresses if ":" not in address} == {"connected"}
        assert "echoed" in plain["udp"].values()
        seen = attack(daemon, "network", task, team=team(daemon, "own"))
    assert not {"connected", "echoed", "ECONNREFUSED"} & {*seen["tcp"].values(), *seen["udp"].values()}, seen


def test_services_on_the_hosts_loopback_are_not_reached(daemon: RunningDaemon, engine) -> None:
    with ears("127.0.0.1") as port:
        task = {"tcp": [["127.0.0.1", port], ["localhost", port]], "udp": [["127.0.0.1", port]]}
        plain = plainly(engine, task, network_mode="host")
        assert set(plain["tcp"].values()) == {"connected"}
        for network in ("team", "none"):
            seen = attack(daemon, "network", task, network=network)
            assert set(seen["tcp"].values()) <= {"ECONNREFUSED", "EADDRNOTAVAIL"}  # the latter for ::1
            assert "echoed" not in seen["udp"].values()


def test_the_host_outside_is_not_reached(
    daemon: RunningDaemon, engine, outside: str, docker_compose_project_name: str
) -> None:
    task = {
        "tcp": [[outside, 8080], ["169.254.169.254", 80], ["198.51.100.7", 443]],
        "dns": [[outside, 53, "canary.example"]],
    }
    plain = plainly(engine, task, network=f"{docker_compose_project_name}_elsewhere")
    assert plain["tcp"][f"{outside} 8080"] == "connected"
    assert plain["dns"][f"{outside} 53 canary.example"] == "rcode 0 answers 1"
    seen = attack(daemon, "network", task)
    assert set(seen["tcp"].values()) | set(seen["dns"].values()) <= {
        "ENETUNREACH", "EHOSTUNREACH", "EADDRNOTAVAIL", "ECONNREFUSED", "timeout",
    }, seen  # fmt: skip


def test_a_random_name_is_asked_of_nobody(daemon: RunningDaemon, engine) -> None:
    """DNS carries data out even where TCP does not. The twin is an internal network as engines make it."""
    name = f"{uuid.uuid4().hex}.example.org"
    pool = docker.types.IPAMPool(subnet="10.199.77.0/28", gateway="10.199.77.1")
    plain_network = engine.networks.create(
        f"isolator-test-{uuid.uuid4().hex[:8]}", internal=True, ipam=docker.types.IPAMConfig(pool_configs=[pool])
    )
    try:
        with names_answered("10.199.77.1") as asked:
            task = {"dns": [["127.0.0.11", 53, name]], "names": [name]}
            twin = plainly(engine, task, network=plain_network.name, dns=["10.199.77.1"])
            assert twin["dns"][f"127.0.0.11 53 {name}"] == "rcode 0 answers 1"
            assert twin["names"][name] == "192.0.2.1"
            assert asked
            asked.clear()
            servers = ["127.0.0.11", "127.0.0.1", "10.199.77.1", *host_addresses()]
            everywhere = [[server, 53, name] for server in servers if ":" not in server]
            seen = attack(daemon, "network", {"dns": everywhere, "names": [name]})
            assert asked == []
    finally:
        plain_network.remove()
    assert not [word for word in seen["dns"].values() if word.startswith(("rcode 0", "rcode 3"))], seen["dns"]
    assert seen["names"][name].startswith("gai")
    assert seen["resolv"] == ["nameserver 127.0.0.11"]


def test_sockets_below_tcp_and_udp_and_ipv6_are_closed(daemon: RunningDaemon) -> None:
    seen = attack(daemon, "network", {})
    assert seen["sockets"].pop("tcp") == "opened"
    assert "opened" not in seen["sockets"].values(), seen["sockets"]
    assert set(seen["inet6"]) <= {"lo"}
    assert seen["interfaces"] == ["eth0", "lo"]


def test_network_none_is_loopback_only(daemon: RunningDaemon, engine, neighbours: dict[str, str]) -> None:
    task = {"tcp": [[neighbours["friend"], 8000], ["friend", 8000]], "names": ["friend"]}
    seen = attack(daemon, "network", task, network="none")
    assert seen["interfaces"] == ["lo"]
    assert seen["routes"] == []
    assert "connected" not in seen["tcp"].values()
    script = "import socket as s; e = s.create_server(('127.0.0.1', 0)); s.create_connection(e.getsockname())"
    ended, _ = daemon.run("python3", "-c", script, team=team(daemon), network="none")
    assert ended["exit"]["code"] == 0


def test_a_skill_gets_no_network_unless_asked(daemon: RunningDaemon, engine) -> None:
    wait = ("python3", "-c", "import time; time.sleep(60)")
    skill = daemon.spawn(*wait, team=team(daemon), image="isolator/skill")
    assert skill["network"] == "none"
    assert engine.api.inspect_container(skill["container_id"])["HostConfig"]["NetworkMode"] == "none"
    plain = daemon.spawn("sleep", "60", team=team(daemon))
    assert plain["network"] == "team"
    for agent in (skill, plain):
        daemon.delete(f"/v1/agents/{agent['id']}?grace=0")


def test_an_engine_whose_networks_are_open_serves_none(engine, image_pins, tmp_path: Path) -> None:
    """Without its network options, taken away in its process, the host can be reached, and the daemon must notice."""
    (tmp_path / "sitecustomize.py").write_text(
        "import isolator.backends.docker.networks as n\nn.network_options = lambda version: {}\n"
    )
    with running_daemon(engine, image_pins, start=False, PYTHONPATH=str(tmp_path)) as weak:
        weak.start(proven=False)
        wait_for(lambda: weak.get("/v1/info").json["network"]["status"] == "failed", 60, lambda: weak.log)
        info = weak.get("/v1/info").json
        held = {check["name"]: check["held"] for check in info["network"]["checks"]}
        assert held["host"] is False
        assert held["same-team"] is True
        assert "network_unproven" in [item["code"] for item in info["degraded"]]
        answer = weak.post("/v1/agents", {"team": team(weak), "command": ["true"]})
        assert (answer.status, answer.json["code"]) == (503, "network_unproven")
        assert "host" in answer.json["detail"]
        agent = weak.spawn("sleep", "60", team=team(weak), network="none")
        assert agent["receipt"]["network-isolation"]["held"] is True


def test_no_team_gets_a_subnet_the_host_has_an_address_in(engine, image_pins) -> None:
    """The host answers for its own address on every bridge, so a team around it would reach the host."""
    host = ["ip", "address", "add", "10.198.0.1/32", "dev", "lo"]
    subprocess.run(host, check=True, timeout=10)
    try:
        with running_daemon(engine, image_pins, ISOLATOR_SUBNET_POOL="10.198.0.0/16") as crowded, ears() as port:
            subnet = ipaddress.IPv4Network(crowded.post("/v1/teams", {"id": team(crowded)}).json["subnet"])
            assert ipaddress.IPv4Address("10.198.0.1") not in subnet
            targets = [["10.198.0.1", port]]
            seen = attack(crowded, "network", {"tcp": targets, "udp": targets})
            assert not {"connected", "echoed", "ECONNREFUSED"} & {*seen["tcp"].values(), *seen["udp"].values()}
    finally:
        subprocess.run([*host[:2], "del", *host[3:]], check=True, timeout=10)


def test_a_daemon_stopped_in_the_middle_of_its_self_test_leaves_nothing_of_it(engine, image_pins) -> None:
    """Two boxes of the test are built at once, and both are given up wherever they are."""
    with running_daemon(engine, image_pins, start=False) as hasty:
        for moment in (0.2, 0.5, 0.9, 1.4, 2.2):
            hasty.start(proven=False)
            time.sleep(moment)
            hasty.stop()
            assert hasty.leftovers(engine) == [], f"{moment} s after the start\n{hasty.log}"
