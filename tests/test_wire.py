"""Bytes in, models or refusals out: nothing else, whatever the bytes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request
from hypothesis import given, settings
from hypothesis import strategies as st

from isolator.api.wire import check_query, problem_answer, query_flag, query_number, query_text, read_model
from isolator.model.errors import BadRequest, IsolatorError, NotFound, TooMany
from isolator.model.request import EnsureRequest, SpawnRequest, TeamRequest

_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=10), inner, max_size=3)),
    max_leaves=8,
)
_FIELDS = st.sampled_from([*SpawnRequest.model_fields, *TeamRequest.model_fields, "as", "x"])


def read(body: bytes, model: Any = SpawnRequest, **headers: str) -> Any:
    request = make_mocked_request("POST", "/v1/agents", headers)
    request._read_bytes = body
    return asyncio.run(read_model(request, model, 1.0))


def refusal(body: bytes, model: Any = SpawnRequest, **headers: str) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        read(body, model, **headers)
    return caught.value


def request_of(query: str) -> Any:
    return make_mocked_request("GET", f"/v1/agents?{query}")


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        _JSON.map(lambda value: json.dumps(value).encode()),
        st.dictionaries(_FIELDS, _JSON, max_size=5).map(lambda value: json.dumps(value).encode()),
    ),
    st.sampled_from([SpawnRequest, EnsureRequest, TeamRequest]),
)
def test_any_body_is_a_model_or_a_bad_request(body: bytes, model: Any) -> None:
    try:
        assert isinstance(read(body, model), model)
    except BadRequest as error:
        problem = json.loads(problem_answer(error).body or b"")
        expected = {"invalid_json", "unknown_field", "invalid_request"}
        if problem["code"] not in expected or len(json.dumps(problem)) > 8000:
            raise


def test_a_good_body_is_read_as_it_was_written() -> None:
    spawn = read(b'{"team": "crew", "command": ["echo", "\\u00fc"], "limits": {"memory": "1.5g", "cpus": 1}}')
    assert (spawn.team, spawn.command, spawn.limits.memory, spawn.limits.cpus) == (
        "crew",
        ["echo", "\u00fc"],
        3 << 29,
        1,
    )
    assert read(b'{"team": "crew", "secrets": ["A"]}').secrets[0].name == "A"


@pytest.mark.parametrize("key", ["id", "team", "name"])
def test_a_team_may_be_named_by_any_of_its_words(key: str) -> None:
    assert read(json.dumps({key: "crew"}).encode(), TeamRequest).id == "crew"


def test_what_is_wrong_is_named_and_bounded() -> None:
    error = refusal(json.dumps({f"field{n}" * 50: n for n in range(1000)}).encode())
    assert error.code == "unknown_field"
    assert len(json.dumps(error.problem())) < 4000
    error = refusal(b'{"team": "crew", "limits": {"pids": "many"}}')
    assert error.fields["errors"] == [{"field": "limits.pids", "message": "Input should be a valid integer"}]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity, gzip", ""])
def test_encodings_are_refused(encoding: str) -> None:
    assert refusal(b"{}", **{"Content-Encoding": encoding}).code == "encoding_unsupported"


def test_problems_carry_the_headers_that_belong_to_them() -> None:
    plain = problem_answer(NotFound("team_not_found", "There is no team."))
    assert (plain.status, plain.content_type, plain.headers.get("Retry-After")) == (
        404,
        "application/problem+json",
        None,
    )
    busy = problem_answer(TooMany("spawns_busy", "Try again.", retry_after=3))
    assert (busy.status, busy.headers["Retry-After"]) == (429, "3")


@pytest.mark.parametrize(
    ("query", "value"), [("", False), ("f", True), ("f=1", True), ("f=no", False), ("f=TRUE", True)]
)
def test_flags(query: str, value: bool) -> None:
    assert query_flag(request_of(query), "f") is value
    assert query_flag(request_of(""), "f", default=True) is True


@pytest.mark.parametrize(("query", "value"), [("", None), ("n=0", 0), ("n=1.5", 1.5), ("n=10", 10), ("n=1e1", 10)])
def test_numbers(query: str, value: float | None) -> None:
    assert query_number(request_of(query), "n", 0, 10) == value


@pytest.mark.parametrize("query", ["n=", "n=-1", "n=11", "n=nan", "n=inf", "n=x", "n=1&n=2", "n=%00", "n=" + "1" * 300])
def test_no_numbers(query: str) -> None:
    with pytest.raises(BadRequest) as caught:
        query_number(request_of(query), "n", 0, 10)
    assert caught.value.code == "invalid_query"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_any_query_is_read_or_refused(text: str) -> None:
    try:
        request = request_of(text.replace("#", ""))
    except ValueError:
        return
    for read_one in (
        lambda: query_text(request, "a"),
        lambda: query_flag(request, "a"),
        lambda: query_number(request, "a", 0, 1),
        lambda: check_query(request, frozenset({"a"})),
    ):
        try:
            read_one()
        except IsolatorError as error:
            if error.code != "invalid_query":
                raise
