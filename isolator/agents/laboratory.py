"""The self-test's throw-away teams and boxes, built by the same policy and builder as every agent."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from isolator.agents.builder import BoxBuilder
from isolator.agents.channel import Channel, create_folder
from isolator.backends.base import Backend, ImageResolver
from isolator.cancellation import uninterrupted
from isolator.host.addresses import host_networks
from isolator.model.errors import Conflict
from isolator.model.identity import Principal
from isolator.model.names import new_agent_id
from isolator.model.request import EnsureRequest, LimitsRequest
from isolator.model.team import Team
from isolator.network.selftest import Laboratory
from isolator.network.subnets import free_subnet
from isolator.policy.compile import SpawnFacts, compile_box
from isolator.settings import Settings

_PROBE_TIME = 20.0
_SUBNET_TRIES = 64


class SelfTestLaboratory:
    """Makes and removes what one run of the self-test needs."""

    def __init__(
        self,
        settings: Settings,
        backend: Backend,
        builder: BoxBuilder,
        images: ImageResolver,
        facts: Callable[[str], SpawnFacts],
        taken: Callable[[], set[str]],
    ) -> None:
        """`facts(agent id)` with everything but the image; `taken()` the teams' subnets."""
        self._settings = settings
        self._backend = backend
        self._builder = builder
        self._images = images
        self._facts = facts
        self._taken = taken
        self._teams: dict[str, Team] = {}
        self._boxes: dict[str, Channel] = {}

    def laboratory(self) -> Laboratory:
        """The four acts the self-test is made of."""
        return Laboratory(self.network, self.hold, self.run, self.clear)

    def building(self) -> set[str]:
        """Ids of boxes of the test under way."""
        return set(self._boxes)

    async def network(self, team: str) -> str:
        """A throw-away network; its subnet is cut from the end of the pool, away from where teams begin."""
        taken = self._taken() | {item.subnet for item in self._teams.values()} | host_networks()
        for _ in range(_SUBNET_TRIES):
            subnet = free_subnet(self._settings.subnet_pool, self._settings.subnet_prefix, taken)
            try:
                await self._make_network(Team(team, "isolator", subnet, time.time()))
            except Conflict as conflict:
                if conflict.code != "subnet_taken":
                    raise
                taken.add(subnet)
                continue
            return subnet
        raise Conflict("subnet_taken", "no piece of the subnet pool is free on this engine")

    async def _make_network(self, team: Team) -> None:
        """Unless the engine said no, there may be a network, also after a call that it did not answer in time."""
        daemon = self._facts("").daemon
        self._teams[team.id] = team
        try:
            await uninterrupted(self._backend.ensure_network(team.id, team.subnet, team.owner, daemon))
        except Conflict:
            del self._teams[team.id]
            raise

    async def hold(self, team: str, name: str, command: list[str]) -> str:
        """Start a box and return its address in the team's network."""
        _, pid = await self._start(team, name, command, on_exit=lambda *_: None)
        return await asyncio.to_thread(_address_of, pid, self._teams[team].subnet)

    async def run(self, team: str, name: str, command: list[str]) -> bytes:
        """Start a box, wait for its end, and return what it printed."""
        ended = asyncio.Event()
        box_id, _ = await self._start(team, name, command, on_exit=lambda *_: ended.set())
        async with asyncio.timeout(_PROBE_TIME):
            await ended.wait()
            await asyncio.gather(*(channel.bye() for channel in self._boxes.values()))
            await self._builder.until_ended(box_id, _PROBE_TIME)
        output = b""
        async for chunk in self._backend.logs(box_id, follow=False, tail=None):
            output += chunk.data
        return output

    async def _start(
        self, team: str, name: str, command: list[str], on_exit: Callable[[int, int], None]
    ) -> tuple[str, int]:
        agent = new_agent_id()
        image = await self._images.resolve(self._settings.default_image)
        request = EnsureRequest(command=command, network="team", limits=LimitsRequest(memory=128 * 1024**2))
        facts = replace(self._facts(agent), image=image)
        caller = Principal(0, 0, (), 0, is_admin=True)
        spec = compile_box(request, name, caller, self._teams[team], facts, self._settings)
        channel = Channel(self._builder.folder(agent), on_exit=on_exit, on_lost=lambda: None)
        self._boxes[agent] = channel
        await uninterrupted(asyncio.to_thread(create_folder, self._builder.folder(agent)))
        built = await self._builder.build(spec, (), (), channel)
        return built.box_id, built.pid

    async def clear(self) -> None:
        """Remove every box and network of the test; what the engine keeps is left to the next time, or to reconcile.

        By their labels, not by what is remembered: an engine that hung may have made, after an earlier clearing, what
        it was asked for before.

        Raises:
            IsolatorError: the engine's reason; something is left.
        """
        daemon = self._facts("").daemon
        networks = {network.team for network in await self._backend.networks() if network.daemon == daemon}
        for box in await self._backend.boxes():
            if box.agent in self._boxes or (box.daemon == daemon and box.team in networks):
                await self._backend.remove(box.id)
        for agent, channel in self._boxes.items():
            channel.close()
            await self._builder.discard(agent)
        self._boxes.clear()
        for team in networks | set(self._teams):
            await self._backend.remove_network(team)
            self._teams.pop(team, None)


def _address_of(pid: int, subnet: str) -> str:
    """The box's own address, read from its network namespace's table of local addresses."""
    network = ipaddress.IPv4Network(subnet)
    for word in Path(f"/proc/{pid}/net/fib_trie").read_text().split():
        with contextlib.suppress(ValueError):
            address = ipaddress.IPv4Address(word)
            if address in network and address not in (network.network_address, network.broadcast_address):
                return str(address)
    raise ValueError("the box has no address in its team's network")
