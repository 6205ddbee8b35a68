"""The system calls an agent may make, read from `seccomp/*.toml` and rendered for an engine.

The engine's built-in profile is as old as the engine, so isolator always sends its own. It is written once,
for people, and rendered from there: Docker's JSON here, other backends from the same `SeccompProfile`.
Reading is strict, because a slip in a filter is silent: an unknown key, a call decided twice, or a
condition that an engine would read differently from a person is refused.

Two things engines do that shape the rules here:
- runc joins two conditions on the *same* argument of a rule by OR, not AND; such a rule is refused.
- libseccomp lets an unconditional rule win over a conditional one for the same call, and has no "masked
  not-equal"; so each call is decided in one group, and `none_of` is rendered as allow rules that
  together cover exactly the other 32-bit values.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from isolator.model.errors import Internal
from isolator.resources import resource_folder

ENGINE_ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
PROFILE_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
SYSCALL_NAME = re.compile(r"[a-z_][a-z0-9_]{1,63}")
LOW_HALF = 0xFFFF_FFFF
WHOLE_REGISTER = 0xFFFF_FFFF_FFFF_FFFF
LAST_ARGUMENT = 5


class Action(StrEnum):
    """What happens to a call."""

    ALLOW = "allow"
    ERRNO = "errno"


@dataclass(frozen=True)
class Match:
    """One comparison as a filter does it: `register & mask == value`."""

    argument: int
    mask: int
    value: int


@dataclass(frozen=True)
class Condition:
    """What one argument (0 to 5) must be: `any_of` or `none_of`, never both.

    `any_of` compares the bits of `mask`; `none_of` compares the low 32 bits.
    """

    argument: int
    any_of: tuple[int, ...] = ()
    none_of: tuple[int, ...] = ()
    mask: int = WHOLE_REGISTER

    def matches(self) -> tuple[Match, ...]:
        """The comparisons of which one must hold; together they say the same as the condition."""
        if self.none_of:
            return tuple(Match(self.argument, mask, value) for mask, value in _all_but(self.none_of))
        return tuple(Match(self.argument, self.mask, value) for value in self.any_of)


@dataclass(frozen=True)
class Row:
    """One way in which a call is allowed: all conditions hold."""

    meaning: str
    conditions: tuple[Condition, ...]

    def alternatives(self) -> Iterator[tuple[Match, ...]]:
        """Each way to hold, as one comparison for every argument named."""
        yield from itertools.product(*(condition.matches() for condition in self.conditions))


@dataclass(frozen=True)
class Group:
    """Calls that share a reason and a fate: `errno_name` is set for closed ones only, `rows` for open."""

    name: str
    why: str
    action: Action
    errno_name: str | None
    syscalls: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class SeccompProfile:
    """An allow-list: what no group names gets `default_errno`.

    Frozen; the rendered form and its digest depend on nothing else.
    """

    name: str
    default_errno: str
    architectures: tuple[str, ...]
    groups: tuple[Group, ...]

    def docker_json(self) -> str:
        """The profile as Docker's API takes it in `security_opt=["seccomp=" + …]`: one canonical line."""
        document = {
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": _errno_number(self.default_errno),
            "archMap": [
                {"architecture": ENGINE_ARCHITECTURES[name], "subArchitectures": []} for name in self.architectures
            ],
            "syscalls": [rule for group in self.groups for rule in _docker_rules(group)],
        }
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @cached_property
    def digest(self) -> str:
        """`sha256:` and the hex digest of `docker_json()`."""
        return "sha256:" + hashlib.sha256(self.docker_json().encode("ascii")).hexdigest()


def load_profile(name: str = "agent") -> SeccompProfile:
    """Read and check the shipped profile `name`.

    Raises:
        Internal: `seccomp_profile_missing` or `seccomp_profile_invalid`; no agent may start then.
    """
    if not PROFILE_NAME.fullmatch(name):
        raise Internal("seccomp_profile_missing", f"{name!r} is not a profile's name; use the one shipped: agent")
    try:
        text = (resource_folder("seccomp") / f"{name}.toml").read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise Internal("seccomp_profile_missing", f"seccomp/{name}.toml can't be read: {error}") from error
    profile = parse_profile(text)
    if profile.name != name:
        raise _invalid(f"seccomp/{name}.toml calls itself {profile.name!r}")
    return profile


def parse_profile(text: str) -> SeccompProfile:
    """Check the TOML `text` and return the profile it says.

    Raises:
        Internal: `seccomp_profile_invalid`, naming the place and what is wrong there.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _invalid(f"not TOML: {error}") from error
    _only(document, {"profile", "group"}, "the file")
    header = _typed(document, "profile", dict, "the file")
    _only(header, {"name", "default_errno", "architectures"}, "[profile]")
    architectures = _strings(header, "architectures", "[profile]")
    for architecture in architectures:
        if architecture not in ENGINE_ARCHITECTURES:
            raise _invalid(f"architecture {architecture!r}: only {', '.join(ENGINE_ARCHITECTURES)} are filtered")
    profile = SeccompProfile(
        name=_text(header, "name", "[profile]"),
        default_errno=_errno_name(header, "default_errno", "[profile]"),
        architectures=architectures,
        groups=tuple(_group(each) for each in _list(document, "group", dict, "the file")),
    )
    _refuse_repeats("group", [group.name for group in profile.groups])
    _refuse_repeats("syscall", [syscall for group in profile.groups for syscall in group.syscalls])
    return profile


def _group(table: Mapping[str, Any]) -> Group:
    name = _text(table, "name", "a group")
    where = f"group {name!r}"
    _only(table, {"name", "why", "action", "errno", "syscalls", "when"}, where)
    try:
        action = Action(_text(table, "action", where))
    except ValueError as error:
        raise _invalid(f"{where}: action is allow or errno") from error
    if action is Action.ALLOW and "errno" in table:
        raise _invalid(f"{where}: an allowed call has no errno")
    if action is Action.ERRNO and "when" in table:
        # A list of bad arguments is evaded by the one it forgot; say which arguments are allowed instead.
        raise _invalid(f"{where}: conditions belong to allow groups only")
    syscalls = _strings(table, "syscalls", where)
    for syscall in syscalls:
        if not SYSCALL_NAME.fullmatch(syscall):
            raise _invalid(f"{where}: {syscall!r} is not a system call's name")
    return Group(
        name=name,
        why=_text(table, "why", where),
        action=action,
        errno_name=_errno_name(table, "errno", where) if action is Action.ERRNO else None,
        syscalls=syscalls,
        rows=tuple(_row(row, where) for row in _list(table, "when", dict, where)) if "when" in table else (),
    )


def _row(table: Mapping[str, Any], where: str) -> Row:
    _only(table, {"meaning", "all"}, f"{where}, when")
    conditions = tuple(_condition(each, where) for each in _list(table, "all", dict, where))
    _refuse_repeats(f"{where}: argument", [str(condition.argument) for condition in conditions])
    return Row(meaning=_text(table, "meaning", where), conditions=conditions)


def _condition(table: Mapping[str, Any], where: str) -> Condition:
    _only(table, {"argument", "any_of", "none_of", "mask"}, f"{where}, condition")
    argument = _number(table.get("argument"), where, LAST_ARGUMENT)
    if ("any_of" in table) == ("none_of" in table):
        raise _invalid(f"{where}: a condition has either any_of or none_of")
    if "none_of" in table:
        if "mask" in table:
            raise _invalid(f"{where}: none_of always compares the low 32 bits and takes no mask")
        return Condition(argument, none_of=_numbers(table, "none_of", where, LOW_HALF))
    mask = _number(table.get("mask", WHOLE_REGISTER), where, WHOLE_REGISTER)
    values = _numbers(table, "any_of", where, WHOLE_REGISTER)
    if mask == 0 or any(value & ~mask for value in values):
        raise _invalid(f"{where}: mask {mask:#x} makes the condition always or never true")
    return Condition(argument, any_of=values, mask=mask)


def _docker_rules(group: Group) -> Iterator[dict[str, Any]]:
    rule: dict[str, Any] = {
        "names": sorted(group.syscalls),
        "action": "SCMP_ACT_ALLOW" if group.action is Action.ALLOW else "SCMP_ACT_ERRNO",
        "args": [],
        "comment": group.name,
    }
    if group.errno_name is not None:
        rule["errnoRet"] = _errno_number(group.errno_name)
    if not group.rows:
        yield rule
    for row in group.rows:
        for matches in row.alternatives():
            yield rule | {"args": [_docker_argument(match) for match in matches]}


def _docker_argument(match: Match) -> dict[str, Any]:
    if match.mask == WHOLE_REGISTER:
        return {"index": match.argument, "op": "SCMP_CMP_EQ", "value": match.value, "valueTwo": 0}
    return {"index": match.argument, "op": "SCMP_CMP_MASKED_EQ", "value": match.mask, "valueTwo": match.value}


def _all_but(excluded: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Masks and values that cover every 32-bit number but `excluded`, none of them twice.

    Walks the binary tree of 32-bit numbers from the top bit: a branch without an excluded number is
    covered by one comparison of its leading bits, a branch with one is split.
    """
    branches = [(0, 0)]
    while branches:
        length, prefix = branches.pop()
        mask = LOW_HALF ^ (LOW_HALF >> length)
        if all(number & mask != prefix for number in excluded):
            yield mask, prefix
        elif length < LOW_HALF.bit_length():
            branches += [(length + 1, prefix | 1 << (31 - length)), (length + 1, prefix)]


def _invalid(problem: str) -> Internal:
    return Internal("seccomp_profile_invalid", f"The seccomp profile can't be used: {problem}.")


def _errno_number(name: str) -> int:
    return int(getattr(errno, name))


def _errno_name(table: Mapping[str, Any], key: str, where: str) -> str:
    name = _text(table, key, where)
    if not name.startswith("E") or not hasattr(errno, name):
        raise _invalid(f"{where}: {name!r} is not the name of an errno")
    return name


def _only(table: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(table) - known):
        raise _invalid(f"{where} has unknown keys: {', '.join(unknown)}")


def _typed(table: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = table.get(key)
    if not isinstance(value, kind) or not value:
        raise _invalid(f"{where} needs {key!r}, a {kind.__name__} that is not empty")
    return value


def _text(table: Mapping[str, Any], key: str, where: str) -> str:
    text = str(_typed(table, key, str, where))
    if not text.strip():
        raise _invalid(f"{where}: {key!r} is blank")
    return text


def _list(table: Mapping[str, Any], key: str, kind: type, where: str) -> list[Any]:
    values: list[Any] = _typed(table, key, list, where)
    if not all(isinstance(value, kind) for value in values):
        raise _invalid(f"{where}: every item of {key!r} must be a {kind.__name__}")
    return values


def _strings(table: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    values = _list(table, key, str, where)
    _refuse_repeats(f"{where}: {key}", values)
    return tuple(values)


def _numbers(table: Mapping[str, Any], key: str, where: str, largest: int) -> tuple[int, ...]:
    values = tuple(_number(value, where, largest) for value in _typed(table, key, list, where))
    _refuse_repeats(f"{where}: {key}", [str(value) for value in values])
    return values


def _number(value: Any, where: str, largest: int) -> int:
    if type(value) is not int or not 0 <= value <= largest:
        raise _invalid(f"{where}: {value!r} is not a whole number from 0 to {largest:#x}")
    return value


def _refuse_repeats(what: str, values: list[str]) -> None:
    if repeated := sorted({value for value in values if values.count(value) > 1}):
        raise _invalid(f"{what} decided more than once: {', '.join(repeated)}")
