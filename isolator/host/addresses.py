"""Which IPv4 networks the host itself stands in.

A team's subnet must overlap none of them. A bridge without an address is closed only as long as the host holds no
address in its subnet by another interface: it would answer for that one on every bridge it has.
Accepted miss: an address the host is given later (a VPN coming up) is seen by new teams only.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket

import psutil


def host_networks() -> set[str]:
    """The networks of all of the host's interfaces but loopback's own range, in CIDR form."""
    networks = set()
    for addresses in psutil.net_if_addrs().values():
        for item in addresses:
            if item.family != socket.AF_INET:
                continue
            with contextlib.suppress(ValueError):
                network = ipaddress.IPv4Network((item.address, item.netmask or "255.255.255.255"), strict=False)
                if not network.is_loopback:
                    networks.add(str(network))
    return networks
