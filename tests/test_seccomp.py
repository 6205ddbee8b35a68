"""The seccomp profile: read strictly, rendered the same every time, and in force in a real container.

The engine tests run each program of tests/seccomp twice: under our profile, and with no filter at all. The
second run is the twin that shows that a closed call would otherwise have gone further than our errno.
"""

from __future__ import annotations

import json
import os
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from isolator.model.errors import Internal
from isolator.seccomp import Action, Condition, SeccompProfile, load_profile, parse_profile

PROGRAMS = Path(__file__).parent / "seccomp"
PROBE = runpy.run_path(str(PROGRAMS / "probe.py"))
ELF32 = runpy.run_path(str(PROGRAMS / "elf32.py"))
PYTHON_IMAGE = os.environ.get("ISOLATOR_TEST_IMAGE_PYTHON", "isolator/agent-python:latest")
NODE_IMAGE = os.environ.get("ISOLATOR_TEST_IMAGE_NODE", "isolator/agent-node:latest")
SIGSYS = 31

SMALL = """
[profile]
name = "small"
default_errno = "EPERM"
architectures = ["x86_64"]
[[group]]
name = "open"
why = "because"
action = "allow"
syscalls = ["read", "write"]
[[group]]
name = "some"
why = "because"
action = "allow"
syscalls = ["socket"]
[[group.when]]
meaning = "unix"
all = [{ argument = 0, any_of = [1] }]
[[group]]
name = "shut"
why = "because"
action = "errno"
errno = "ENOSYS"
syscalls = ["clone3"]
"""


# --- reading and rendering


def test_every_group_and_row_says_why() -> None:
    profile = load_profile()
    assert all(len(group.why) >= 25 for group in profile.groups)
    assert all(row.meaning for group in profile.groups for row in group.rows)


def test_the_documented_table_is_the_profile() -> None:
    text = (Path(__file__).parent.parent / "docs" / "seccomp.md").read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    documented = [(row[0], row[1], row[2]) for row in cells if len(row) == 4][2:]  # past the heading
    fates = {
        group.name: group.errno_name or ("by argument" if group.rows else "open") for group in load_profile().groups
    }
    assert documented == [(group.name, fates[group.name], group.why) for group in load_profile().groups]
    meanings = [row.meaning for group in load_profile().groups for row in group.rows]
    assert set(meanings) <= {row[1] for row in cells if len(row) == 2}


def test_the_small_profile_is_read() -> None:
    profile = parse_profile(SMALL)
    assert [group.action for group in profile.groups] == [Action.ALLOW, Action.ALLOW, Action.ERRNO]
    rules = json.loads(profile.docker_json())["syscalls"]
    assert rules[1]["args"] == [{"index": 0, "op": "SCMP_CMP_EQ", "value": 1, "valueTwo": 0}]
    assert (rules[2]["action"], rules[2]["errnoRet"]) == ("SCMP_ACT_ERRNO", 38)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "small"', 'name = "small"\nextra = 1', "unknown keys: extra"),
        ("[profile]", "extra = 1\n[profile]", "unknown keys: extra"),
        ('why = "because"', "", "'why'"),
        ('why = "because"', 'why = "  "', "blank"),
        ('why = "because"', 'why = "because"\ncomment = "x"', "unknown keys: comment"),
        ('["x86_64"]', '["x86_64", "x86"]', "'x86'"),
        ('["x86_64"]', '["x32"]', "'x32'"),
        ('["x86_64"]', "[]", "architectures"),
        ('default_errno = "EPERM"', "", "default_errno"),
        ('default_errno = "EPERM"', 'default_errno = "allow"', "errno"),
        ('errno = "ENOSYS"\nsyscalls', 'errno = "ENOPE"\nsyscalls', "'ENOPE'"),
        ('errno = "ENOSYS"\nsyscalls', "syscalls", "errno"),
        ('action = "errno"', 'action = "allow"', "no errno"),
        ('action = "allow"', 'action = "log"', "allow or errno"),
        ('["clone3"]', '["read"]', "more than once: read"),
        ('["clone3"]', '["socket"]', "more than once: socket"),
        ('["read", "write"]', '["read", "read"]', "more than once: read"),
        ('["read", "write"]', '["read", "*"]', "'*'"),
        ('["read", "write"]', "[1]", "must be a str"),
        ('["read", "write"]', "[]", "syscalls"),
        ('name = "some"', 'name = "open"', "more than once: open"),
        (
            '["clone3"]',
            '["clone3"]\nwhen = [{meaning = "x", all = [{argument = 0, any_of = [1]}]}]',
            "allow groups only",
        ),
        ("all = [{ argument = 0, any_of = [1] }]", "all = []", "'all'"),
        ('meaning = "unix"', "", "'meaning'"),
        ("argument = 0, any_of = [1]", "argument = 6, any_of = [1]", "0x5"),
        ("argument = 0, any_of = [1]", "argument = true, any_of = [1]", "whole number"),
        ("argument = 0, any_of = [1]", "any_of = [1]", "whole number"),
        ("any_of = [1]", "any_of = [-1]", "whole number"),
        ("any_of = [1]", "any_of = []", "any_of"),
        ("any_of = [1]", "any_of = [1], none_of = [2]", "either"),
        ("any_of = [1]", "none_of = [0x1_0000_0000]", "whole number"),
        ("any_of = [1]", "none_of = [1], mask = 1", "no mask"),
        ("any_of = [1]", "any_of = [1], mask = 0", "always or never"),
        ("any_of = [1]", "any_of = [3], mask = 1", "always or never"),
        ("any_of = [1]", "any_of = [1], equals = 1", "unknown keys: equals"),
        # An engine reads two conditions on one argument as alternatives: the opposite of what stands there.
        (
            "any_of = [1] }",
            "any_of = [1] }, { argument = 0, none_of = [2] }",
            "argument decided more than once",
        ),
        ("[profile]", "[profile", "not TOML"),
    ],
)
def test_a_doubtful_profile_is_refused(old: str, new: str, says: str) -> None:
    assert old in SMALL
    with pytest.raises(Internal) as refusal:
        parse_profile(SMALL.replace(old, new, 1))
    assert refusal.value.code == "seccomp_profile_invalid"
    assert says in refusal.value.detail


@pytest.mark.parametrize("name", ["absent", "", "../agent", "/etc/passwd", "Agent", "agent\n", "agent\0"])
def test_a_profile_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(Internal) as refusal:
        load_profile(name)
    assert refusal.value.code == "seccomp_profile_missing"


def test_rendering_is_canonical_and_its_digest_follows_it() -> None:
    one, two = load_profile(), load_profile()
    assert (one.docker_json(), one.digest) == (two.docker_json(), two.digest)
    assert one.docker_json().isascii()
    assert "\n" not in one.docker_json()
    assert one.digest.startswith("sha256:")
    assert parse_profile(SMALL).digest != parse_profile(SMALL.replace('"write"', '"writev"')).digest


def test_no_sub_architecture_and_nothing_allowed_by_default() -> None:
    document = json.loads(load_profile().docker_json())
    assert document["defaultAction"] == "SCMP_ACT_ERRNO"
    assert document["archMap"] == [
        {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": []},
        {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": []},
    ]
    assert {rule["action"] for rule in document["syscalls"]} == {"SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"}


@pytest.mark.parametrize("excluded", [(0,), (0xFFFF_FFFF,), (31,), (0x5412, 0x541C, 0x5423), (0x5412, 0x5413)])
def test_none_of_covers_every_other_number_and_those_never(excluded: tuple[int, ...]) -> None:
    matches = Condition(1, none_of=excluded).matches()

    def allowed(register: int) -> int:
        return sum(register & match.mask == match.value for match in matches)

    neighbours = {number ^ 1 << bit for number in excluded for bit in range(32)} - set(excluded)
    for high in (0, 1 << 32, 0xFFFF_FFFF << 32):
        assert all(allowed(high | number) == 0 for number in excluded)
        assert all(allowed(high | number) == 1 for number in neighbours)
    covered = sum(2 ** (32 - match.mask.bit_count()) for match in matches)
    assert covered == 2**32 - len(excluded)


def test_every_call_of_the_kernel_headers_is_decided() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("the kernel's headers are not installed")
    words = [line.split() for line in header.read_text().splitlines()]
    names = {word[1].removeprefix("__NR_") for word in words if len(word) == 3 and word[1].startswith("__NR_")}
    assert len(names) > 350
    assert names - {syscall for group in load_profile().groups for syscall in group.syscalls} == set()


# --- in a real container

RunProgram = Callable[[str, list[str], str], tuple[int, str]]


@pytest.fixture(scope="module")
def profile() -> SeccompProfile:
    return load_profile()


@pytest.fixture(scope="module")
def run_program() -> Iterator[RunProgram]:
    """Runs a program in a box hardened as agents are; returns its exit code and standard output."""
    engine = docker.from_env(timeout=60)

    def run(image: str, program: list[str], seccomp: str) -> tuple[int, str]:
        try:
            engine.images.get(image)
        except docker.errors.ImageNotFound:
            pytest.skip(f"{image} is not built: run `isolator image build`")
        box = engine.containers.create(
            image,
            entrypoint=program[:1],
            command=program[1:],
            user="10001:10001",
            working_dir="/tmp",
            cap_drop=["ALL"],
            security_opt=["no-new-privileges:true", f"seccomp={seccomp}"],
            network_mode="none",
            read_only=True,
            tmpfs={"/tmp": "rw,noexec,nosuid,nodev,size=64m,mode=1777"},
            mem_limit="512m",
            pids_limit=256,
        )
        try:
            box.start()
            code = box.wait(timeout=60)["StatusCode"]
            return code, box.logs(stdout=True, stderr=False).decode()
        finally:
            box.remove(force=True, v=True)

    yield run
    engine.close()


def _python(file: str) -> list[str]:
    return ["python3", "-c", (PROGRAMS / file).read_text()]


@pytest.fixture(scope="module")
def filtered(run_program: RunProgram, profile: SeccompProfile) -> dict[str, str]:
    """What the probe answered under our profile."""
    code, output = run_program(PYTHON_IMAGE, _python("probe.py"), profile.docker_json())
    assert code == 0, output
    return json.loads(output)


@pytest.fixture(scope="module")
def unfiltered(run_program: RunProgram) -> dict[str, str]:
    """What it answered without any filter."""
    code, output = run_program(PYTHON_IMAGE, _python("probe.py"), "unconfined")
    assert code == 0, output
    return json.loads(output)


@pytest.mark.engine
@pytest.mark.parametrize("name", PROBE["PROBES"])
def test_closed(name: str, filtered: dict[str, str]) -> None:
    if name not in filtered:
        pytest.skip("this architecture has no such call")
    assert filtered[name] == PROBE["PROBES"][name].closed


@pytest.mark.engine
@pytest.mark.parametrize("name", [name for name, probe in PROBE["PROBES"].items() if probe.twin])
def test_the_kernel_alone_would_not_have_closed(name: str, unfiltered: dict[str, str]) -> None:
    if unfiltered.get(name, "ENOSYS") == "ENOSYS":
        pytest.skip("this kernel has no such call")
    assert unfiltered[name] != PROBE["PROBES"][name].closed


@pytest.mark.engine
@pytest.mark.parametrize("name", PROBE["OPEN"])
def test_neighbours_of_closed_calls_stay_open(name: str, filtered: dict[str, str]) -> None:
    assert filtered[f"open: {name}"] == PROBE["OPEN"][name][1]


@pytest.mark.engine
def test_a_filter_is_in_force_and_its_absence_is_seen(filtered: dict[str, str], unfiltered: dict[str, str]) -> None:
    assert (filtered["status"], unfiltered["status"]) == ("2", "0")


@pytest.mark.engine
@pytest.mark.parametrize("way", ["x32", "int 0x80"])
def test_other_abis_kill(way: str, filtered: dict[str, str], unfiltered: dict[str, str]) -> None:
    if way not in filtered:
        pytest.skip("x86_64 only")
    assert filtered[way] == f"signal {SIGSYS}"
    assert unfiltered[way] in {"ok", "ENOSYS"}  # ENOSYS: a kernel built without that ABI


@pytest.mark.engine
def test_a_32_bit_binary_runs_without_and_dies_with_the_filter(
    run_program: RunProgram, profile: SeccompProfile
) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("x86_64 only")
    # From a memory file, as everything writable in the box is noexec.
    start = (
        "import os; fd = os.memfd_create('x'); "
        f"os.write(fd, bytes.fromhex('{ELF32['vsock_opener']().hex()}')); os.execve(fd, ['x'], {{}})"
    )
    assert run_program(PYTHON_IMAGE, ["python3", "-c", start], "unconfined")[0] in {42, 43}
    assert run_program(PYTHON_IMAGE, ["python3", "-c", start], profile.docker_json())[0] == 128 + SIGSYS


def _report(outcome: tuple[int, str]) -> dict[str, Any]:
    code, output = outcome
    assert code == 0, output
    return json.loads(output.splitlines()[-1])


@pytest.mark.engine
@pytest.mark.parametrize(
    ("image", "program", "least"),
    [
        (PYTHON_IMAGE, ["python3", "-c", "workload.py"], 20),
        (NODE_IMAGE, ["node", "-e", "workload.js"], 11),
    ],
    ids=["python", "node"],
)
def test_ordinary_programs_work(
    image: str, program: list[str], least: int, run_program: RunProgram, profile: SeccompProfile
) -> None:
    command = [*program[:2], (PROGRAMS / program[2]).read_text()]
    report = _report(run_program(image, command, profile.docker_json()))
    failed = {name: text for name, text in report.items() if text != "ok" and not text.startswith("absent: ")}
    assert not failed, "\n".join(f"{name}: {text}" for name, text in failed.items())
    assert sum(text == "ok" for text in report.values()) >= least
