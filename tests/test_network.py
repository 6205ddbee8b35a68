"""An agent reaches its own team by name and nothing else; each "cannot" is shown to be possible elsewhere."""

from __future__ import annotations

import ipaddress
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attack_helpers import PROGRAMS, attack, team
from conftest import RunningDaemon, wait_for
from network_helpers import ears, host_addresses, plainly

pytestmark = pytest.mark.engine

SERVE = "import http.server as h; h.ThreadingHTTPServer(('', 8000), h.SimpleHTTPRequestHandler).serve_forever()"


@pytest.fixture(scope="session")
def docker_compose_command() -> str:
    """Debian's docker-compose, which speaks to this engine."""
    return "docker-compose"


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
def outside(engine, request: pytest.FixtureRequest, docker_compose_project_name: str) -> str:
    """Address of a host on another bridge, which answers HTTP and DNS there."""
    # Compose reads the program from the environment; a dollar sign would be its own.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUTSIDE_PROGRAM", (PROGRAMS / "outside.py").read_text())
        request.getfixturevalue("docker_services")
    label = {"label": f"com.docker.compose.project={docker_compose_project_name}"}
    (container,) = engine.containers.list(filters=label)
    (endpoint,) = container.attrs["NetworkSettings"]["Networks"].values()
    address = str(endpoint["IPAddress"])
    from isolator.network.probe import connects  # noqa: F401

    return address


@pytest.fixture(scope="module")
def neighbours(daemon: RunningDaemon) -> Iterator[dict[str, str]]:
    """A server in the agent's team and one in another; their addresses."""
    addresses = {}
    for name, where in (("friend", team(daemon)), ("stranger", team(daemon, "other"))):
        agent = daemon.spawn("python3", "-c", SERVE, team=where, name=name)
        addresses[name] = _address(agent["pid"], daemon.get(f"/v1/teams/{where}").json["subnet"])
    yield addresses


def _address(pid: int, subnet: str) -> str:
    network = ipaddress.IPv4Network(subnet)
    for word in Path(f"/proc/{pid}/net/fib_trie").read_text().split():
        if word.count(".") == 3 and "/" not in word and ipaddress.IPv4Address(word) in network:
            address = ipaddress.IPv4Address(word)
            if address not in (network.network_address, network.broadcast_address):
                return word
    raise AssertionError("no address")
