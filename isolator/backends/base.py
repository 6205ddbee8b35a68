"""What a backend is: something that builds exactly a BoxSpec, and says what it enforces.

A backend holds no policy and no record. Everything it is told stands in the spec; everything it knows it reads
from the engine. Whoever writes the next one implements `Backend` and states its `Guarantees`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from isolator.model.box import BoxSpec
from isolator.model.image import ImageFacts

BoxState = Literal["created", "running", "exited"]
Stream = Literal["stdout", "stderr"]


@dataclass(frozen=True, slots=True)
class Guarantee:
    """One promise about every box: whether it is held, and by what."""

    held: bool
    how: str


Guarantees = dict[str, Guarantee]


@dataclass(frozen=True, slots=True)
class Box:
    """One box as the engine knows it: `daemon` is the boot id of its maker, `spec` its spec's digest."""

    id: str
    agent: str
    team: str
    daemon: str
    spec: str
    state: BoxState
    pid: int | None = None
    exit_code: int | None = None
    oom_killed: bool = False
    created_at: float = 0.0
    started_at: float | None = None
    finished_at: float | None = None
    name: str = ""


@dataclass(frozen=True, slots=True)
class BoxNetwork:
    """One team network as the engine knows it. `daemon` is set on the self-test's own: the boot id that made it."""

    id: str
    name: str
    team: str
    subnet: str
    daemon: str = ""


@dataclass(frozen=True, slots=True)
class LogChunk:
    """A piece of an agent's output, as it was written."""

    stream: Stream
    data: bytes


class ImageResolver(Protocol):
    """Which digest may run under an image's name."""

    async def resolve(self, reference: str) -> ImageFacts:
        """The image a spawn names.

        Raises:
            BadRequest: `image_invalid`. NotFound: `image_not_found`.
            Forbidden: `image_not_allowed` (with the digest to allow), `image_unsafe`, `image_unsupported`.
        """

    async def overview(self) -> list[dict[str, Any]]:
        """Pinned images: name, digest, whether the engine has them."""


class Backend(Protocol):
    """Builds boxes. Every method may raise Unavailable (`engine_unavailable`) when the engine does not answer."""

    name: str

    async def create(self, spec: BoxSpec) -> str:
        """Create the box, compare it with its spec, and return its id.

        Raises:
            BoxFailed: `box_mismatch` (what was created is removed), `engine_refused`.
        """

    async def start(self, box_id: str) -> None:
        """Start its PID 1. Raises BoxFailed: `engine_refused`."""

    async def inspect(self, box_id: str) -> Box | None:
        """The box, or None if the engine has none such."""

    async def rename(self, box_id: str, name: str) -> None:
        """Give it the name people see; a box that is gone is fine."""

    async def kill(self, box_id: str) -> None:
        """End every process in it now; a box that has ended or is gone is fine."""

    async def remove(self, box_id: str) -> None:
        """Kill and remove it; one that is gone is fine. `box_id` may be the box's name."""

    async def boxes(self) -> list[Box]:
        """Every box of this instance, in any state."""

    def logs(self, box_id: str, *, follow: bool, tail: int | None) -> AsyncIterator[LogChunk]:
        """The box's output from the oldest kept; `follow` goes on until it ends."""

    async def ensure_network(self, team: str, subnet: str, owner: str, daemon: str = "") -> str:
        """The id of the team's network, created if absent; `daemon` marks one for this run of the daemon only.

        Raises:
            Conflict: `subnet_taken` (try another), `network_taken` (another instance has this team).
        """

    async def remove_network(self, team: str) -> None:
        """Remove it; one that is absent is fine."""

    async def networks(self) -> list[BoxNetwork]:
        """Every team network of this instance."""
