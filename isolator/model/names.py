"""Names and ids: lower-case `[a-z0-9-]`, DNS-safe, so that a name is the same text in a label, a hostname, a path."""

from __future__ import annotations

import re
import secrets

from isolator.model.errors import BadRequest

NAME_LENGTH = 40
ID_LENGTH = 64
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?\Z", re.ASCII)
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,511}\Z", re.ASCII)
_AGENT_ID = re.compile(r"[a-z0-9]{16}\Z", re.ASCII)
_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"  # 32 letters without l, o, 0, 1: readable aloud


def check_name(value: str, what: str) -> str:
    """A team's or agent's name, unchanged.

    Raises:
        BadRequest: `name_invalid`; the detail says which characters are allowed.
    """
    if not _NAME.match(value):
        raise BadRequest(
            "name_invalid",
            f"The {what} must be 1 to {NAME_LENGTH} of a-z, 0-9 and -, neither first nor last a -.",
            field=what,
        )
    return value


def check_image_reference(value: str) -> str:
    """An image's name or digest, unchanged. The engine's client makes a path of it, so it must not wander.

    Raises:
        BadRequest: `image_invalid`.
    """
    if not _IMAGE.match(value) or ".." in value or "//" in value:
        raise BadRequest(
            "image_invalid",
            "The image must be a name such as isolator/agent-python, name:tag, or sha256: and 64 hex digits.",
            field="image",
        )
    return value


def is_agent_id(value: str) -> bool:
    """Whether this is the shape of an agent's id."""
    return _AGENT_ID.match(value) is not None


def new_agent_id() -> str:
    """A random id of 80 bits; the first letter is never a digit, so it serves as a hostname anywhere."""
    first = secrets.choice(_ALPHABET[:24])
    return first + "".join(secrets.choice(_ALPHABET) for _ in range(15))
