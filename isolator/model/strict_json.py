"""JSON read strictly: what could mean two things to two readers is refused."""

from __future__ import annotations

import json
from typing import Any


class AmbiguousJson(ValueError):
    """JSON that parses but means two things, or a number that JSON does not have."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise AmbiguousJson("a member's name stands twice in one object")
    return result


def _no_constants(name: str) -> Any:
    raise AmbiguousJson(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constants)


def parse(text: bytes) -> Any:
    """A text's value.

    Raises:
        ValueError: it is no UTF-8 or no JSON, or ambiguous (AmbiguousJson). RecursionError: it is nested too deeply.
    """
    return _DECODER.decode(text.decode())
