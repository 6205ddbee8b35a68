"""The world around the agents for the network tests: ears on the host, a container on the engine's own bridge."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import psutil
from attack_helpers import program


def host_addresses() -> list[str]:
    """Every IPv4 and global IPv6 address of the host, every bridge's gateway among them; not loopback."""
    found = []
    for items in psutil.net_if_addrs().values():
        for item in items:
            wanted = item.family == socket.AF_INET or (
                item.family == socket.AF_INET6 and not item.address.startswith(("fe80", "::1"))
            )
            if wanted and not item.address.startswith("127."):
                found.append(item.address.partition("%")[0])
    return found


@contextlib.contextmanager
def ears(address: str = "0.0.0.0") -> Iterator[int]:
    """One port on the host, TCP and UDP (which echoes), on `address`."""
    tcp = socket.create_server((address, 0))
    port = int(tcp.getsockname()[1])
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((address, port))
    stopping = threading.Event()

    def accept() -> None:
        while not stopping.is_set():
            with contextlib.suppress(OSError):
                tcp.accept()[0].close()

    def echo() -> None:
        while not stopping.is_set():
            with contextlib.suppress(OSError):
                data, sender = udp.recvfrom(512)
                udp.sendto(data, sender)

    for link in (tcp, udp):
        link.settimeout(0.2)
    threads = [threading.Thread(target=work, daemon=True) for work in (accept, echo)]
    for thread in threads:
        thread.start()
    try:
        yield port
    finally:
        stopping.set()
        for thread in threads:
            thread.join(2)
        tcp.close()
        udp.close()


@contextlib.contextmanager
def names_answered(address: str) -> Iterator[list[bytes]]:
    """A resolver on the host at `address` port 53 that answers every question with 192.0.2.1; what it was asked."""
    asked: list[bytes] = []
    record = b"\xc0\x0c\x00\x01\x00\x01\x00\x00\x00\x05\x00\x04\xc0\x00\x02\x01"
    stopping = threading.Event()

    def answer() -> None:
        while not stopping.is_set():
            with contextlib.suppress(OSError):
                query, asker = link.recvfrom(512)
                asked.append(query)
                end = query.index(b"\0", 12) + 5
                head = query[:2] + b"\x81\x80\x00\x01\x00\x01\x00\x00\x00\x00"
                link.sendto(head + query[12:end] + record, asker)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        link.bind((address, 53))
        link.settimeout(0.2)
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            yield asked
        finally:
            stopping.set()
            thread.join(2)


def plainly(engine: Any, task: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The same program in an ordinary container, as a twin that shows what an engine allows by default."""
    output = engine.containers.run(
        "isolator/agent-python:latest",
        program("network", task),
        entrypoint=[],
        remove=True,
        cap_drop=["ALL"],
        **options,
    )
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result
