"""What the tests of the warm pool share: waiting for boxes, and a spawn that must have found one."""

from __future__ import annotations

import base64
from typing import Any

from conftest import RunningDaemon, wait_for


def waiting(daemon: RunningDaemon, team: str | None = None) -> list[dict[str, Any]]:
    """Boxes that wait, of this team or of all."""
    items: list[dict[str, Any]] = daemon.get("/v1/pool").json["items"]
    return [item for item in items if team in (None, item["team"])]


def filled(daemon: RunningDaemon, kind: str, depth: int = 1) -> list[dict[str, Any]]:
    """The boxes of this profile, once there are as many as the depth says."""

    def found() -> list[dict[str, Any]]:
        boxes = [item for item in waiting(daemon) if item["profile"] == kind]
        return boxes if len(boxes) == depth else []

    return list(wait_for(found, 20, lambda: f"the pool was not filled: {waiting(daemon)}\n{daemon.log[-2000:]}"))


def primed(daemon: RunningDaemon, team: str, depth: int = 1, **body: Any) -> str:
    """Have the pool learn what kind of box is wanted, and wait until it is there; its profile."""
    known = {item["profile"] for item in waiting(daemon, team)}
    first = daemon.spawn("true", team=team, cleanup_grace=0, **body)
    assert first["warm"] is False, "the first of a kind is built"
    new = wait_for(lambda: [b["profile"] for b in waiting(daemon, team) if b["profile"] not in known], 20)
    return str(filled(daemon, new[0], depth)[0]["profile"])


def claimed(daemon: RunningDaemon, *command: str, **body: Any) -> dict[str, Any]:
    """A spawn that found a box waiting."""
    agent = daemon.spawn(*command, **body)
    assert agent["warm"] is True, daemon.log[-2000:]
    return agent


def ran(daemon: RunningDaemon, agent: dict[str, Any], *command: str) -> str:
    """What a command in the agent's box wrote; it must have ended well."""
    answer = daemon.post(f"/v1/agents/{agent['id']}/run", {"command": list(command)})
    assert answer.status == 200, answer.content
    assert answer.json["exit_code"] == 0, answer.json
    return base64.b64decode(answer.json["stdout"]).decode()
