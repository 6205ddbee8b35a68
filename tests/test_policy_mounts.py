"""Which folders may be asked for, and where in the box they may appear: the part that is decided from text alone."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import policy_strategies as strategies
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_strategies import OWN, ROOTS

from isolator.model.errors import BadRequest, Forbidden, IsolatorError
from isolator.model.mount import PlannedMount
from isolator.model.request import EnsureRequest
from isolator.policy.mounts import RESERVED_TARGETS, SYSTEM_FOLDERS, plan_mounts, refuse_sensitive


def plan(*mounts: dict[str, Any], workspace: dict[str, Any] | None = None) -> tuple[PlannedMount, ...]:
    request = EnsureRequest.model_validate({"mounts": list(mounts), "workspace": workspace})
    return plan_mounts(request, ROOTS, OWN)


def refused(source: str, target: str = "/data") -> IsolatorError:
    with pytest.raises(IsolatorError) as caught:
        plan({"source": source, "target": target})
    return caught.value


@pytest.mark.parametrize(
    ("source", "root", "relative"),
    [
        ("/srv/work/a", "/srv/work", "a"),
        ("/srv/work/a/", "/srv/work", "a"),
        ("/srv/work/a b/\u00fc", "/srv/work", "a b/\u00fc"),
        ("/srv/work/..a", "/srv/work", "..a"),
        ("/home/ada/projects", "/home/ada/projects", "."),
        ("/home/ada/projects/x/y", "/home/ada/projects", "x/y"),
    ],
)
def test_below_a_root_is_planned(source: str, root: str, relative: str) -> None:
    (planned,) = plan({"source": source, "target": "/data"})
    assert (planned.root, planned.relative, planned.read_only) == (root, relative, True)


@pytest.mark.parametrize("source", ["/srv/other", "/srv/workshop/a", "/home/ada", "/home", "/opt/x", "/root/.ssh"])
def test_outside_every_root_is_refused(source: str) -> None:
    error = refused(source)
    assert (type(error), error.code) == (Forbidden, "mount_outside_roots")
    assert "/srv/work" in error.detail


@pytest.mark.parametrize(
    "source",
    ["/", "/etc", "/etc/passwd", "/proc", "/proc/self/root", "/sys", "/dev", "/dev/sda", "/run", "/run/docker.sock",
     "/var/run/docker.sock", "/var", "/var/lib", "/var/lib/docker", "/var/lib/docker/overlay2", "/var/lib/isolator",
     "/usr", "/boot", "/lib", "/bin", "/sbin", "/srv", "/srv/work", "/srv/work/state", "/srv/work/state/isolator.db"],
)  # fmt: skip
def test_the_systems_folders_and_our_own_are_refused_and_what_holds_them(source: str) -> None:
    error = refused(source)
    assert (type(error), error.code) == (Forbidden, "mount_system_folder")
    with pytest.raises(Forbidden):
        refuse_sensitive(PurePosixPath(source), OWN)


def test_even_when_the_operator_made_the_system_a_root() -> None:
    request = EnsureRequest.model_validate({"mounts": [{"source": "/etc/shadow", "target": "/data"}]})
    for roots in ([PurePosixPath("/")], [PurePosixPath("/etc")]):
        with pytest.raises(Forbidden) as caught:
            plan_mounts(request, roots, OWN)
        assert caught.value.code == "mount_system_folder"
    fine = EnsureRequest.model_validate({"mounts": [{"source": "/opt/x", "target": "/data"}]})
    assert plan_mounts(fine, [PurePosixPath("/")], OWN)[0].relative == "opt/x"


@pytest.mark.parametrize(
    "source",
    ["srv/work/a", "./a", "../a", "~/a", "/srv/work/../../etc", "/srv/work/a/..", "/srv/work/./a", "//srv/work/a",
     "/srv/work//a", "/srv/work/a\x00", "/srv/work/a\nb", "/srv/work/\x1b[2J", "/srv/work/\u202ea", "/srv/work/a\t"],
)  # fmt: skip
def test_a_path_that_could_mean_two_things_is_refused(source: str) -> None:
    error = refused(source)
    assert (type(error), error.code) == (BadRequest, "mount_path_invalid")
    assert error.fields["path"].isascii()


@pytest.mark.parametrize(
    "target",
    ["/", "/etc", "/etc/passwd", "/usr", "/usr/bin/python3", "/lib", "/lib64/x", "/proc", "/proc/1", "/sys", "/dev",
     "/dev/shm", "/run", "/run/isolator", "/run/secrets/KEY", "/tmp", "/tmp/x", "/skills", "/skills/a", "/var/run",
     "/var", "/bin", "/sbin/init"],
)  # fmt: skip
def test_what_the_box_is_made_of_is_not_covered(target: str) -> None:
    error = refused("/srv/work/a", target)
    assert (type(error), error.code) == (BadRequest, "mount_target_invalid")


@pytest.mark.parametrize("target", ["data", "/data/../etc", "/data//x", "/data\x00", "", "/./x"])
def test_a_target_that_could_mean_two_things_is_refused(target: str) -> None:
    with pytest.raises((BadRequest, ValueError)):
        plan({"source": "/srv/work/a", "target": target})


@pytest.mark.parametrize("target", ["/data", "/opt/tools", "/home/agent/x", "/mnt/a b", "/srv", "/var/data"])
def test_other_places_are_free(target: str) -> None:
    assert plan({"source": "/srv/work/a", "target": target})[0].target == target


@pytest.mark.parametrize(("one", "other"), [("/data", "/data"), ("/data", "/data/x"), ("/data/x/y", "/data")])
def test_mounts_do_not_lie_in_each_other(one: str, other: str) -> None:
    with pytest.raises(BadRequest) as caught:
        plan({"source": "/srv/work/a", "target": one}, {"source": "/srv/work/b", "target": other})
    assert caught.value.code == "mount_target_invalid"
    with pytest.raises(BadRequest):
        plan({"source": "/srv/work/a", "target": "/workspace/x"}, workspace={"source": "/srv/work/b"})
    pair = plan({"source": "/srv/work/a", "target": "/data"}, {"source": "/srv/work/a", "target": "/database"})
    assert [mount.target for mount in pair] == ["/data", "/database"]


def test_the_workspace_comes_first_and_is_a_writable_folder() -> None:
    first, second = plan({"source": "/srv/work/b", "target": "/data"}, workspace={"source": "/srv/work/a"})
    assert (first.target, first.read_only, first.must_be_folder) == ("/workspace", False, True)
    assert (second.target, second.read_only, second.must_be_folder) == ("/data", True, False)
    (only,) = plan(workspace={"source": "/srv/work/a", "mode": "ro"})
    assert only.read_only


def test_no_roots_means_no_mounts() -> None:
    request = EnsureRequest.model_validate({"workspace": {"source": "/srv/work/a"}})
    with pytest.raises(Forbidden) as caught:
        plan_mounts(request, [], OWN)
    assert caught.value.code == "mount_outside_roots"
    assert "ISOLATOR_WORKSPACE_ROOTS" in caught.value.detail
    assert plan_mounts(EnsureRequest(), [], OWN) == ()


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(strategies.SOURCES, strategies.TARGETS, strategies.MODES), max_size=4))
def test_any_text_is_planned_within_the_rules_or_refused(mounts: list[tuple[str, str, str]]) -> None:
    try:
        request = EnsureRequest.model_validate(
            {"mounts": [{"source": source, "target": target, "mode": mode} for source, target, mode in mounts]}
        )
    except ValueError:
        return
    try:
        planned = plan_mounts(request, ROOTS, OWN)
    except (BadRequest, Forbidden):
        return
    assert len(planned) == len(mounts)
    for mount in planned:
        assert f"{mount.root}/{mount.relative}".startswith(("/srv/work/", "/home/ada/projects"))
        assert ".." not in PurePosixPath(mount.relative).parts
        assert not any(
            PurePosixPath(mount.target).is_relative_to(kept) or kept.is_relative_to(mount.target)
            for kept in RESERVED_TARGETS
        )
        assert not any(PurePosixPath(mount.source).is_relative_to(kept) for kept in (*SYSTEM_FOLDERS, *OWN))
