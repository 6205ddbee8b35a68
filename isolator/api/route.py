"""What a route is made of. The rows themselves stand in routes.py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from aiohttp import web
from pydantic import BaseModel

from isolator.api.access import Access

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Answer = type[BaseModel] | str | None
_REST = "{path}"


@dataclass(frozen=True, slots=True)
class Route:
    """One row. A parameter named `path` is the rest of the address, slashes and all.

    `answers` maps a status to a model, to a content type for what is not JSON, to several of these, or to None for no
    body. `takes` is the content type of a body that is no JSON. `query` and `headers` map names to what they mean.
    """

    method: str
    path: str
    handler: Handler
    access: Access
    summary: str
    answers: dict[int, Answer | tuple[Answer, ...]]
    body: type[BaseModel] | None = None
    takes: str | None = None
    query: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def pattern(self) -> str:
        """The path as the router wants it."""
        return self.path.replace(_REST, "{path:(?s:.*)}")

    def answers_of(self, status: int) -> tuple[type[BaseModel] | str, ...]:
        """What may come with a status."""
        answer = self.answers[status]
        return tuple(one for one in (answer if isinstance(answer, tuple) else (answer,)) if one is not None)
