"""What the daemon says of its own state: which engine it works with, and what is weaker now than it should be."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from typing import Any

from isolator.backends.docker.engine import Engine
from isolator.model.errors import IsolatorError
from isolator.network.selftest import NetworkProof
from isolator.settings import Settings

_FACTS_LIFE = 30.0


class Condition:
    """Asks the engine now and then, and looks at the rest when it is asked."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        proof: NetworkProof,
        engine_up: Callable[[], bool],
        placing_trouble: Callable[[], str | None],
    ) -> None:
        """`placing_trouble`: why folders can't be made to appear in a box that runs, None if they can."""
        self._placing_trouble = placing_trouble
        self._settings = settings
        self._engine = engine
        self._proof = proof
        self._engine_up = engine_up
        self._facts: tuple[float, dict[str, Any]] = (0.0, {})

    def forget_engine(self) -> None:
        """It was away: it may be another one now."""
        self._facts = (0.0, {})

    async def engine_facts(self) -> dict[str, Any]:
        """Version, API version, kernel and components; nothing while it does not answer."""
        at, facts = self._facts
        if time.monotonic() - at < _FACTS_LIFE and facts:
            return facts
        if not self._engine_up():
            return {}
        try:
            version = await self._engine.version()
        except IsolatorError:
            return {}
        facts = {
            "version": version.get("Version"),
            "api_version": version.get("ApiVersion"),
            "kernel": version.get("KernelVersion") or platform.release(),
            "components": [
                {"name": item.get("Name"), "version": item.get("Version")} for item in version.get("Components") or []
            ],
        }
        self._facts = (time.monotonic(), facts)
        return facts

    def degraded(self) -> list[dict[str, str]]:
        """What is weaker than it should be now, and why."""
        found = []
        if not self._engine_up():
            found.append({"code": "engine_unavailable", "detail": "The Docker Engine does not answer."})
        if self._proof.result.status != "proven":
            reason = self._proof.result.reason or "The self-test has not ended."
            found.append({"code": "network_unproven", "detail": reason})
        trouble = self._placing_trouble()
        if trouble is not None:
            found.append(
                {
                    "code": "pool_unavailable",
                    "detail": f"Ready boxes can't be given a workspace ({trouble}), so agents with one are built for"
                    " each spawn. Under systemd, use the shipped drop-in isolator-pool.conf.",
                }
            )
        if os.geteuid() != 0:
            found.append({"code": "mounts_unavailable", "detail": "The daemon is not root, so it mounts no folders."})
        if self._settings.socket_gid() is None:
            found.append(
                {
                    "code": "socket_group_missing",
                    "detail": f"There is no group {self._settings.socket_group}: only root and the daemon's user"
                    " can connect.",
                }
            )
        return found
