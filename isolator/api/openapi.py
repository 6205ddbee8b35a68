"""The OpenAPI 3.1 document, made from the route table and the models; nothing in it is written twice."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from isolator import __version__
from isolator.api.answers import Problem
from isolator.api.route import Route

ROUTES: Final = web.AppKey("ROUTES", tuple[Route, ...])
"""The table that an application serves, this document's source."""

_REFERENCE = "#/components/schemas/{model}"
_PATH_PARAMETER = re.compile(r"{(\w+)}")


async def document(request: web.Request) -> web.StreamResponse:
    """GET /v1/openapi.json."""
    routes = request.app[ROUTES]
    return web.Response(body=json.dumps(build(routes)).encode(), content_type="application/json")


def build(routes: tuple[Route, ...]) -> dict[str, Any]:
    """The document for a route table."""
    models: dict[type[BaseModel], str] = {Problem: "serialization"}
    for route in routes:
        if route.body is not None:
            models[route.body] = "validation"
        for status in route.answers:
            for answer in route.answers_of(status):
                if not isinstance(answer, str):
                    models[answer] = "serialization"
    _, schemas = models_json_schema(
        list(models.items()),  # type: ignore[arg-type]
        ref_template=_REFERENCE,
    )
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "isolator",
            "version": __version__,
            "description": "Agents in hardened boxes. The kernel's peer credentials name the caller.",
        },
        "paths": paths,
        "components": {"schemas": schemas.get("$defs", {})},
    }


def _schema(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=model.__name__)}


def _operation(route: Route) -> dict[str, Any]:
    responses: dict[str, Any] = {
        "default": {
            "description": "A refusal",
            "content": {"application/problem+json": {"schema": _schema(Problem)}},
        }
    }
    for status in route.answers:
        responses[str(status)] = {"description": route.summary}
        if content := _content(route.answers_of(status)):
            responses[str(status)]["content"] = content
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _PATH_PARAMETER.findall(route.path)
    ]
    for place, names in (("query", route.query), ("header", route.headers)):
        parameters += [
            {"name": name, "in": place, "required": False, "description": text, "schema": {"type": "string"}}
            for name, text in names.items()
        ]
    operation: dict[str, Any] = {
        "operationId": f"{route.handler.__module__.rsplit('.', 1)[-1]}_{route.handler.__name__}",
        "summary": route.summary,
        "description": f"Access: {route.access.summary}.",
        "parameters": parameters,
        "responses": responses,
    }
    if route.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _schema(route.body)}},
        }
    if route.takes is not None:
        operation["requestBody"] = {"required": True, "content": {route.takes: {}}}
    return operation


def _content(answers: tuple[type[BaseModel] | str, ...]) -> dict[str, Any]:
    """Answers by content type."""
    content: dict[str, Any] = {answer: {} for answer in answers if isinstance(answer, str)}
    if models := [_schema(answer) for answer in answers if not isinstance(answer, str)]:
        content["application/json"] = {"schema": models[0] if len(models) == 1 else {"anyOf": models}}
    return content
