"""Team networks on the engine: bridges without a way out, and without the host at their end.

`internal` alone leaves every address of the host reachable on the engines in the field; without an address on the
bridge (`inhibit_ipv4`) there is no host to reach. Engines that know the `isolated` gateway mode are asked for that
too; older ones would ignore it silently, so nothing rests on it.
"""

from __future__ import annotations

from typing import Any

import docker
import docker.errors
from docker.types import IPAMConfig, IPAMPool

from isolator.backends.base import BoxNetwork
from isolator.model.errors import Conflict
from isolator.model.team import network_name

_ISOLATED_GATEWAY_SINCE = (1, 48)


def network_options(api_version: str) -> dict[str, str]:
    """The bridge driver's options for this engine."""
    options = {"com.docker.network.bridge.inhibit_ipv4": "true"}
    if tuple(int(part) for part in api_version.split(".")) >= _ISOLATED_GATEWAY_SINCE:
        options["com.docker.network.bridge.gateway_mode_ipv4"] = "isolated"
    return options


def create_network(client: docker.APIClient, *, team: str, subnet: str, labels: dict[str, str]) -> str:
    """The id of the team's network; one of the same instance that exists with this subnet is taken as it is.

    Raises:
        Conflict: `network_taken`, `subnet_taken`.
    """
    name = network_name(team)
    for network in client.networks(names=[name]):
        if network["Name"] != name:
            continue  # the engine's filter matches parts of names
        if (network.get("Labels") or {}).get("isolator.instance") != labels["isolator.instance"]:
            raise Conflict("network_taken", f"Another isolator or person on this engine has a network {name}.")
        _check(network, subnet, client._version)  # noqa: SLF001
        return str(network["Id"])
    try:
        created = client.create_network(
            name,
            driver="bridge",
            internal=True,
            enable_ipv6=False,
            check_duplicate=True,
            options=network_options(client._version),  # noqa: SLF001
            ipam=IPAMConfig(pool_configs=[IPAMPool(subnet=subnet)]),
            labels=labels,
        )
    except docker.errors.APIError as error:
        text = str(error.explanation or "").lower()
        if "overlap" in text or "in use" in text:
            raise Conflict("subnet_taken", f"{subnet} is in use by another network of this engine.") from error
        if "already exists" in text:
            raise Conflict("network_taken", f"Another network {name} appeared on this engine.") from error
        raise
    try:
        _check(client.inspect_network(created["Id"]), subnet, client._version)  # noqa: SLF001
    except Conflict:
        client.remove_network(created["Id"])
        raise
    return str(created["Id"])


def _check(network: dict[str, Any], subnet: str, api_version: str) -> None:
    options = network.get("Options") or {}
    wanted = network_options(api_version)
    pools = [pool.get("Subnet") for pool in (network.get("IPAM") or {}).get("Config") or []]
    right = (
        network.get("Driver") == "bridge"
        and network.get("Internal") is True
        and not network.get("EnableIPv6")
        and all(options.get(key) == value for key, value in wanted.items())
        and pools == [subnet]
    )
    if not right:
        raise Conflict(
            "network_taken",
            f"The network {network.get('Name')} exists but is not closed the way isolator makes it; remove it.",
        )


def network_of(network: dict[str, Any]) -> BoxNetwork:
    """A network from the engine's list answer."""
    pools = (network.get("IPAM") or {}).get("Config") or [{}]
    return BoxNetwork(
        id=network["Id"],
        name=network["Name"],
        team=(network.get("Labels") or {}).get("openclaw.team", ""),
        subnet=str(pools[0].get("Subnet", "")),
        daemon=(network.get("Labels") or {}).get("isolator.daemon", ""),
    )
