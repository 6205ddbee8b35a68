"""Metrics for Prometheus, in a registry of this daemon's own."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The daemon's figures. Labels are route patterns and codes, never names or ids."""

    def __init__(self) -> None:
        """All zero."""
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "isolator_requests",
            "API requests answered",
            ["method", "route", "status"],
            registry=self._registry,
        )
        self.spawn_seconds = Histogram(
            "isolator_spawn_seconds",
            "Time from request to running agent",
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10, 30),
            registry=self._registry,
        )
        self.agents = Gauge("isolator_agents", "Agents held, by state", ["state"], registry=self._registry)
        self.teams = Gauge("isolator_teams", "Teams", registry=self._registry)
        self.pool_boxes = Gauge("isolator_pool_boxes", "Boxes that wait for an agent", registry=self._registry)
        self.claims = Counter(
            "isolator_claims",
            "Spawns, by whether a box waited for them (warm) or was built (cold)",
            ["kind"],
            registry=self._registry,
        )
        self._claims: dict[str, int] = {}
        self.engine_up = Gauge("isolator_engine_up", "1 while the engine answers", registry=self._registry)

    def count_claims(self, totals: Mapping[str, int]) -> None:
        """Bring the counter of claims up to these totals."""
        for kind, total in totals.items():
            self.claims.labels(kind).inc(total - self._claims.get(kind, 0))
        self._claims = dict(totals)

    def render(self) -> bytes:
        """The text format."""
        return generate_latest(self._registry)
