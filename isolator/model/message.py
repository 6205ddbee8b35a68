"""Messages as their senders write them, checked for shape only, and what a report of progress may say.

Whom a message is from is no field: the daemon knows it by the socket.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

GATEWAY = "gateway"
PROGRESS = "progress"
LONGEST_TTL = 86_400
MOST_TEXT = 200
LONGEST_TAG = 128
LARGEST_TAG = 2**53

Kind = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,63}$")]
# delivered: the receiver has it. queued: kept for it. sent: handed to it, not yet acknowledged. unacknowledged: its
# connection ended without a word; it may have it or not. expired, dropped: it never will have it.
State = Literal["delivered", "queued", "sent", "unacknowledged", "expired", "dropped"]


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class MessageRequest(_Wire):
    """A message of the gateway to one agent."""

    type: Kind = Field(description="What kind of message it is; sender and receiver agree on it.")
    body: Any = Field(None, description="Any JSON.")
    ttl: Annotated[float, Field(gt=0, le=LONGEST_TTL)] | None = Field(
        None, description="Seconds it is kept for a receiver that is not there."
    )


class TaggedMessage(MessageRequest):
    """The same on a connection that carries many: `ref` comes back with the answer."""

    ref: Annotated[str, Field(max_length=LONGEST_TAG)] | Annotated[int, Field(ge=0, le=LARGEST_TAG)] | None = None


class AgentMessage(TaggedMessage):
    """A message of an agent: to `gateway`, or to an agent of its own team, by id or name."""

    to: Annotated[str, Field(min_length=1, max_length=64)]


class ProgressReport(_Wire):
    """How far an agent is, by its own word: the body of a message of type `progress` to the gateway."""

    text: Annotated[str, Field(max_length=MOST_TEXT)] | None = None
    fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    elapsed: Annotated[float, Field(ge=0, le=1e9)] | None = None
