"""S3: a burst of 20 spawns. Our side: 20 requests sent at once on 20 open connections, until the last 201.

Raw side: the same 20 bodies created and started by 4 threads, each with a connection of its own.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import docker
from measure import SIDE_COLUMNS, Samples, Table, side_by_side, verdict
from raw_side import spawn_body
from rig import ENGINE_SOCKET, Connection, Rig

TARGET = 1.15
BURST = 20
THREADS = 4


def measure(rig: Rig, rounds: int) -> Table:
    ours, raw = Samples(f"isolator: {BURST} requests at once"), Samples(f"raw: {BURST} by {THREADS} threads")
    clients = [
        docker.APIClient(base_url=f"unix://{ENGINE_SOCKET}", version="auto", timeout=120) for _ in range(THREADS)
    ]
    with ThreadPoolExecutor(THREADS) as threads:
        for _ in range(rounds):
            connections = _opened(rig)
            agents = ours.timed(_our_burst, connections)
            for connection in connections:
                connection.close()
            list(threads.map(partial(_stop, rig), agents))
            bodies = [rig.raw.body() for _ in range(BURST)]
            shares = [bodies[index::THREADS] for index in range(THREADS)]
            made = raw.timed(_raw_burst, rig, threads, clients, shares)
            list(threads.map(rig.raw.remove, made))
    for client in clients:
        client.close()
    return Table(
        "S3",
        f"burst of {BURST} spawns, wall time",
        SIDE_COLUMNS,
        side_by_side((ours, raw), raw),
        (verdict("p50 over raw p50", ours.p50 / raw.p50, TARGET),),
    )


def _opened(rig: Rig) -> list[Connection]:
    """Connections that are open and known to the daemon."""
    connections = [Connection(rig.socket) for _ in range(BURST)]
    for connection in connections:
        connection.ask("GET", "/healthz")
    return connections


def _our_burst(connections: list[Connection]) -> list[str]:
    body = json.dumps(spawn_body()).encode()
    for connection in connections:
        connection.request("POST", "/v1/agents", body)
    agents = []
    for connection in connections:
        response = connection.getresponse()
        content = response.read()
        if response.status != 201:
            raise RuntimeError(f"a spawn of the burst was answered {response.status}: {content[:500]!r}")
        agents.append(json.loads(content)["id"])
    return agents


def _raw_burst(
    rig: Rig, threads: ThreadPoolExecutor, clients: list[docker.APIClient], shares: list[list[dict[str, Any]]]
) -> list[str]:
    def one_share(client: docker.APIClient, share: list[dict[str, Any]]) -> list[str]:
        return [rig.raw.spawn(body, client) for body in share]

    return [container for made in threads.map(one_share, clients, shares) for container in made]


def _stop(rig: Rig, agent: str) -> None:
    connection = Connection(rig.socket)
    try:
        connection.ask("DELETE", f"/v1/agents/{agent}?grace=0")
    finally:
        connection.close()
