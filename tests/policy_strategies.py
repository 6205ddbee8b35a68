"""Requests as an attacker might write them: mostly well-formed, with hostile text wherever text may stand."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import pydantic
from hypothesis import reject
from hypothesis import strategies as st

from isolator.model.identity import Principal
from isolator.model.image import ImageFacts
from isolator.model.mount import OpenedMount, PlannedMount
from isolator.model.request import EnsureRequest
from isolator.model.team import Team
from isolator.policy.compile import SpawnFacts
from isolator.settings import Settings

ROOTS = (PurePosixPath("/srv/work"), PurePosixPath("/home/ada/projects"))
OWN = (PurePosixPath("/var/lib/isolator"), PurePosixPath("/srv/work/state"), PurePosixPath("/etc/isolator/secrets"))
SECCOMP = "sha256:" + "5" * 64
SETTINGS = Settings(workspace_roots=[str(root) for root in ROOTS])
AGENT = "abcdefghijkmnpqr"

TRICKS = st.sampled_from(
    [
        "..", ".", "/", "//", "", "\x00", "a\x00b", "a\nb", "\r", "\u2028", "\u202e", "\u0430", "\uff0f", "=", "A=B",
        "LD_PRELOAD", "ISOLATOR_AGENT", "GLIBC_TUNABLES", "/proc/self/fd/3", "/var/run/docker.sock", "/etc", "/tmp",
        "/run/secrets", "/workspace", "/srv/work/../../etc", "/srv/work/a,readonly", "/srv/work/a:b", "$(id)",
        "-v", "--privileged", "isolator/skill", "sha256:" + "0" * 64, "\ud800",
    ]
)  # fmt: skip
TEXT = st.one_of(TRICKS, st.text(max_size=40), st.from_regex(r"[a-z][a-z0-9-]{0,20}", fullmatch=True))
SOURCES = st.one_of(
    st.sampled_from(["/srv/work/a", "/srv/work/b/c", "/srv/work", "/home/ada/projects/x", "/srv/work/state/x", "/srv"]),
    TEXT,
)
TARGETS = st.one_of(
    st.sampled_from(
        ["/data", "/data/x", "/opt/tools", "/workspace", "/workspace/sub", "/run/secrets/x", "/etc/passwd"]
    ),
    TEXT,
)
MODES = st.sampled_from(["ro", "rw"])
NAMES = st.one_of(st.from_regex(r"[A-Z_][A-Z0-9_]{0,10}", fullmatch=True), TEXT)
NUMBERS = st.one_of(
    st.integers(-2, 5000), st.integers(), st.floats(allow_nan=False), st.sampled_from([0, -1, 2**31, 2**63, 2**64])
)
WHOLE = st.one_of(st.integers(-2, 70_000), st.integers(), st.sampled_from([0, -1, 2**24, 2**30, 2**40, 2**63]))

_SECRET = st.one_of(
    NAMES,
    st.fixed_dictionaries(
        {"name": NAMES}, optional={"value": TEXT, "as": st.sampled_from(["file", "env"]), "env": NAMES}
    ),
)
_BODY = st.fixed_dictionaries(
    {},
    optional={
        "image": st.one_of(st.just("isolator/skill"), TEXT),
        "command": st.lists(TEXT, max_size=5),
        "env": st.dictionaries(NAMES, TEXT, max_size=5),
        "secrets": st.lists(_SECRET, max_size=3),
        "limits": st.fixed_dictionaries(
            {},
            optional={
                "cpus": NUMBERS,
                "memory": st.one_of(WHOLE, st.sampled_from(["512m", "16m", "1.5g", "0", "20t"])),
                "pids": WHOLE,
                "disk": WHOLE,
                "nofile": WHOLE,
                "wall": NUMBERS,
            },
        ),
        "workspace": st.fixed_dictionaries({"source": SOURCES}, optional={"mode": MODES}),
        "mounts": st.lists(
            st.fixed_dictionaries({"source": SOURCES, "target": TARGETS}, optional={"mode": MODES}), max_size=3
        ),
        "network": st.sampled_from(["team", "none"]),
        "session": TEXT,
        "parent": TEXT,
        "ttl": NUMBERS,
        "idle_ttl": NUMBERS,
        "cleanup_grace": NUMBERS,
        "skills": st.lists(TEXT, max_size=1),
        "capabilities": st.lists(TEXT, max_size=1),
    },
)
# Three of four bodies are tame in all but one or two places, so that many get as far as a box.
_TAME = st.fixed_dictionaries(
    {"command": st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1), min_size=1)},
    optional={
        "env": st.dictionaries(st.from_regex(r"[A-Z]{1,8}", fullmatch=True), st.just("x"), max_size=3),
        "limits": st.fixed_dictionaries(
            {}, optional={"memory": st.integers(2**24, 2**30), "pids": st.integers(4, 4096)}
        ),
        "workspace": st.just({"source": "/srv/work/a"}),
        "mounts": st.just([{"source": "/srv/work/b/c", "target": "/data"}]),
        "network": st.sampled_from(["team", "none"]),
        "session": st.from_regex(r"[a-z:/]{1,20}", fullmatch=True),
        "ttl": st.floats(0.5, 1e6),
        "secrets": st.lists(st.from_regex(r"[A-Z]{1,8}", fullmatch=True), max_size=2, unique=True),
    },
)


def _one_change(pair: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    tame, wild = pair
    return {**tame, **dict(list(wild.items())[:1])}


BODIES = st.one_of(_TAME, st.tuples(_TAME, _BODY).map(_one_change), _BODY)


@st.composite
def requests(draw: st.DrawFn) -> EnsureRequest:
    """A request of the right shape; what is in it may be anything."""
    body = draw(BODIES)
    try:
        return EnsureRequest.model_validate(body)
    except pydantic.ValidationError:
        reject()


UIDS = st.one_of(st.sampled_from([0, 1, 1000, 2000, 2**31 - 1, 2**31, 2**32 - 2]), st.integers(0, 2**32 - 1))
CALLERS = st.builds(
    lambda uid, gid: Principal(uid, gid, (gid,), 4242, is_admin=uid == 0),
    UIDS,
    UIDS,
)
AGENT_NAMES = st.one_of(st.none(), st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True), TEXT)
IMAGES = st.builds(
    lambda environment: ImageFacts("isolator/agent-python", "sha256:" + "1" * 64, "/usr/bin/python3", environment),
    st.one_of(st.just(()), st.just((("PYTHONHASHSEED", "0"),)), st.tuples(st.tuples(NAMES, TEXT))),
)


def opened(planned: tuple[PlannedMount, ...], uid: int, gid: int) -> tuple[OpenedMount, ...]:
    """What the planned mounts might lead to."""
    return tuple(OpenedMount(plan, 7, 100 + n, uid, gid, is_folder=True) for n, plan in enumerate(planned))


def facts(
    mounts: tuple[OpenedMount, ...], image: ImageFacts, *, agent: str = AGENT, now: float = 1_900_000_000.0
) -> SpawnFacts:
    """What the world says about one spawn."""
    return SpawnFacts(agent, now, mounts, image, SECCOMP, 2, "boot")


def team(owner: str) -> Team:
    """The team of the spawn."""
    return Team("crew", owner, "10.208.0.0/24", 1_800_000_000.0)
