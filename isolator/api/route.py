"""What a route is made of. The rows themselves stand in routes.py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from aiohttp import web
from pydantic import BaseModel

from isolator.api.access import Access

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """One row. `answers` maps status to a model, or to a content type for what is not JSON; `query` name to text."""

    method: str
    path: str
    handler: Handler
    access: Access
    summary: str
    answers: dict[int, type[BaseModel] | str]
    body: type[BaseModel] | None = None
    query: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
