"""The Docker backend: builds exactly a BoxSpec on one engine, and reads back what is there."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import docker

from isolator.backends.base import Box, BoxNetwork, BoxState, LogChunk
from isolator.backends.docker.compare import compare
from isolator.backends.docker.engine import Engine
from isolator.backends.docker.networks import create_network, network_of
from isolator.backends.docker.render import render
from isolator.backends.docker.streams import LogStream, iterate
from isolator.model.box import BoxSpec
from isolator.model.errors import Conflict, NotFound, Unavailable
from isolator.model.team import network_name
from isolator.seccomp import SeccompProfile

_FRACTION = re.compile(r"(\.\d{6})\d+")
_STATES: dict[str, BoxState] = {"created": "created", "running": "running", "paused": "running"}


class DockerBackend:
    """One engine, one instance's boxes on it. `profile` is the seccomp profile every box gets."""

    name = "docker"

    def __init__(self, engine: Engine, instance: str, profile: SeccompProfile) -> None:
        """Nothing is asked of the engine yet."""
        self.engine = engine
        self._instance = instance
        self._profile = profile
        self._seccomp_json = profile.docker_json()

    def rendered(self, spec: BoxSpec, api_version: str) -> dict[str, Any]:
        """The create call's body for a spec."""
        if spec.seccomp != self._profile.digest:
            raise Unavailable("seccomp_changed", "The seccomp profile changed while the box was planned; try again.")
        return render(spec, self._seccomp_json, api_version)

    async def create(self, spec: BoxSpec) -> str:
        """Create and compare; a container that differs is removed."""

        def build(client: docker.APIClient) -> str:
            wanted = self.rendered(spec, client._version)  # noqa: SLF001 - the SDK has no public name for it
            created = client.create_container_from_config(wanted, spec.box_name)
            box_id = str(created["Id"])
            try:
                compare(wanted, client.inspect_container(box_id))
            except BaseException:
                client.remove_container(box_id, force=True, v=True)
                raise
            return box_id

        return await self.engine.call(build)

    async def start(self, box_id: str) -> None:
        """Start its PID 1."""
        await self.engine.call(lambda client: client.start(box_id))

    async def inspect(self, box_id: str) -> Box | None:
        """The box, or None."""
        try:
            found = await self.engine.call(lambda client: client.inspect_container(box_id))
        except NotFound:
            return None
        return _box_of_inspect(found)

    async def rename(self, box_id: str, name: str) -> None:
        """Give it the name people see; one that has it already is fine."""

        def rename(client: docker.APIClient) -> None:
            if client.inspect_container(box_id)["Name"] != f"/{name}":
                client.rename(box_id, name)

        with contextlib.suppress(NotFound, Conflict):
            await self.engine.call(rename)

    async def kill(self, box_id: str) -> None:
        """SIGKILL to PID 1, and with it to all."""
        with contextlib.suppress(NotFound, Conflict):
            await self.engine.call(lambda client: client.kill(box_id))

    async def remove(self, box_id: str) -> None:
        """Kill and remove in one call, anonymous volumes too."""

        def remove(client: docker.APIClient) -> None:
            try:
                client.remove_container(box_id, force=True, v=True)
            except docker.errors.APIError as error:
                # 409: the engine is removing it already.
                if error.status_code not in (404, 409):
                    raise

        await self.engine.call(remove)

    async def boxes(self) -> list[Box]:
        """Every container of this instance, from one list call."""
        label = f"isolator.instance={self._instance}"
        filters = {"label": [label, "openclaw.managed=true"]}
        found = await self.engine.call(lambda client: client.containers(all=True, filters=filters))
        return [_box_of_list(item) for item in found]

    async def ensure_network(self, team: str, subnet: str, owner: str, daemon: str = "") -> str:
        """The team's network, created if absent."""
        labels = {
            "openclaw.managed": "true",
            "openclaw.team": team,
            "isolator.instance": self._instance,
            "isolator.owner": owner,
        }
        if daemon:
            labels["isolator.daemon"] = daemon
        return await self.engine.call(lambda client: create_network(client, team=team, subnet=subnet, labels=labels))

    async def remove_network(self, team: str) -> None:
        """Remove the team's network if it is ours."""

        def remove(client: docker.APIClient) -> None:
            for network in client.networks(names=[network_name(team)]):
                if network["Name"] != network_name(team):
                    continue  # the engine's filter matches parts of names: `a` is part of `ab`
                if (network.get("Labels") or {}).get("isolator.instance") == self._instance:
                    with contextlib.suppress(docker.errors.NotFound):
                        client.remove_network(network["Id"])

        await self.engine.call(remove)

    async def networks(self) -> list[BoxNetwork]:
        """Every team network of this instance."""
        filters = {"label": [f"isolator.instance={self._instance}", "openclaw.managed=true"]}
        found = await self.engine.call(lambda client: client.networks(filters=filters))
        return [network_of(item) for item in found]

    async def logs(self, box_id: str, *, follow: bool, tail: int | None) -> AsyncIterator[LogChunk]:
        """Output as it was written; nothing if the box is gone."""

        def open_stream() -> LogStream:
            return LogStream(self.engine.client(), box_id, follow=follow, tail=tail)

        try:
            async for chunk in iterate(open_stream):
                yield chunk
        except NotFound:
            return


def _moment(text: str | None) -> float | None:
    if not text or text.startswith("0001-"):
        return None
    return datetime.fromisoformat(_FRACTION.sub(r"\1", text)).timestamp()


def _box_of_inspect(found: dict[str, Any]) -> Box:
    labels, state = found["Config"]["Labels"] or {}, found["State"]
    return Box(
        id=found["Id"],
        agent=labels.get("openclaw.agent", ""),
        team=labels.get("openclaw.team", ""),
        daemon=labels.get("isolator.daemon", ""),
        spec=labels.get("isolator.spec", ""),
        state=_STATES.get(state["Status"], "exited"),
        pid=state.get("Pid") or None,
        exit_code=state.get("ExitCode"),
        oom_killed=bool(state.get("OOMKilled")),
        created_at=_moment(found.get("Created")) or 0.0,
        started_at=_moment(state.get("StartedAt")),
        finished_at=_moment(state.get("FinishedAt")),
    )


def _box_of_list(item: dict[str, Any]) -> Box:
    labels = item.get("Labels") or {}
    return Box(
        id=item["Id"],
        agent=labels.get("openclaw.agent", ""),
        team=labels.get("openclaw.team", ""),
        daemon=labels.get("isolator.daemon", ""),
        spec=labels.get("isolator.spec", ""),
        state=_STATES.get(item.get("State", ""), "exited"),
        created_at=float(item.get("Created") or 0),
        name=next(iter(item.get("Names") or ()), "").removeprefix("/"),
    )
