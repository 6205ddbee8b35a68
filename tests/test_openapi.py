"""The OpenAPI document is the route table, valid, and what the daemon really does; a fuzzer finds nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import docker
import pydantic
import pytest
import requests
import schemathesis
from conftest import RunningDaemon, running_daemon
from docker.transport import UnixHTTPAdapter
from hypothesis import HealthCheck, Phase, settings
from schemathesis import checks, openapi
from schemathesis.specs.openapi import checks as conformance

from isolator.api import answers
from isolator.api.openapi import build
from isolator.api.routes import ROUTES
from isolator.api.server import build_application
from isolator.settings import Settings

DOCUMENT = build(ROUTES)
METHODS = {"get", "put", "post", "delete", "patch", "head", "options", "trace"}


def test_the_document_lists_exactly_the_route_table() -> None:
    listed = {
        (method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in item if method in METHODS
    }
    assert listed == {(route.method, route.path) for route in ROUTES}
    assert len(listed) == len(ROUTES)


def test_the_application_serves_exactly_the_route_table() -> None:
    parts: Any = SimpleNamespace(settings=Settings())
    served = {
        (route.method, route.resource.canonical)
        for route in build_application(parts).router.routes()
        if route.resource is not None
    }
    assert served == {(route.method, route.path) for route in ROUTES}


def test_every_operation_states_its_rule_and_its_answers() -> None:
    names = set()
    for path, item in DOCUMENT["paths"].items():
        for operation in item.values():
            names.add(operation["operationId"])
            assert operation["description"].startswith("Access: ")
            assert "application/problem+json" in operation["responses"]["default"]["content"]
            assert any(status == "101" or status.startswith("2") for status in operation["responses"])
            declared = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "path"}
            assert declared == {part.strip("{}") for part in path.split("/") if part.startswith("{")}
    assert len(names) == len(ROUTES)


def test_every_reference_leads_somewhere() -> None:
    schemas = DOCUMENT["components"]["schemas"]

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key == "$ref":
                    yield value
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    found = set(references(DOCUMENT))
    assert found
    assert {reference.rpartition("/")[2] for reference in found} <= set(schemas)
    assert all(reference.startswith("#/components/schemas/") for reference in found)


def test_the_document_is_openapi_31() -> None:
    assert DOCUMENT["openapi"] == "3.1.0"
    schema = openapi.from_dict(DOCUMENT)
    schema.validate()
    assert len(list(schema.get_all_operations())) == len(ROUTES)


def test_a_broken_document_would_be_noticed() -> None:
    broken = openapi.from_dict({**DOCUMENT, "paths": {"/x": {"get": {"responses": "none"}}}})
    with pytest.raises(Exception, match="responses"):
        broken.validate()


def _exactly(model: type[pydantic.BaseModel], body: Any, path: str = "") -> None:
    """The body is of the model, and what the model names is all there."""
    model.model_validate(body, strict=True)
    missing = {name for name, item in model.model_fields.items() if item.is_required()} - set(body)
    assert not missing, f"{path}: {missing}"


@pytest.mark.engine
def test_real_answers_are_of_the_documented_shapes(daemon: RunningDaemon) -> None:
    team = daemon.post("/v1/teams", {"id": "shapes"})
    _exactly(answers.TeamAnswer, team.json)
    assert team.headers["location"] == "/v1/teams/shapes"
    agent = daemon.spawn("echo", "x", team="shapes", session="s", limits={"wall": 60})
    _exactly(answers.AgentAnswer, agent)
    _exactly(answers.AgentAnswer, daemon.wait(agent))
    _exactly(answers.AgentList, daemon.get("/v1/agents?team=shapes").json)
    _exactly(answers.TeamList, daemon.get("/v1/teams").json)
    _exactly(answers.TeamAnswer, daemon.get("/v1/teams/shapes").json)
    _exactly(answers.InfoAnswer, daemon.get("/v1/info").json)
    _exactly(answers.ItemList, daemon.get("/v1/images").json)
    _exactly(answers.ItemList, daemon.get("/v1/audit").json)
    _exactly(answers.Verified, daemon.post("/v1/audit/verify").json)
    _exactly(answers.Health, daemon.get("/healthz").json)
    _exactly(answers.Health, daemon.get("/readyz").json)
    _exactly(answers.Problem, daemon.get("/v1/teams/absent").json)
    _exactly(answers.AgentAnswer, daemon.delete(f"/v1/agents/{agent['id']}").json)
    _exactly(answers.TeamDeleted, daemon.delete("/v1/teams/shapes").json)
    assert daemon.get("/v1/openapi.json").json == DOCUMENT


@pytest.fixture(scope="module")
def fuzzed(engine: docker.DockerClient, image_pins: dict[str, str]) -> Iterator[requests.Session]:
    """A daemon that makes at most three agents and little of anything else, and a session over its socket."""
    with (
        running_daemon(
            engine,
            image_pins,
            ISOLATOR_MAX_AGENTS="3",
            ISOLATOR_SUBNET_POOL="10.250.0.0/22",
            ISOLATOR_CLEANUP_GRACE="0",
            ISOLATOR_STOP_GRACE="0.1",
        ) as daemon,
        requests.Session() as session,
    ):
        session.mount("http://unix", UnixHTTPAdapter(f"http+unix://{daemon.socket}", timeout=30))
        yield session


schema = openapi.from_dict(DOCUMENT)


@pytest.mark.engine
@schema.parametrize()
@settings(
    max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
def test_the_fuzzer_finds_no_answer_that_is_not_documented(case: schemathesis.Case, fuzzed: requests.Session) -> None:
    if case.path == "/v1/events":
        case.query = {**(case.query or {}), "follow": "false"}
    if case.path == "/v1/agents/{agent}/logs":
        case.query = {key: value for key, value in (case.query or {}).items() if key != "follow"}
    response = case.call(base_url="http://unix", session=fuzzed, timeout=30)
    case.validate_response(
        response,
        checks=[
            checks.not_a_server_error,
            conformance.status_code_conformance,
            conformance.content_type_conformance,
            conformance.response_schema_conformance,
            conformance.unsupported_method,
        ],
    )
    if response.status_code >= 400 and case.path != "/readyz":
        assert response.headers["content-type"] == ["application/problem+json"]
        if case.method == "HEAD":
            return
        answers.Problem.model_validate(response.json())
