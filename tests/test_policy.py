"""Whatever is asked, the answer of policy is a box within the invariants or a typed refusal; never anything else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import policy_strategies as strategies
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from policy_strategies import AGENT, OWN, ROOTS, SECCOMP, SETTINGS

from isolator.backends.docker.render import render
from isolator.model.box import BoxSpec, differing_fields
from isolator.model.errors import BadRequest, Forbidden, IsolatorError
from isolator.model.identity import Principal
from isolator.model.image import ImageFacts
from isolator.model.request import EnsureRequest
from isolator.policy.compile import MAX_COMMAND_BYTES, compile_box, decide_secrets
from isolator.policy.environment import MAX_BYTES, check_environment
from isolator.policy.mounts import RESERVED_TARGETS, SYSTEM_FOLDERS, plan_mounts

MANY = settings(max_examples=400, deadline=None)
ADA = Principal(1000, 1000, (), 1)
IMAGE = ImageFacts("isolator/agent-python", "sha256:" + "1" * 64, "/usr/bin/python3")


def decide(
    request: EnsureRequest,
    name: str | None = None,
    caller: Principal = ADA,
    image: ImageFacts = IMAGE,
    folder_owner: tuple[int, int] = (1000, 1000),
    **facts: Any,
) -> BoxSpec:
    """The whole decision, mounts first, as a spawn makes it."""
    mounts = strategies.opened(plan_mounts(request, ROOTS, OWN), *folder_owner)
    world = strategies.facts(mounts, image, **facts)
    return compile_box(request, name, caller, strategies.team(caller.owner), world, SETTINGS)


def check_refusal(error: IsolatorError) -> None:
    """A typed refusal: one of the expected kinds, with a code, words, and a body that is JSON."""
    assert error.status in (400, 403, 413), error
    assert re.fullmatch(r"[a-z][a-z_]+", error.code)
    assert len(error.detail) > 10
    json.loads(json.dumps(error.problem()))
    error.problem()["detail"].encode()


def check_box(spec: BoxSpec) -> None:
    """What must hold of every box, whoever asked for whatever."""
    assert 0 < spec.uid < 2**31
    assert 0 < spec.gid < 2**31
    limits = spec.limits
    assert 0 < limits.cpus <= 2
    assert 16 * 2**20 <= limits.memory <= SETTINGS.max_memory
    assert 4 <= limits.pids <= SETTINGS.max_pids
    assert 0 < limits.disk <= SETTINGS.max_disk
    assert 0 < limits.nofile <= SETTINGS.max_nofile
    assert limits.wall is None or 0 < limits.wall < 1e9
    assert all(value is None or 0 < value < 1e9 for value in (spec.ttl, spec.idle_ttl))
    assert 0 <= spec.cleanup_grace <= 86_400
    assert (spec.network, spec.network_name) in (("team", "openclaw-team-crew"), ("none", None))
    assert [scratch.target for scratch in spec.scratch] == ["/tmp", "/run/secrets"]
    assert spec.seccomp == SECCOMP
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", spec.name)
    assert spec.hostname == spec.name
    assert spec.working_dir in ("/tmp", "/workspace")
    assert (spec.image_digest, spec.interpreter) == (IMAGE.digest, IMAGE.interpreter)
    check_places(spec)
    check_words(spec)
    labels = dict(spec.labels)
    assert (labels["openclaw.managed"], labels["openclaw.team"], labels["openclaw.agent"]) == ("true", "crew", AGENT)
    assert (labels["isolator.spec"], labels["isolator.owner"]) == (spec.digest(), spec.owner)
    assert set(labels) == set(dict(decide(EnsureRequest()).labels))


def check_places(spec: BoxSpec) -> None:
    """Mounts come from below a root, from no folder of the system or our own, and cover nothing of the box's."""
    targets = [PurePosixPath(mount.target) for mount in spec.mounts]
    assert len(set(targets)) == len(targets)
    for mount, target in zip(spec.mounts, targets, strict=True):
        source = PurePosixPath(mount.source)
        assert any(root == source or root in source.parents for root in ROOTS)
        assert ".." not in source.parts
        assert not any(
            source == own or own in source.parents or source in own.parents for own in (*SYSTEM_FOLDERS, *OWN)
        )
        assert not any(target == kept or kept in target.parents or target in kept.parents for kept in RESERVED_TARGETS)
        assert not any(other in target.parents for other in targets)
        assert mount.staged.startswith(f"{SETTINGS.runtime_dir}/mounts/{AGENT}/")


def check_words(spec: BoxSpec) -> None:
    """Everything that becomes an argument, a variable or a label can be one, and steers no loader."""
    environment = dict(spec.environment)
    assert environment["ISOLATOR_AGENT"] == AGENT
    assert environment["ISOLATOR_TEAM"] == "crew"
    assert {name for name in environment if name.startswith("ISOLATOR_")} == {
        "ISOLATOR_AGENT", "ISOLATOR_TEAM", "ISOLATOR_AGENT_SOCKET",
    }  # fmt: skip
    assert not [name for name in environment if name.startswith(("LD_", "GLIBC_"))]
    variables = [secret.variable for secret in spec.secrets if secret.variable is not None]
    assert len(set(variables)) == len(variables)
    assert not any(name.startswith(("LD_", "ISOLATOR_", "GLIBC_")) for name in variables)
    for name in (*environment, *variables):
        assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)
    for secret in spec.secrets:
        assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", secret.name)
    for text in (*spec.command, *environment.values(), spec.session or "", *dict(spec.labels).values()):
        assert "\x00" not in text
        text.encode()
    assert "\n" not in (spec.session or "")


@MANY
@given(
    strategies.requests(),
    strategies.AGENT_NAMES,
    strategies.CALLERS,
    strategies.IMAGES,
    st.tuples(strategies.UIDS, strategies.UIDS),
)
def test_any_request_is_a_box_within_bounds_or_a_refusal(
    request: EnsureRequest, name: str | None, caller: Principal, image: ImageFacts, owner: tuple[int, int]
) -> None:
    try:
        spec = decide(request, name, caller, image, owner)
    except IsolatorError as error:
        event(error.code)
        check_refusal(error)
        return
    event("a box")
    check_box(spec)
    assert decide(request, name, caller, image, owner) == spec
    check_render(spec)


def check_render(spec: BoxSpec) -> None:
    """The engine is asked for nothing dangerous, whatever the spec."""
    body = render(spec, "{}", "1.41")
    host = body["HostConfig"]
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true", "seccomp={}"]
    assert host["ReadonlyRootfs"] is True
    assert (host["IpcMode"], host["CgroupnsMode"]) == ("private", "private")
    assert host["NetworkMode"] in ("none", "openclaw-team-crew")
    assert host["RestartPolicy"]["Name"] == "no"
    assert host["Memory"] == host["MemorySwap"] > 0
    assert host["NanoCpus"] > 0
    assert host["PidsLimit"] > 0
    dangerous = (
        "Binds", "CapAdd", "CgroupParent", "ContainerIDFile", "DeviceCgroupRules", "DeviceRequests", "Devices",
        "ExtraHosts", "GroupAdd", "Links", "OomKillDisable", "PidMode", "PortBindings", "Privileged",
        "PublishAllPorts", "Runtime", "StorageOpt", "Sysctls", "UTSMode", "UsernsMode", "VolumeDriver", "VolumesFrom",
    )  # fmt: skip
    assert not [name for name in dangerous if host.get(name)]
    assert not [name for name in ("Volumes", "Tty", "OpenStdin", "ExposedPorts", "MacAddress") if body.get(name)]
    assert body["Image"].startswith("sha256:")
    assert body["Entrypoint"] == ["/usr/bin/python3", "-I", "-S", "/run/isolator/guest.py"]
    assert not body["User"].startswith("0:")
    assert all(options.startswith("rw,noexec,nosuid,nodev,size=") for options in host["Tmpfs"].values())
    assert all(mount["BindOptions"] == {"Propagation": "rprivate", "NonRecursive": True} for mount in host["Mounts"])
    assert {mount["Type"] for mount in host["Mounts"]} == {"bind"}
    assert "/proc/kcore" in host["MaskedPaths"]
    json.dumps(body)


@MANY
@given(st.dictionaries(strategies.NAMES, strategies.TEXT, max_size=6))
def test_an_environment_is_taken_whole_or_refused(environment: dict[str, str]) -> None:
    try:
        checked = check_environment(environment)
    except IsolatorError as error:
        check_refusal(error)
        return
    assert dict(checked) == environment
    assert list(checked) == sorted(checked)


@MANY
@given(strategies.requests())
def test_secrets_are_named_once_each_or_refused(request: EnsureRequest) -> None:
    try:
        refs = decide_secrets(request.secrets, request.env)
    except IsolatorError as error:
        check_refusal(error)
        return
    assert [ref.name for ref in refs] == [secret.name for secret in request.secrets]
    assert {ref.variable for ref in refs if ref.variable}.isdisjoint(request.env)


@MANY
@given(strategies.requests(), st.floats(1e9, 4e9), st.from_regex(r"[a-z][a-z0-9]{15}", fullmatch=True))
def test_the_digest_is_of_what_was_meant(request: EnsureRequest, now: float, agent: str) -> None:
    try:
        first = decide(request)
    except IsolatorError:
        return
    again = decide(request, agent=agent, now=now)
    assert again.agent == agent
    assert again.digest() == first.digest()
    assert differing_fields(again.meaning(), first.meaning()) == []
    moved = replace(again, mounts=tuple(replace(m, staged="/elsewhere", device=9, inode=9) for m in again.mounts))
    assert moved.digest() == first.digest()


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ({"command": ["false"]}, ["command"]),
        ({"env": {"A": "2"}}, ["environment"]),
        ({"limits": {"pids": 5}}, ["limits"]),
        ({"network": "none"}, ["network", "network_name"]),
        ({"workspace": {"source": "/srv/work/a", "mode": "ro"}}, ["mounts"]),
        ({"workspace": None}, ["environment", "gid", "mounts", "uid", "working_dir"]),
        ({"session": "other"}, ["session"]),
        ({"secrets": ["B"]}, ["secrets"]),
        ({"ttl": 5, "idle_ttl": 5, "cleanup_grace": 5}, ["cleanup_grace", "idle_ttl", "ttl"]),
    ],
)
def test_what_differs_is_named(change: dict[str, Any], fields: list[str]) -> None:
    base = {"command": ["true"], "env": {"A": "1"}, "workspace": {"source": "/srv/work/a"}, "session": "s"}
    left = decide(EnsureRequest.model_validate(base), name="worker")
    right = decide(EnsureRequest.model_validate({**base, **change}), name="worker")
    assert differing_fields(left.meaning(), right.meaning()) == fields
    assert (left.digest() == right.digest()) is False


@pytest.mark.parametrize(("uid", "gid"), [(2**31, 1000), (2**32 - 2, 1000), (1000, 2**31), (1000, 2**32 - 2)])
def test_a_caller_whose_number_an_engine_could_misread_gets_no_folder(uid: int, gid: int) -> None:
    request = EnsureRequest.model_validate({"workspace": {"source": "/srv/work/a"}})
    with pytest.raises(Forbidden) as caught:
        decide(request, caller=Principal(uid, gid, (), 1))
    assert caught.value.code == "uid_refused"
    assert decide(EnsureRequest(), caller=Principal(uid, gid, (), 1)).uid == SETTINGS.agent_uid


@pytest.mark.parametrize(
    ("caller", "owner", "expected"),
    [
        (ADA, (1000, 1000), (1000, 1000)),
        (ADA, (2000, 2000), (1000, 1000)),  # never more than the caller is
        (ADA, (0, 0), (1000, 1000)),
        (Principal(1000, 0, (), 1), (1000, 0), (1000, 1000)),  # never the group of root
        (Principal(0, 0, (), 1, is_admin=True), (1000, 1001), (1000, 1001)),
        (Principal(0, 0, (), 1, is_admin=True), (0, 0), (10001, 10001)),
        (Principal(0, 0, (), 1, is_admin=True), (1000, 0), (1000, 1000)),
    ],
)
def test_the_box_runs_as_the_folders_owner_but_never_beyond_its_caller(
    caller: Principal, owner: tuple[int, int], expected: tuple[int, int]
) -> None:
    request = EnsureRequest.model_validate({"workspace": {"source": "/srv/work/a"}})
    spec = decide(request, caller=caller, folder_owner=owner)
    assert (spec.uid, spec.gid) == expected


def test_a_skill_talks_to_nobody_unless_somebody_said_so() -> None:
    assert decide(EnsureRequest(image="isolator/skill")).network == "none"
    assert decide(EnsureRequest(image="isolator/skill:latest")).network == "none"
    assert decide(EnsureRequest(image="isolator/skill", network="team")).network == "team"
    assert decide(EnsureRequest()).network == "team"


def test_unlimited_can_not_be_said() -> None:
    for field in ("cpus", "memory", "pids", "disk", "nofile", "wall"):
        for value in (0, -1):
            with pytest.raises(BadRequest) as caught:
                decide(EnsureRequest.model_validate({"limits": {field: value}}))
            assert caught.value.code == "limit_out_of_range"
            assert caught.value.fields["field"] == f"limits.{field}"


@pytest.mark.parametrize(
    "command",
    [
        ["x" * 131_071],
        ["echo", *["x" * 256] * 509],
        ["\u00e9" * 65_535],  # two bytes each
        ["\U0001f600" * 32_767],  # four
    ],
)
def test_a_command_is_taken_up_to_its_bytes_and_refused_beyond(command: list[str]) -> None:
    spare = MAX_COMMAND_BYTES - sum(len(argument.encode()) + 1 for argument in command)
    assert 0 <= spare < 500
    fits = [*command, "y" * (spare - 1)] if spare else command
    assert decide(EnsureRequest(command=fits)).command == tuple(fits)
    for beyond in ([*fits, ""], [fits[0] + "x", *fits[1:]]):
        with pytest.raises(BadRequest) as caught:
            decide(EnsureRequest(command=beyond))
        assert caught.value.code == "command_too_long"
        assert caught.value.fields["limit"] == MAX_COMMAND_BYTES


def test_five_hundred_arguments_of_the_longest_kind_are_no_command() -> None:
    with pytest.raises(BadRequest) as caught:
        decide(EnsureRequest(command=["x" * 131_072] * 512))
    assert caught.value.code == "command_too_long"


def test_an_environment_is_taken_up_to_its_bytes_and_refused_beyond() -> None:
    fits = {"A": "\u00e9" * 65_534, "B": "\u00e9" * 65_535}  # with the names, and "=" and NUL for each
    assert dict(check_environment(fits)) == fits
    with pytest.raises(IsolatorError) as caught:
        check_environment({**fits, "B": fits["B"] + "\u00e9"})
    assert (caught.value.status, caught.value.code) == (413, "env_too_large")
    assert caught.value.fields["limit"] == MAX_BYTES
