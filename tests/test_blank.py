"""Which box, made before its agent is known, may become an agent's: equal profiles, and nothing of anybody in it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import policy_strategies as strategies
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from policy_strategies import OWN, ROOTS, SETTINGS

from isolator.backends.docker.render import render
from isolator.model.box import WORKSPACE, BoxSpec
from isolator.model.errors import IsolatorError
from isolator.model.identity import Principal
from isolator.model.image import ImageFacts
from isolator.model.request import EnsureRequest
from isolator.policy.blank import Profile, bare_request, blank_of, profile_of, under
from isolator.policy.compile import compile_box
from isolator.policy.mounts import plan_mounts

MANY = settings(max_examples=100, deadline=None)
ADA = Principal(1000, 1000, (), 1)
IMAGE = ImageFacts("isolator/agent-python", "sha256:" + "1" * 64, "/usr/bin/python3", (("PYTHONHASHSEED", "0"),))
BLANK_ID = "zyxwvutsrqpnmkji"
# What a claimed box gets after the engine made it. Everything else must be equal.
HANDED_OVER = {
    "agent", "command", "cleanup_grace", "environment", "guest_source", "hostname", "idle_ttl", "labels", "limits",
    "mounts", "name", "parent", "secrets", "session", "ttl", "working_dir",
}  # fmt: skip


def decide(body: EnsureRequest | dict[str, Any], name: str | None = None, caller: Principal = ADA) -> BoxSpec:
    """The spec of a spawn, as a launcher compiles it."""
    request = body if isinstance(body, EnsureRequest) else EnsureRequest.model_validate(body)
    mounts = strategies.opened(plan_mounts(request, ROOTS, OWN), caller.uid, caller.gid)
    return compile_box(request, name, caller, strategies.team("uid:1000"), strategies.facts(mounts, IMAGE), SETTINGS)


def blank(profile: Profile, caller: Principal = ADA) -> BoxSpec:
    """The blank of a profile, as the launcher makes it."""
    facts = strategies.facts((), IMAGE, agent=BLANK_ID)
    bare = compile_box(bare_request(profile), None, caller, strategies.team("uid:1000"), facts, SETTINGS)
    return blank_of(bare, profile)


def rendered(spec: BoxSpec) -> dict[str, Any]:
    """What the engine fixes for good: the create call without what only names or labels it."""
    body = json.loads(json.dumps(render(spec, "{}", "1.41")).replace(spec.agent, "ID"))
    for later in ("Cmd", "Env", "WorkingDir", "Labels"):
        del body[later]
    body["HostConfig"]["Mounts"] = [mount for mount in body["HostConfig"]["Mounts"] if mount["Target"] != WORKSPACE]
    return dict(body)


@MANY
@given(strategies.requests(), strategies.CALLERS)
def test_a_blank_is_the_cold_box_but_for_what_is_handed_over(request: EnsureRequest, caller: Principal) -> None:
    try:
        spec = decide(request, caller=caller)
    except IsolatorError:
        event("refused")
        return
    profile = profile_of(spec)
    if profile is None:
        event("cold")
        assert any(mount.target != WORKSPACE for mount in spec.mounts)
        return
    event("warm")
    waiting = blank(profile, caller)
    assert profile_of(waiting) == profile
    assert rendered(waiting) == rendered(spec)
    mine, its = ({n: getattr(s, n) for n in BoxSpec.__dataclass_fields__} for s in (spec, waiting))
    assert {name for name in mine if mine[name] != its[name]} <= HANDED_OVER | {"pool"}
    assert replace(spec.limits, wall=None) == waiting.limits


@MANY
@given(strategies.requests(), strategies.requests(), strategies.CALLERS)
def test_equal_profiles_differ_only_in_what_is_handed_over(
    first: EnsureRequest, second: EnsureRequest, caller: Principal
) -> None:
    try:
        one, other = decide(first, caller=caller), decide(second, caller=caller)
    except IsolatorError:
        return
    assume(profile_of(one) is not None and profile_of(one) == profile_of(other))
    assert rendered(one) == rendered(other)


@MANY
@given(strategies.requests(), strategies.CALLERS)
def test_a_spec_under_another_id_is_what_would_have_been_compiled_under_it(
    request: EnsureRequest, caller: Principal
) -> None:
    try:
        mounts = strategies.opened(plan_mounts(request, ROOTS, OWN), caller.uid, caller.gid)
        team, facts = strategies.team("uid:1000"), strategies.facts(mounts, IMAGE)
        one = compile_box(request, None, caller, team, facts, SETTINGS)
    except IsolatorError:
        assume(False)
    other = compile_box(request, None, caller, team, replace(facts, agent=BLANK_ID), SETTINGS)
    assert under(BLANK_ID, one) == other != one
    assert under(one.agent, other) == one


@given(
    st.text(st.characters(codec="ascii", categories=["L"]), min_size=12, max_size=20),
    st.sampled_from(["env", "command", "session", "secret", "value"]),
)
def test_nothing_of_a_request_is_in_its_blank(mark: str, place: str) -> None:
    body: dict[str, Any] = {"command": ["true"]}
    match place:
        case "env":
            body["env"] = {f"X{mark}": mark}
        case "command":
            body["command"] = ["echo", mark]
        case "session":
            body["session"] = mark
        case "secret":
            body["secrets"] = [{"name": mark, "value": "v"}]
        case _:
            body["secrets"] = [{"name": "s", "value": mark}]
    body["workspace"] = {"source": "/srv/work/a"}
    spec = decide(body)
    profile = profile_of(spec)
    assert profile is not None
    assert mark not in repr(blank(profile))
    assert mark not in repr(profile)
    assert "/srv/work" not in json.dumps(render(blank(profile), "{}", "1.41"))


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({}, "worker"),
        ({"mounts": [{"source": "/srv/work/b", "target": "/data"}]}, None),
        ({"workspace": {"source": "/srv/work/a"}, "mounts": [{"source": "/srv/work/b", "target": "/data"}]}, None),
    ],
)
def test_what_must_be_made_for_its_agent_is_cold(body: dict[str, Any], name: str | None) -> None:
    assert profile_of(decide(body, name)) is None
    assert profile_of(decide({})) is not None


def test_a_foreign_image_is_cold() -> None:
    assert profile_of(replace(decide({}), image="sha256:" + "9" * 64)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"team": "other"},
        {"owner": "uid:2000"},
        {"image": "isolator/skill"},
        {"image_digest": "sha256:" + "2" * 64},
        {"interpreter": "/usr/local/bin/python3"},
        {"uid": 1001},
        {"gid": 1001},
        {"network": "none"},
        {"seccomp": "sha256:" + "6" * 64},
        {"log_max_bytes": 4096},
        {"instance": "second"},
    ],
)
def test_what_the_engine_fixes_makes_another_profile(change: dict[str, Any]) -> None:
    spec = decide({})
    assert profile_of(replace(spec, **change)) != profile_of(spec)


@pytest.mark.parametrize("limit", ["cpus", "memory", "pids", "disk", "nofile"])
def test_every_cap_makes_another_profile_and_the_wall_time_none(limit: str) -> None:
    spec = decide({})
    more = replace(spec.limits, **{limit: getattr(spec.limits, limit) + 1})
    assert profile_of(replace(spec, limits=more)) != profile_of(spec)
    timed = replace(spec.limits, wall=5.0)
    assert profile_of(replace(spec, limits=timed)) == profile_of(spec)


def test_a_blank_of_other_settings_is_refused() -> None:
    profile = profile_of(decide({}))
    assert profile is not None
    with pytest.raises(ValueError, match="another"):
        blank(replace(profile, seccomp="sha256:" + "6" * 64))


def test_a_blank_says_that_it_is_one() -> None:
    profile = profile_of(decide({}))
    assert profile is not None
    waiting = blank(profile)
    assert waiting.box_name == f"openclaw-crew-pool-{BLANK_ID}"
    assert dict(waiting.labels)["isolator.pool"] == profile.key == waiting.pool
    assert dict(waiting.labels)["isolator.spec"] == waiting.digest()
    assert dict(waiting.labels)["isolator.expires"] == "never"
    assert profile.key == replace(profile).key
