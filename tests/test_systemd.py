"""The shipped units: systemd accepts them, they stay as closed as they can be, and never hide a mount.

What only a booted system can show (staged mounts reach a container, watchdog, activation) is in
scripts/try-systemd; here is what can be told from the files.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from isolator.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
UNITS = ROOT / "systemd"
SERVICE = UNITS / "isolator.service"
POOL = UNITS / "isolator-pool.conf"
HIGHEST_EXPOSURE = 50  # tenths; a unit without any hardening has 96
PRIVATE_MOUNTS = ROOT / "scripts/trial/private-mount-options.txt"


@pytest.fixture(scope="module")
def analyze() -> str:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        if os.environ.get("ISOLATOR_REQUIRE_DOCKER") == "1":
            pytest.fail("systemd-analyze is missing: apt-get install systemd")
        pytest.skip("systemd-analyze is not installed")
    return tool


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units as they ship, except that the program, which is not installed here, is one that is."""
    for name in ("isolator.service", "isolator.socket"):
        text = (UNITS / name).read_text()
        assert name != "isolator.service" or text.count("ExecStart=/opt/isolator/bin/isolator daemon\n") == 1
        text = text.replace("/opt/isolator/bin/isolator daemon", "/bin/true")
        (tmp_path / name).write_text(text)
    return tmp_path


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def verify(analyze: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return run(analyze, "verify", "--man=no", str(folder / "isolator.service"), str(folder / "isolator.socket"))


def exposure(analyze: str, folder: Path, highest: int) -> subprocess.CompletedProcess[str]:
    service = str(folder / "isolator.service")
    return run(analyze, "security", "--offline=true", "--no-pager", f"--threshold={highest}", service)


def options(unit: Path) -> dict[str, list[str]]:
    """Every option of a unit with its values, in order."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if match := re.fullmatch(r"([A-Za-z0-9]+)=(.*)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


def test_systemd_accepts_the_units(analyze: str, units: Path) -> None:
    done = verify(analyze, units)
    ours = [line for line in done.stderr.splitlines() if "isolator" in line]
    assert (done.returncode, ours) == (0, []), done.stderr


def test_a_misspelt_option_would_be_noticed(analyze: str, units: Path) -> None:
    service = units / "isolator.service"
    service.write_text(service.read_text().replace("NoNewPrivileges=", "NoNewPriviledges="))
    assert "NoNewPriviledges" in verify(analyze, units).stderr


def test_exposure_stays_as_low_as_it_is(analyze: str, units: Path) -> None:
    done = exposure(analyze, units, HIGHEST_EXPOSURE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def test_a_loosened_unit_is_over_the_threshold(analyze: str, units: Path) -> None:
    service = units / "isolator.service"
    service.write_text(service.read_text().replace("NoNewPrivileges=yes", "NoNewPrivileges=no"))
    assert exposure(analyze, units, HIGHEST_EXPOSURE).returncode != 0


def test_no_option_gives_the_service_its_own_mounts() -> None:
    """In a mount namespace of its own the daemon's staged mounts would be hidden from the Docker Engine.

    The engine would then bind the empty folder below the mount into the agent, and nothing would tell: the
    agent starts, with an empty workspace. MountFlags=shared does not help, the namespace stays downstream.
    """
    forbidden = {
        line.partition("=")[0] for line in PRIVATE_MOUNTS.read_text().splitlines() if line and not line.startswith("#")
    }
    assert {"ProtectSystem", "PrivateTmp", "PrivateDevices", "ProtectProc", "ReadOnlyPaths"} <= forbidden
    assert forbidden.isdisjoint(options(SERVICE)), forbidden & set(options(SERVICE))


def test_openat2_stays_usable() -> None:
    """RestrictSUIDSGID answers ENOSYS to openat2: seen under the real unit, where every mount was refused."""
    assert "RestrictSUIDSGID" not in options(SERVICE)
    assert "openat2" not in " ".join(value for value in options(SERVICE)["SystemCallFilter"] if value[:1] == "~")


def test_privileges_are_the_documented_ones() -> None:
    """A capability is added here, in the unit's comment and in docs/service.md together, or not at all."""
    unit = options(SERVICE)
    granted = {name for value in unit["CapabilityBoundingSet"] for name in value.split()}
    assert granted == {
        "CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_SETUID", "CAP_SETGID",
        "CAP_DAC_OVERRIDE", "CAP_CHOWN",
    }  # fmt: skip
    documented = (ROOT / "docs/service.md").read_text()
    assert all(name.removeprefix("CAP_") in documented for name in granted)
    assert unit["NoNewPrivileges"] == ["yes"]
    assert unit["AmbientCapabilities"] == [""]
    assert "User" not in unit


def test_the_pools_drop_in_adds_what_entering_a_box_needs_and_no_more(analyze: str, units: Path) -> None:
    drop_in = options(POOL)
    assert drop_in == {"CapabilityBoundingSet": ["CAP_SYS_CHROOT"], "RestrictNamespaces": ["mnt"]}
    assert "CAP_SYS_CHROOT" not in SERVICE.read_text(), "without a pool nobody needs it"
    folder = units / "isolator.service.d"
    folder.mkdir()
    (folder / "pool.conf").write_text(POOL.read_text())
    done = verify(analyze, units)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "isolator" in line]) == (0, [])
    assert "isolator-pool.conf" in (ROOT / "docs/service.md").read_text()


def test_agents_and_their_mounts_outlive_the_daemon() -> None:
    unit = options(SERVICE)
    assert unit["KillMode"] == ["process"]
    assert unit["RuntimeDirectoryPreserve"] == ["yes"]


def test_a_stopped_engine_does_not_stop_the_daemon() -> None:
    unit = options(SERVICE)
    assert "docker.service" in " ".join(unit["After"] + unit["Wants"])
    for binding in ("Requires", "BindsTo", "Requisite", "PartOf", "StopPropagatedFrom"):
        assert "docker" not in " ".join(unit.get(binding, [])), binding


def test_the_self_test_can_see_packets() -> None:
    """A packet filter on the service would make its own network self-test pass on an open host."""
    assert not {"IPAddressDeny", "IPIngressFilterPath", "PrivateNetwork"} & set(options(SERVICE))


def test_only_the_group_may_connect() -> None:
    unit = options(UNITS / "isolator.socket")
    assert unit["SocketMode"] == ["0660"]
    assert unit["SocketUser"] == ["root"]
    assert unit["SocketGroup"] == ["isolator"]
    assert unit["ListenStream"] == ["/run/isolator/isolator.sock"]
    assert unit["Accept"] == ["no"]


def test_sysusers_makes_the_group_and_reserves_the_agents_uid(tmp_path: Path) -> None:
    tool = shutil.which("systemd-sysusers")
    if tool is None:
        pytest.skip("systemd-sysusers is not installed")
    (tmp_path / "etc").mkdir()
    done = run(tool, f"--root={tmp_path}", str(UNITS / "isolator.sysusers"))
    assert done.returncode == 0, done.stderr
    accounts = [line.split(":") for line in (tmp_path / "etc/passwd").read_text().splitlines()]
    agent_uid = str(Settings.model_fields["agent_uid"].default)
    assert [(one[0], one[2], one[6]) for one in accounts] == [("isolator-agent", agent_uid, "/usr/sbin/nologin")]
    groups = [line.split(":") for line in (tmp_path / "etc/group").read_text().splitlines()]
    members = {one[0]: one[3] for one in groups}
    assert members == {"isolator": "", "isolator-agent": ""}, "nobody may connect unless added by a person"


def test_tmpfiles_never_clean_by_age() -> None:
    lines = [
        line.split()
        for line in (UNITS / "isolator.tmpfiles").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert all(line[0] == "d" and line[5] == "-" for line in lines)
    modes = {line[1]: line[2] for line in lines}
    assert modes["/run/isolator"] == options(SERVICE)["RuntimeDirectoryMode"][0]
    assert modes["/var/lib/isolator"] == options(SERVICE)["StateDirectoryMode"][0]
    assert {modes["/run/isolator/mounts"], modes["/etc/isolator/secrets"]} == {"0700"}
