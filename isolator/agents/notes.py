"""What is kept and told of a spawn beside its spec: a retry's digest, warnings, the audit's summary. Pure."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence

from isolator.host.folders import HeldFolder
from isolator.model.box import WORKSPACE, BoxSpec
from isolator.model.event import Event
from isolator.model.request import SpawnRequest


def request_digest(request: SpawnRequest) -> str:
    """What a retry must repeat. Secrets' values are left out: a stored hash of one could be guessed at."""
    body = request.model_dump(mode="json", by_alias=True)
    for secret in body["secrets"]:
        secret.pop("value", None)
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def warnings_of(spec: BoxSpec, held: Sequence[HeldFolder]) -> tuple[dict[str, str], ...]:
    """What a person should know about a box that is nevertheless built."""
    warnings = []
    for folder in held:
        opened = folder.opened
        if opened.plan.target == WORKSPACE and not opened.plan.read_only and opened.uid != spec.uid:
            warnings.append(
                {
                    "code": "workspace_not_owned",
                    "detail": f"{opened.plan.source} belongs to uid {opened.uid}, but agents never run as root or as"
                    f" somebody their caller is not: it runs as uid {spec.uid} and may be unable to write there.",
                }
            )
    return tuple(warnings)


def started_event(spec: BoxSpec) -> Event:
    """The event of a spawn that was done, not stored yet."""
    data = {"name": spec.name, "image": spec.image}
    return Event(0, time.time(), "agent.started", spec.owner, spec.team, spec.agent, data)


def summary_of(spec: BoxSpec, digest: str) -> dict[str, object]:
    """What the audit log keeps of a spec and its digest. Arguments may hold anything: only the program is named."""
    return {
        "name": spec.name,
        "image": spec.image,
        "digest": spec.image_digest,
        "spec": digest,
        "program": spec.command[0] if spec.command else None,
        "arguments": len(spec.command),
        "network": spec.network,
        "uid": spec.uid,
        "mounts": [f"{m.source}:{m.target}:{'ro' if m.read_only else 'rw'}" for m in spec.mounts],
        "secrets": [secret.name for secret in spec.secrets],
        "session": spec.session,
        "parent": spec.parent,
    }
