"""Runs inside a throw-away box of the self-test: tries everything a team's network must not allow.

Given on its command line: JSON with `addresses` (the host's and the other team's), `port` (TCP and UDP there),
`resolvers`, `peer` and `peer_port` (a box of the same team, which must answer). Prints one line of JSON.
"""

import json
import os
import socket
import struct
import sys
import threading
import time

TIMEOUT = 1.0


def connects(address: str, port: int) -> bool:
    """Whether a TCP connection comes to stand."""
    try:
        with socket.create_connection((address, port), TIMEOUT):
            return True
    except OSError:
        return False


def comes_up(address: str, port: int) -> bool:
    """Whether a connection stands within some seconds: the other box may still be starting its server."""
    for _ in range(20):
        if connects(address, port):
            return True
        time.sleep(0.25)
    return False


def sends(address: str, port: int) -> None:
    """Send one datagram; only its receiver can tell whether it came through."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"isolator-selftest", (address, port))
    except OSError:
        pass


def resolves(server: str) -> bool:
    """Whether somebody beyond the engine's own resolver answered for a name nobody has."""
    labels = (os.urandom(12).hex(), "isolator-selftest", "example")
    name = b"".join(bytes((len(label),)) + label.encode() for label in labels) + b"\x00"
    query = struct.pack(">HHHHHH", 0x4953, 0x0100, 1, 0, 0, 0) + name + struct.pack(">HH", 1, 1)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
            asker.settimeout(2 * TIMEOUT)
            asker.sendto(query, (server, 53))
            answer = asker.recv(512)
    except OSError:
        return False
    code = answer[3] & 0x0F if len(answer) > 3 else 2
    # NOERROR and NXDOMAIN are answers of a resolver that was asked; SERVFAIL and REFUSED are no answer.
    return code in (0, 3)


def interfaces_with_inet6() -> list[str]:
    """Interfaces other than loopback that have an IPv6 address."""
    try:
        with open("/proc/net/if_inet6") as file:  # noqa: PTH123
            return [line.split()[-1] for line in file if line.split()[-1] != "lo"]
    except OSError:
        return []


def main() -> None:
    """Try all at once and print what succeeded."""
    task = json.loads(sys.argv[1])
    reached: list[str] = []

    def attempt(address: str) -> None:
        sends(address, task["port"])
        if connects(address, task["port"]):
            reached.append(address)

    threads = [threading.Thread(target=attempt, args=(address,)) for address in task["addresses"]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(
        json.dumps(
            {
                "reached": sorted(reached),
                "peer": comes_up(task["peer"], task["peer_port"]),
                "resolved": [server for server in task["resolvers"] if resolves(server)],
                "inet6": interfaces_with_inet6(),
            }
        ),
        flush=True,
    )


main()
