"""Joining what the engine holds with what was promised, at start and whenever the engine comes back.

The engine's labels are the truth about what runs, the store about what was promised; there is no third copy.
What is right is adopted. What is half-made (its spawn was never answered), orphaned or unknown is removed:
containers, networks, staged mounts, sockets. It runs beside the API, never before it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from isolator.agents.builder import BoxBuilder
from isolator.agents.claimer import rename_box
from isolator.agents.events import EventHub
from isolator.agents.lifecycle import Lifecycle
from isolator.agents.teams import Teams
from isolator.audit.log import AuditLog
from isolator.backends.base import Backend, Box
from isolator.model.agent import Agent
from isolator.model.errors import IsolatorError
from isolator.store.store import Store

_log = logging.getLogger(__name__)
_AGAIN = 3.0
_PARALLEL = 4


@dataclass(slots=True)
class Findings:
    """What one run did, by agent or network."""

    adopted: int = 0
    removed: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    networks_removed: list[str] = field(default_factory=list)
    networks_made: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    """What the engine did not let go of: boxes that nobody was promised, agents whose stop was begun."""


class Reconciler:
    """Runs the join. `building` gives ids of boxes under construction, which are left alone."""

    def __init__(
        self,
        store: Store,
        audit: AuditLog,
        events: EventHub,
        backend: Backend,
        builder: BoxBuilder,
        lifecycle: Lifecycle,
        teams: Teams,
        building: Callable[[], set[str]],
        daemon: str,
        runtime_dir: Path,
    ) -> None:
        """`daemon`: this run's boot id; what carries it is not left over."""
        self._store = store
        self._audit = audit
        self._events = events
        self._backend = backend
        self._builder = builder
        self._lifecycle = lifecycle
        self._teams = teams
        self._building = building
        self._daemon = daemon
        self._runtime = runtime_dir
        # Never answered by an earlier daemon, and not undone yet.
        self._half_made: dict[str, Agent] = {}
        self._lock = asyncio.Lock()

    async def load(self) -> None:
        """Hold every promised agent again, before the API opens; those never answered are undone by the next run."""
        for record in await self._store.agents(states=("creating", "running", "stopping", "exited", "lost")):
            if record.state == "creating":
                self._half_made[record.id] = record
            else:
                self._lifecycle.adopt(record)

    async def run_until_done(self, engine_is_up: Callable[[], bool]) -> bool:
        """Run, again and again where it can't be done while the engine is up; whether something is left over."""
        while engine_is_up():
            try:
                findings = await self.run()
            except IsolatorError as error:
                _log.warning("reconcile will run again: %s", error)
                await asyncio.sleep(_AGAIN)
                continue
            return bool(self._half_made or findings.stuck)
        return False

    async def run(self) -> Findings:
        """One join. What the engine does not let go of is left for the next run.

        Raises:
            Unavailable: `engine_unavailable`; run it again when the engine is back.
        """
        async with self._lock:
            findings = Findings()
            boxes = await self._backend.boxes()
            for record in list(self._half_made.values()):
                try:
                    await self._undo(record, boxes, findings)
                except IsolatorError as error:
                    _log.warning("the half-made agent %s can't be undone yet: %s", record.id, error)
            await self._join_agents(boxes, findings)
            await self._remove_orphans(boxes, findings)
            await self._join_networks(findings)
            await self._sweep_host()
        if findings.removed or findings.ended or findings.networks_removed or findings.networks_made:
            await self._audit.note(
                "daemon.reconcile",
                None,
                adopted=findings.adopted,
                removed=findings.removed[:20],
                ended=findings.ended[:20],
                networks_removed=findings.networks_removed[:20],
                networks_made=findings.networks_made[:20],
            )
        await self._events.publish(
            "daemon.reconciled",
            adopted=findings.adopted,
            removed=len(findings.removed),
            ended=len(findings.ended),
            networks_removed=len(findings.networks_removed),
            networks_made=len(findings.networks_made),
        )
        return findings

    async def _undo(self, record: Agent, boxes: list[Box], findings: Findings) -> None:
        for box in boxes:
            if box.agent == record.id:
                await self._backend.remove(box.id)
        await self._builder.discard(record.id)
        await self._store.delete_agent(record.id)
        self._half_made.pop(record.id, None)
        findings.removed.append(record.id)

    async def _join_agents(self, boxes: list[Box], findings: Findings) -> None:
        by_id = {box.id: box for box in boxes}
        gate = asyncio.Semaphore(_PARALLEL)

        async def join(agent_id: str) -> None:
            async with gate:
                await self._join_agent(agent_id, by_id, findings)

        building = self._building()
        await asyncio.gather(
            *(join(live.record.id) for live in self._lifecycle.live() if live.record.id not in building)
        )

    async def _join_agent(self, agent_id: str, boxes: dict[str, Box], findings: Findings) -> None:
        live = self._lifecycle.find(agent_id)
        if live is None:
            return
        record = live.record
        box = boxes.get(record.container_id or "")
        if record.state == "stopping":
            # Its stop was begun and never answered: end it.
            try:
                await self._lifecycle.stop(live, None, 0.0)
            except IsolatorError as error:
                _log.warning("the stop of agent %s is tried again: %s", agent_id, error)
                findings.stuck.append(agent_id)
            else:
                findings.ended.append(agent_id)
        elif (
            record.state == "running"
            and box is not None
            and box.spec not in ("", record.box_digest or record.spec_digest)
        ):
            await self._lifecycle.expire(agent_id, "lost", "Its box does not carry the spec it was promised.")
            findings.ended.append(agent_id)
        elif record.state == "running" and (box is None or box.state != "running"):
            await self._lifecycle.finish(agent_id)
            if live.record.state != "running":
                findings.ended.append(agent_id)
        elif record.state == "running":
            findings.adopted += 1
            if box is not None and record.warm and box.name != record.spec.box_name:
                await rename_box(self._backend, live)  # it was claimed in the moment its daemon was killed

    async def _remove_orphans(self, boxes: list[Box], findings: Findings) -> None:
        for box in boxes:
            live = self._lifecycle.find(box.agent)
            known = live is not None and live.record.container_id in (None, box.id)
            if not known and box.agent not in self._building():
                _log.warning("removing a box nobody was promised: %s of agent %s", box.id[:12], box.agent)
                try:
                    await self._backend.remove(box.id)
                except IsolatorError as error:
                    _log.warning("the box %s stays for now: %s", box.id[:12], error)
                    findings.stuck.append(box.id)
                    continue
                findings.removed.append(box.agent or box.id[:12])

    async def _join_networks(self, findings: Findings) -> None:
        present = await self._backend.networks()
        promised = {team.id: team for team in self._teams.all()}
        for network in present:
            if network.daemon == self._daemon:
                continue
            if network.team not in promised or network.daemon:
                if self._teams.is_creating(network.team):
                    continue
                try:
                    await self._backend.remove_network(network.team)
                except IsolatorError as error:
                    _log.warning("the orphaned network %s stays for now: %s", network.name, error)
                    continue
                findings.networks_removed.append(network.name)
        have = {network.team for network in present}
        for team in promised.values():
            if team.id not in have:
                try:
                    await self._teams.repair(team)
                except IsolatorError as error:
                    _log.warning("the network of team %s can't be made again: %s", team.id, error)
                    continue
                findings.networks_made.append(team.id)

    async def _sweep_host(self) -> None:
        """Remove folders and staged mounts of agents that are no more."""
        for kind in ("agents", "mounts"):
            folder = self._runtime / kind
            if not folder.is_dir():
                continue
            for entry in list(folder.iterdir()):
                if self._lifecycle.find(entry.name) is None and entry.name not in self._building():
                    await self._builder.discard(entry.name)
