"""Agents' records as JSON text and back."""

from __future__ import annotations

import json
from typing import Any

from isolator.model.agent import Agent, Exit
from isolator.model.box import BoxMount, BoxSpec, Scratch, SecretRef, plain
from isolator.model.limits import Limits


def dump_agent(agent: Agent) -> str:
    """One agent as JSON text."""
    return json.dumps(agent, default=plain, separators=(",", ":"))


def load_agent(text: str) -> Agent:
    """One agent from `dump_agent`'s text."""
    record: dict[str, Any] = json.loads(text)
    spec, ending = record.pop("spec"), record.pop("exit")
    warnings = tuple(record.pop("warnings"))
    return Agent(spec=load_spec(spec), exit=None if ending is None else Exit(**ending), warnings=warnings, **record)


def load_spec(spec: dict[str, Any]) -> BoxSpec:
    """A BoxSpec from its JSON form."""
    spec = dict(spec)
    spec["limits"] = Limits(**spec["limits"])
    spec["mounts"] = tuple(BoxMount(**item) for item in spec["mounts"])
    spec["scratch"] = tuple(Scratch(**item) for item in spec["scratch"])
    spec["secrets"] = tuple(SecretRef(**item) for item in spec["secrets"])
    spec["command"] = tuple(spec["command"])
    for pairs in ("environment", "labels"):
        spec[pairs] = tuple((name, value) for name, value in spec[pairs])
    return BoxSpec(**spec)
