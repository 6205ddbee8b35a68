"""Requests in, answers out: strict JSON, RFC 9457 problems, query parameters with bounds."""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

import pydantic
from aiohttp import web

from isolator.model import strict_json
from isolator.model.errors import BadRequest, IsolatorError, TooLarge

Model = TypeVar("Model", bound=pydantic.BaseModel)
_MOST_FLAWS = 8


class RequestTimeout(IsolatorError):
    """The client began a request and did not finish it."""

    status = 408
    title = "Request timeout"


def json_answer(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A JSON response."""
    return web.Response(
        body=json.dumps(body, separators=(",", ":")).encode(),
        status=status,
        content_type="application/json",
        headers=headers,
    )


def problem_answer(error: IsolatorError) -> web.Response:
    """A problem+json response, with the headers that its case wants: Retry-After, Allow, Content-Range."""
    retry = error.fields.get("retry_after")
    allowed = error.fields.get("allowed")
    headers = {} if retry is None else {"Retry-After": str(retry)}
    if isinstance(allowed, list):
        headers["Allow"] = ", ".join(allowed)
    if error.status == 416:
        headers["Content-Range"] = f"bytes */{error.fields['size']}"
    return web.Response(
        body=json.dumps(error.problem()).encode(),
        status=error.status,
        content_type="application/problem+json",
        headers=headers,
    )


async def read_model(request: web.Request, model: type[Model], timeout: float) -> Model:
    """The request's body as `model`.

    Raises:
        TooLarge: `body_too_large`. RequestTimeout: `request_timeout`.
        BadRequest: `encoding_unsupported`, `invalid_json`, `unknown_field`, `invalid_request`.
    """
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise BadRequest("encoding_unsupported", "Bodies are read as they are: send it without Content-Encoding.")
    try:
        body = await asyncio.wait_for(request.read(), timeout)
    except TimeoutError:
        raise RequestTimeout("request_timeout", f"The body did not arrive whole within {timeout:.0f} s.") from None
    except web.HTTPRequestEntityTooLarge as error:
        raise TooLarge(
            "body_too_large",
            f"The body is larger than {request.client_max_size} bytes.",
            limit=request.client_max_size,
        ) from error
    return parse_model(body, model)


def parse_model(body: bytes | str, model: type[Model]) -> Model:
    """A text of strict JSON as `model`.

    Raises:
        BadRequest: `invalid_json`, `unknown_field`, `invalid_request`.
    """
    try:
        data = strict_json.parse(body if isinstance(body, bytes) else body.encode())
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, strict_json.AmbiguousJson) else "it does not parse"
        raise BadRequest("invalid_json", f"The body is not JSON: {reason}.") from error
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as error:
        raise _explain(error) from error


def _explain(error: pydantic.ValidationError) -> BadRequest:
    flaws = []
    unknown = []
    for item in error.errors(include_url=False, include_context=False, include_input=False)[:_MOST_FLAWS]:
        field = ".".join(str(part)[:64] for part in item["loc"])
        flaws.append({"field": field, "message": item["msg"][:200]})
        if item["type"] == "extra_forbidden":
            unknown.append(field)
    if unknown:
        return BadRequest("unknown_field", f"There is no such field: {', '.join(unknown)}.", errors=flaws)
    first = flaws[0]
    where = first["field"] or "the body"
    return BadRequest("invalid_request", f"{where}: {first['message']}.", errors=flaws)


def query_text(request: web.Request, name: str, longest: int = 256) -> str | None:
    """A query parameter as text, None if absent. Raises BadRequest: `invalid_query`."""
    values = request.query.getall(name, [])
    if len(values) > 1:
        raise BadRequest("invalid_query", f"?{name}= stands twice.")
    if not values:
        return None
    if len(values[0]) > longest or not values[0].isprintable():
        raise BadRequest("invalid_query", f"?{name}= must be printable and at most {longest} characters.")
    return values[0]


def query_flag(request: web.Request, name: str, default: bool = False) -> bool:
    """A query parameter as a boolean; present without a value is true."""
    text = query_text(request, name)
    if text is None:
        return default
    if text.lower() in ("", "1", "true", "yes"):
        return True
    if text.lower() in ("0", "false", "no"):
        return False
    raise BadRequest("invalid_query", f"?{name}= must be true or false.")


def query_number(request: web.Request, name: str, low: float, high: float) -> float | None:
    """A query parameter as a number within bounds, None if absent. Raises BadRequest: `invalid_query`."""
    text = query_text(request, name)
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not low <= number <= high:
        raise BadRequest("invalid_query", f"?{name}= must be a number from {low:g} to {high:g}.")
    return number


def check_query(request: web.Request, known: frozenset[str]) -> None:
    """Refuse parameters the route does not have. Raises BadRequest: `invalid_query`."""
    unknown = sorted(set(request.query) - known)
    if unknown:
        raise BadRequest("invalid_query", f"There is no parameter {unknown[0][:64]!r} here.")
