"""BoxSpec: everything about one box, decided before anything is built.

A backend builds exactly this and nothing later adds to it; what the engine then says about the container must
equal it field by field. It holds no secret's value, only names.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from typing import Any, Literal

from isolator.model.limits import Limits

NetworkMode = Literal["team", "none"]
Delivery = Literal["file", "env"]

GUEST_DIR = "/run/isolator"
SECRETS_DIR = "/run/secrets"
WORKSPACE = "/workspace"


@dataclass(frozen=True, slots=True)
class BoxMount:
    """One host folder or file inside the box.

    source: the host path as the caller named it; staged: where isolator bound the opened folder for the engine;
    device, inode: what was opened, compared again inside the started box.
    """

    source: str
    target: str
    read_only: bool
    staged: str
    device: int
    inode: int
    is_folder: bool


@dataclass(frozen=True, slots=True)
class Scratch:
    """One tmpfs: size in bytes, mode as an octal number's value."""

    target: str
    size: int
    mode: int


@dataclass(frozen=True, slots=True)
class SecretRef:
    """A secret's name and how it is handed over; `variable` names the environment variable for delivery "env"."""

    name: str
    delivery: Delivery
    variable: str | None = None


@dataclass(frozen=True, slots=True)
class BoxSpec:
    """One box, whole. Times are seconds, sizes bytes."""

    agent: str
    name: str
    team: str
    owner: str
    instance: str
    session: str | None
    parent: str | None
    image: str
    image_digest: str
    interpreter: str
    guest_source: str
    command: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    working_dir: str
    uid: int
    gid: int
    hostname: str
    limits: Limits
    mounts: tuple[BoxMount, ...]
    scratch: tuple[Scratch, ...]
    network: NetworkMode
    network_name: str | None
    seccomp: str
    secrets: tuple[SecretRef, ...]
    log_max_bytes: int
    ttl: float | None
    idle_ttl: float | None
    cleanup_grace: float
    labels: tuple[tuple[str, str], ...]
    pool: str | None = None
    """The profile's key, of a box that is made before its agent is known."""

    @property
    def box_name(self) -> str:
        """The name people see in `docker ps`: whose it is, and enough of the id to be unique."""
        if self.pool is not None:
            return f"openclaw-{self.team}-pool-{self.agent}"
        if self.name == self.agent:
            return f"openclaw-{self.team}-{self.agent}"
        return f"openclaw-{self.team}-{self.name}-{self.agent[:6]}"

    def meaning(self) -> dict[str, Any]:
        """What the request meant, without what differs from one build of it to the next, in JSON's own types."""
        result: dict[str, Any] = json.loads(json.dumps(self._meaning(), default=plain))
        return result

    def _meaning(self) -> dict[str, Any]:
        whole = plain(self)
        for volatile in ("agent", "labels", "guest_source", "pool"):
            del whole[volatile]
        if self.name == self.agent:
            del whole["name"]
        if self.hostname == self.agent:
            del whole["hostname"]
        whole["environment"] = {name: value for name, value in self.environment if name != "ISOLATOR_AGENT"}
        whole["mounts"] = [plain(mount) for mount in self.mounts]
        for mount in whole["mounts"]:
            for volatile in ("staged", "device", "inode"):
                del mount[volatile]
        return whole

    def digest(self) -> str:
        """`sha256:` of the meaning: two equal requests under equal settings have equal digests."""
        text = json.dumps(self._meaning(), default=plain, sort_keys=True, separators=(",", ":"))
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def plain(record: Any) -> dict[str, Any]:
    """A dataclass's fields by name; `json.dumps(..., default=plain)` writes what `asdict` would, without its copies."""
    return {field.name: getattr(record, field.name) for field in fields(record)}


def differing_fields(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Names of the fields in which two meanings differ, sorted."""
    return sorted(key for key in left.keys() | right.keys() if left.get(key) != right.get(key))
