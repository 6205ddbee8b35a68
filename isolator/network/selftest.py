"""Proof that the engine's networks are as closed as we asked, by trying it from inside at every start.

Engines ignore options they do not know. So three throw-away boxes, built the way every agent is, stand in two
throw-away team networks, and one of them tries the host's addresses, the other team, name resolution and IPv6.
It must fail everywhere, and must reach its own team's other box, or the failure would prove nothing. Until this
passed, and if it did not, no agent with a network is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

import psutil

from isolator.backends.base import Guarantee
from isolator.cancellation import uninterrupted
from isolator.model.agent import timestamp
from isolator.model.errors import IsolatorError, Unavailable

_log = logging.getLogger(__name__)
_RUN_TIMEOUT = 60.0
_RETRY_FIRST = 1.0
_RETRY_MOST = 30.0
_CLEAR_PAUSES = (0.2, 1.0, 3.0)
_PEER_PORT = 8080
_EMBEDDED_RESOLVER = "127.0.0.11"
_SERVE = "import http.server as h; h.ThreadingHTTPServer(('', %d), h.BaseHTTPRequestHandler).serve_forever()"

Status = Literal["pending", "proven", "failed", "unavailable"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried."""

    name: str
    held: bool
    detail: str


@dataclass(frozen=True, slots=True)
class ProofResult:
    """What a run of the self-test found. `checked_at` is Unix time."""

    status: Status
    checks: tuple[Check, ...] = ()
    reason: str | None = None
    checked_at: float | None = None

    def answer(self) -> dict[str, Any]:
        """In JSON, for `info`."""
        return {
            "status": self.status,
            "reason": self.reason,
            "checked_at": timestamp(self.checked_at),
            "checks": [{"name": check.name, "held": check.held, "detail": check.detail} for check in self.checks],
        }


@dataclass(frozen=True, slots=True)
class Laboratory:
    """What the self-test needs of the daemon.

    network(team, try) makes a throw-away network and returns its subnet; run(team, name, argv) builds a box there
    and returns its output once it ended; hold(team, name, argv) builds one and returns its address; clear() removes
    all of it.
    """

    network: Callable[[str], Awaitable[str]]
    hold: Callable[[str, str, list[str]], Awaitable[str]]
    run: Callable[[str, str, list[str]], Awaitable[bytes]]
    clear: Callable[[], Awaitable[None]]


@dataclass(slots=True)
class _Listener:
    """The host's ear: one port, TCP and UDP, IPv4 and IPv6, on every address."""

    port: int
    datagrams: list[str] = field(default_factory=list)


class NetworkProof:
    """The self-test's state, and the gate that spawns wait at."""

    def __init__(self, laboratory: Laboratory, ask_engine: Callable[[], Awaitable[Any]] | None = None) -> None:
        """Nothing is proven yet. `ask_engine` raises while the engine does not answer, so that nobody waits for it."""
        self._laboratory = laboratory
        self._ask_engine = ask_engine
        self.result = ProofResult("pending")
        self._decided = asyncio.Event()
        self._generation = 0
        self._running = asyncio.Lock()

    @property
    def proven(self) -> bool:
        """Whether agents may have a network."""
        return self.result.status == "proven"

    def guarantee(self) -> Guarantee:
        """The network's line on a receipt."""
        if self.result.status == "proven":
            return Guarantee(True, "bridge without host address or way out; tried from inside at start")
        return Guarantee(False, self.result.reason or "not proven yet")

    async def require(self, timeout: float) -> None:
        """Return when the network is proven.

        Raises:
            Unavailable: `network_unproven`, with the reason; `engine_unavailable`, at once.
        """
        end = time.monotonic() + timeout
        while self.result.status == "pending" and (left := end - time.monotonic()) > 0:
            if self._ask_engine is not None:
                await self._ask_engine()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._decided.wait(), left)
        if not self.proven:
            raise Unavailable(
                "network_unproven",
                "This engine's networks are not shown to be closed, so no agent gets one: "
                f"{self.result.reason or 'the self-test has not ended'}. Spawn with network none meanwhile.",
                status_of_proof=self.result.status,
                retry_after=5,
            )

    def forget(self) -> None:
        """The engine changed: what was proven of it no longer holds."""
        self._generation += 1
        self.result = ProofResult("pending")
        # Whoever waits looks again, and hears that the engine is gone.
        self._decided.set()
        self._decided = asyncio.Event()

    async def run_until_decided(self) -> None:
        """Run the self-test; where it could not be run, try again with growing pauses.

        One at a time: two would remove each other's boxes. What was found of an engine that has been forgotten
        since counts for nothing.
        """
        generation = self._generation
        async with self._running:
            await self._run_for(generation)

    async def _run_for(self, generation: int) -> None:
        pause = _RETRY_FIRST
        while generation == self._generation:
            result = await self._attempt()
            if generation != self._generation:
                return
            self.result = result
            self._decided.set()
            if self.result.status in ("proven", "failed"):
                _log.info("network self-test: %s %s", self.result.status, self.result.reason or "")
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _RETRY_MOST)

    async def _attempt(self) -> ProofResult:
        try:
            async with asyncio.timeout(_RUN_TIMEOUT):
                checks = await self._try_everything()
        except (IsolatorError, OSError, TimeoutError, ValueError) as error:
            reason = error.detail if isinstance(error, IsolatorError) else f"{type(error).__name__}: {error}"
            _log.warning("the network self-test could not be run: %s", reason)
            return ProofResult("unavailable", (), f"the self-test could not be run: {reason}", time.time())
        finally:
            await self._clear()
        failed = [check for check in checks if not check.held]
        if failed:
            reason = "; ".join(f"{check.name}: {check.detail}" for check in failed)
            return ProofResult("failed", checks, reason, time.time())
        return ProofResult("proven", checks, None, time.time())

    async def _clear(self) -> None:
        """Also when cancelled, return only when all is cleared: a daemon that ends leaves nothing of the test."""
        for pause in _CLEAR_PAUSES:
            try:
                await uninterrupted(self._laboratory.clear())
            except IsolatorError as error:
                _log.warning("what the network self-test made can't be removed yet: %s", error.detail)
                await asyncio.sleep(pause)
            else:
                return

    async def _try_everything(self) -> tuple[Check, ...]:
        lab, mark = self._laboratory, secrets.token_hex(3)
        mine, theirs = f"selftest-{mark}a", f"selftest-{mark}b"
        serve = ["python3", "-c", _SERVE % _PEER_PORT]
        async with _listening() as listener:
            serve_probe_port = ["python3", "-c", _SERVE % listener.port]
            subnet = await lab.network(mine)
            await lab.network(theirs)
            _, stranger = await _both(lab.hold(mine, "peer", serve), lab.hold(theirs, "stranger", serve_probe_port))
            host = [address for address in _host_addresses() if await _reaches(address, listener.port)]
            gateway = str(next(ipaddress.IPv4Network(subnet).hosts()))
            task = {
                "addresses": [*host, gateway, stranger],
                "port": listener.port,
                "resolvers": [_EMBEDDED_RESOLVER],
                "peer": "peer",
                "peer_port": _PEER_PORT,
            }
            listener.datagrams.clear()
            script = resources.files("isolator.network").joinpath("probe.py").read_text()
            output = await lab.run(mine, "probe", ["python3", "-c", script, json.dumps(task)])
            if not output.strip():
                raise ValueError("the probe said nothing")
            found = json.loads(output.splitlines()[-1])
            heard = sorted(set(listener.datagrams))
        return _judge(found, host, stranger, heard)


async def _both(*work: Awaitable[str]) -> list[str]:
    """The results of both; if one fails, when the other has ended too: a box half-built would outlive the clearing."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await uninterrupted(asyncio.wait(tasks))
        raise


def _judge(found: dict[str, Any], host: list[str], stranger: str, heard: list[str]) -> tuple[Check, ...]:
    """The checks, from what the probe printed and the host heard. An answer that lacks a field fails its check."""
    reached = found.get("reached")
    reached_host = None if reached is None else [address for address in reached if address != stranger]
    inet6, resolved = found.get("inet6"), found.get("resolved")
    return (
        Check("same-team", found.get("peer") is True, "a box of the same team answers by name"),
        Check(
            "host",
            reached_host == [] and not heard and bool(host),
            f"reached {reached_host}, heard from {heard}"
            if reached_host or heard
            else f"{len(host)} host addresses tried",
        ),
        Check(
            "other-team",
            reached is not None and stranger not in reached,
            "another team's box does not answer",
        ),
        Check(
            "dns",
            resolved == [],
            f"answered: {resolved}" if resolved else "no name beyond the team is answered",
        ),
        Check("ipv6", inet6 == [], f"on at {inet6}" if inet6 else "off"),
    )


def _host_addresses() -> list[str]:
    """Every address of the host but loopback's, which each box has for itself."""
    addresses = []
    for interface in psutil.net_if_addrs().values():
        for item in interface:
            if item.family in (socket.AF_INET, socket.AF_INET6):
                address = ipaddress.ip_address(item.address.partition("%")[0])
                if not address.is_loopback and not address.is_link_local:
                    addresses.append(str(address))
    return addresses


async def _reaches(address: str, port: int) -> bool:
    """Whether the host itself reaches its ear there: an address that never answers would prove nothing."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(address, port), 1.0)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


class _Ear(asyncio.DatagramProtocol):
    def __init__(self, listener: _Listener) -> None:
        self._listener = listener

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if data == b"isolator-selftest":
            self._listener.datagrams.append(addr[0])


@contextlib.asynccontextmanager
async def _listening() -> AsyncIterator[_Listener]:
    """Listen on every address of the host for the time of the test; connections are closed unread."""
    loop = asyncio.get_running_loop()

    def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    dual = socket.has_dualstack_ipv6()
    family, everywhere = (socket.AF_INET6, "::") if dual else (socket.AF_INET, "0.0.0.0")  # noqa: S104
    tcp = socket.create_server((everywhere, 0), family=family, dualstack_ipv6=dual)
    port = int(tcp.getsockname()[1])
    udp = socket.socket(family, socket.SOCK_DGRAM)
    if dual:
        udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    udp.setblocking(False)
    udp.bind((everywhere, port))
    listener = _Listener(port)
    server = await asyncio.start_server(hang_up, sock=tcp)
    transport, _ = await loop.create_datagram_endpoint(lambda: _Ear(listener), sock=udp)
    try:
        yield listener
    finally:
        transport.close()
        server.close()
