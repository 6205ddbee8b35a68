"""A message as its receiver gets it, written once and then passed on as bytes; and who can be a receiver."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pydantic

from isolator.model import strict_json
from isolator.model.agent import timestamp
from isolator.model.errors import BadRequest, TooLarge
from isolator.model.message import MessageRequest
from isolator.store.mail import Side

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of messages: bytes, counts, seconds; see docs/limits.md.

    message: one message; mailbox_messages, mailbox_bytes: kept for one receiver; kept_bytes: for all of them;
    rate: messages a second of one agent; ttl: of a message that names none; patience: for the rest of a request.
    """

    message: int = 256 * 1024
    mailbox_messages: int = 256
    mailbox_bytes: int = 4 * 1024**2
    kept_bytes: int = 256 * 1024**2
    rate: float = 200.0
    ttl: float = 300.0
    patience: float = 10.0


@dataclass(frozen=True, slots=True)
class Address:
    """A mailbox: messages to the agent (`agent`), or from it to its gateway (`gateway`)."""

    agent: str
    side: Side


@dataclass(frozen=True, slots=True)
class Envelope:
    """One message. `line` is a JSON object in UTF-8 without a line break in it; `expires_at` is Unix time."""

    id: str
    line: bytes
    expires_at: float


def seal(
    message: MessageRequest, *, number: str, sender: str, receiver: str, sequence: int, now: float, bounds: Bounds
) -> Envelope:
    """The envelope of a message.

    Raises:
        BadRequest: `invalid_json`: its body is no JSON after all. TooLarge: `message_too_large`.
    """
    members = {
        "id": number,
        "from": sender,
        "to": receiver,
        "type": message.type,
        "body": message.body,
        "sent_at": timestamp(now),
        "seq": sequence,
    }
    line = encode(members)
    if len(line) > bounds.message:
        raise too_large(bounds)
    return Envelope(number, line, now + (bounds.ttl if message.ttl is None else message.ttl))


def too_large(bounds: Bounds) -> TooLarge:
    """The refusal of a message over the bound."""
    return TooLarge("message_too_large", f"A message has at most {bounds.message} bytes.", limit=bounds.message)


def encode(members: dict[str, Any]) -> bytes:
    """JSON in UTF-8 on one line.

    Raises:
        BadRequest: `invalid_json`: a number is out of range, a text holds half a surrogate pair, or it is nested
            too deeply.
    """
    try:
        text = _ENCODER.encode(members)
        # Some readers of lines (Node.js' readline) take these two for line breaks.
        return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").encode()
    except (ValueError, RecursionError) as error:
        raise BadRequest(
            "invalid_json", "A number is out of range, a text is no Unicode, or it is nested too deeply."
        ) from error


def read_object(line: bytes) -> dict[str, Any]:
    """One line as a JSON object. Raises BadRequest: `invalid_json`."""
    try:
        value = strict_json.parse(line)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, strict_json.AmbiguousJson) else "it does not parse"
        raise BadRequest("invalid_json", f"The line is no JSON: {reason}.") from error
    if not isinstance(value, dict):
        raise BadRequest("invalid_json", "The line is JSON, but no object.")
    return value


def explain(error: pydantic.ValidationError) -> BadRequest:
    """A model's refusal of a line, as `invalid_request` or `unknown_field`."""
    flaws = error.errors(include_url=False, include_context=False, include_input=False)
    for flaw in flaws:
        if flaw["type"] == "extra_forbidden":
            return BadRequest("unknown_field", f"There is no such field: {str(flaw['loc'][0])[:64]}.")
    where = ".".join(str(part)[:64] for part in flaws[0]["loc"]) or "the message"
    return BadRequest("invalid_request", f"{where}: {flaws[0]['msg'][:200]}.")
