"""An agent sees the folders its caller named and may reach, as they were when they were checked, and no other."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attack_helpers import attack, said, team
from conftest import Answer, RunningDaemon, mountinfo, running_daemon

pytestmark = pytest.mark.engine


def asking(daemon: RunningDaemon, source: Path | str, target: str = "/data", mode: str = "ro", **body: Any) -> Answer:
    """A spawn with one mount, or with a workspace where the target is /workspace."""
    if target == "/workspace":
        body["workspace"] = {"source": str(source), "mode": mode}
    else:
        body["mounts"] = [{"source": str(source), "target": target, "mode": mode}]
    return daemon.post("/v1/agents", {"team": team(daemon), "command": ["true"], "network": "none", **body})


def refused(answer: Answer) -> str:
    assert answer.status in (400, 403, 404), answer.content
    code: str = answer.json["code"]
    return code


@pytest.fixture(autouse=True)
def _nothing_staged(daemon: RunningDaemon) -> Iterator[None]:
    """Whatever a test did, no staged mount stays, not even while the agent runs."""
    yield
    staged = str(daemon.home / "run" / "mounts")
    assert not [line for line in mountinfo() if staged in line]
    assert not list(Path(staged).iterdir())


def test_the_workspace_is_writable_as_its_owner(daemon: RunningDaemon) -> None:
    folder = daemon.workspace("own", uid=1000)
    (folder / "given").write_text("from the host")
    task = {"list": ["/workspace"], "read": ["/workspace/given"], "write": ["/workspace/made", "/made"]}
    seen = attack(daemon, "files", task, workspace={"source": str(folder)}, network="none")
    assert seen["uid"] == 1000
    assert seen["list"] == {"/workspace": ["given"]}
    assert seen["read"]["/workspace/given"] == "from the host"
    assert seen["write"] == {"/workspace/made": "done", "/made": "EROFS"}
    assert (folder / "made").read_text() == "written by the agent"
    assert (folder / "made").stat().st_uid == 1000


def test_read_only_is_read_only(daemon: RunningDaemon) -> None:
    folder, file = daemon.workspace("readable"), daemon.workspace("around") / "config.json"
    (folder / "given").write_text("from the host")
    file.write_text("{}")
    os.chown(folder / "given", 1000, 1000)
    os.chown(file, 1000, 1000)
    task = {"read": ["/data/given", "/config.json"], "write": ["/data/given", "/data/new", "/config.json"]}
    mounts = [{"source": str(folder), "target": "/data"}, {"source": str(file), "target": "/config.json"}]
    seen = attack(daemon, "files", task, mounts=mounts, network="none")
    assert seen["uid"] == 1000
    assert seen["read"] == {"/data/given": "from the host", "/config.json": "{}"}
    assert set(seen["write"].values()) == {"EROFS"}
    assert seen["remount"] != 0
    workspace = attack(
        daemon, "files", {"write": ["/workspace/x"]}, workspace={"source": str(folder), "mode": "ro"}, network="none"
    )
    assert workspace["write"] == {"/workspace/x": "EROFS"}


@pytest.fixture
def below(daemon: RunningDaemon) -> Iterator[Path]:
    """A folder with another file system mounted below it, which holds a file anybody may write."""
    folder = daemon.workspace(f"layered-{time.monotonic_ns()}")
    inner = folder / "inner"
    inner.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0777", "none", str(inner)], check=True, timeout=10)
    (inner / "canary").write_text("another file system")
    yield folder
    for line in reversed(mountinfo()):
        if str(folder) in line.split()[4]:
            subprocess.run(["umount", line.split()[4]], check=True, timeout=10)


@pytest.mark.parametrize("mode", ["ro", "rw"])
def test_what_is_mounted_below_a_source_stays_outside(daemon: RunningDaemon, below: Path, mode: str) -> None:
    """A read-only bind covers only the top mount: what lies below would stay writable. So it does not come along."""
    task = {"list": ["/data", "/data/inner"], "write": ["/data/inner/canary"]}
    mounts = [{"source": str(below), "target": "/data", "mode": mode}]
    seen = attack(daemon, "files", task, mounts=mounts, network="none")
    assert seen["list"] == {"/data": ["inner"], "/data/inner": []}
    assert (below / "inner" / "canary").read_text() == "another file system"


def test_what_is_mounted_later_stays_outside_too(daemon: RunningDaemon, below: Path) -> None:
    (below / "later").mkdir()
    script = "import os, time; print('up', flush=True); time.sleep(2); print('saw', os.listdir('/data/later'))"
    mounts = [{"source": str(below), "target": "/data"}]
    agent = daemon.spawn("python3", "-uc", script, team=team(daemon), mounts=mounts, network="none")
    said(daemon, agent, "up")
    subprocess.run(["mount", "-t", "tmpfs", "none", str(below / "later")], check=True, timeout=10)
    (below / "later" / "canary").write_text("")
    assert said(daemon, agent, "saw").splitlines()[-1] == "saw []"


def test_links_lead_nowhere(daemon: RunningDaemon) -> None:
    folder = daemon.workspace("linked")
    (folder / "real").mkdir()
    (folder / "final").symlink_to("/etc")
    (folder / "sideways").symlink_to(folder / "real")
    (folder / "through").symlink_to(folder)
    (folder / "file").symlink_to("/etc/shadow")
    for target in ("/data", "/workspace"):
        for name in ("final", "sideways", "through/real", "file"):
            assert refused(asking(daemon, folder / name, target)) == "mount_is_link", name
        assert asking(daemon, folder / "real", target).status == 201


def test_paths_that_wander_are_refused(daemon: RunningDaemon) -> None:
    folder = daemon.workspace("wandering")
    for path in (
        f"{folder}/../wandering",
        f"{folder}/..",
        f"{folder}/./x",
        f"/{folder}",
        "wandering",
        f"{folder}\n",
        "",
    ):
        assert refused(asking(daemon, path)) in ("mount_path_invalid", "invalid_request"), path
    assert refused(asking(daemon, daemon.home)) in ("mount_outside_roots", "mount_system_folder")
    assert refused(asking(daemon, "/home")) == "mount_outside_roots"
    assert refused(asking(daemon, f"{daemon.roots}-other")) == "mount_outside_roots"
    assert asking(daemon, folder).status == 201


def test_what_is_missing_or_of_another_kind_is_refused(daemon: RunningDaemon) -> None:
    folder = daemon.workspace("kinds")
    (folder / "file").write_text("")
    os.mkfifo(folder / "fifo")
    os.mknod(folder / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        for kind in ("fifo", "device", "socket"):
            assert refused(asking(daemon, folder / kind)) == "mount_kind_refused", kind
            assert refused(asking(daemon, folder / kind, "/workspace")) in (
                "mount_kind_refused",
                "workspace_not_a_folder",
            )
    assert refused(asking(daemon, folder / "missing")) == "mount_not_found"
    assert not (folder / "missing").exists(), "the engine would have made it"
    assert refused(asking(daemon, folder / "file", "/workspace")) == "workspace_not_a_folder"
    assert refused(asking(daemon, folder / "file" / "under")) == "mount_not_found"
    assert asking(daemon, folder / "file").status == 201


@pytest.mark.parametrize(
    "target",
    ["/", "/etc", "/etc/passwd", "/usr", "/usr/bin", "/run", "/run/isolator", "/run/isolator/guest.py", "/run/secrets",
     "/proc", "/proc/self", "/sys/fs/cgroup", "/dev/shm", "/tmp", "/bin", "/lib", "/data/../etc", "data", "/data//x"],
)  # fmt: skip
def test_targets_of_the_box_itself_are_refused(daemon: RunningDaemon, target: str) -> None:
    folder = daemon.workspace(f"target-{time.monotonic_ns()}")
    assert refused(asking(daemon, folder, target)) == "mount_target_invalid"


def test_targets_may_not_lie_in_each_other(daemon: RunningDaemon) -> None:
    folder = str(daemon.workspace("nested"))
    for other in ("/data", "/data/deeper", "/workspace/x"):
        mounts = [{"source": folder, "target": "/data"}, {"source": folder, "target": other}]
        body = {"workspace": {"source": folder}, "mounts": mounts}
        answer = daemon.post("/v1/agents", {"team": team(daemon), "command": ["true"], "network": "none", **body})
        assert refused(answer) == "mount_target_invalid", other
    mounts = [{"source": folder, "target": "/data"}, {"source": folder, "target": "/data2"}]
    assert asking(daemon, folder, "/workspace", mounts=mounts).status == 201


def test_system_folders_and_our_own_are_refused_whatever_the_roots(engine, image_pins) -> None:
    with running_daemon(engine, image_pins, ISOLATOR_WORKSPACE_ROOTS="/") as daemon:
        (daemon.home / "secrets").mkdir()
        own = [daemon.home / name for name in ("state", "run", "secrets", "state/audit", "run/agents")]
        parents = [daemon.home, daemon.home.parent, Path("/")]
        system = ["/etc", "/etc/shadow", "/usr", "/proc", "/proc/1/root", "/sys", "/dev", "/dev/shm", "/run", "/boot",
                  "/var", "/var/lib", "/var/lib/docker", "/var/run/docker.sock", "/lib", "/bin"]  # fmt: skip
        for path in (*own, *parents, *system):
            assert refused(asking(daemon, path)) in ("mount_system_folder", "mount_is_link"), path
        folder = daemon.workspace("below-the-root")
        assert asking(daemon, folder).status == 201


def test_a_caller_lends_no_more_than_their_own_rights(daemon: RunningDaemon, as_user: Callable[[int], Any]) -> None:
    daemon.socket.chmod(0o666)
    mine, theirs = daemon.workspace("of-1000", 1000), daemon.workspace("of-2000", 2000)
    closed, inner = daemon.workspace("closed", 2000), daemon.roots / "closed" / "inner"
    inner.mkdir()
    os.chown(inner, 1000, 1000)
    for folder in (mine, theirs):
        folder.chmod(0o755)
    closed.chmod(0o700)
    where = {"team": team(daemon, "user")}
    with as_user(1000):
        assert refused(asking(daemon, theirs, "/workspace", "rw", **where)) == "mount_not_reachable"
        assert refused(asking(daemon, theirs, mode="rw", **where)) == "mount_not_reachable"
        assert refused(asking(daemon, closed, **where)) == "mount_not_reachable"
        assert refused(asking(daemon, inner, **where)) == "mount_not_reachable", "its parent is closed"
        assert asking(daemon, mine, "/workspace", "rw", **where).json["uid"] == 1000
        assert asking(daemon, theirs, **where).json["uid"] == 1000, "readable, and not run as its owner"
        task = {"list": ["/data"], "write": ["/data/x", "/workspace/x"]}
        mounts = [{"source": str(theirs), "target": "/data"}]
        seen = attack(daemon, "files", task, **where, workspace={"source": str(mine)}, mounts=mounts, network="none")
    assert seen["uid"] == 1000
    assert seen["write"] == {"/data/x": "EROFS", "/workspace/x": "done"}


def test_an_agent_is_never_root_even_where_the_folder_is_roots(daemon: RunningDaemon) -> None:
    folder = daemon.workspace("of-root", 0)
    folder.chmod(0o755)
    agent = asking(daemon, folder, "/workspace", "rw").json
    assert agent["uid"] == 10001
    assert "workspace_not_owned" in [warning["code"] for warning in agent["warnings"]]
    seen = attack(daemon, "files", {"write": ["/workspace/x"]}, workspace={"source": str(folder)}, network="none")
    assert seen["write"] == {"/workspace/x": "EACCES"}


MAKES_SETUID = """
import ctypes, json, os, shutil
def attempt(act):
    try:
        act()
    except OSError as error:
        return os.strerror(error.errno)
    return "done"
os.umask(0)
shutil.copy("/usr/bin/true", "tool")
tries = {
    "chmod": lambda: os.chmod("tool", 0o4755),
    "setgid": lambda: os.chmod("tool", 0o2755),
    "fchmod": lambda: os.fchmod(os.open("tool", os.O_RDONLY), 0o4755),
    "open": lambda: os.open("opened", os.O_CREAT | os.O_WRONLY, 0o4755),
    "nameless": lambda: os.open(".", os.O_TMPFILE | os.O_WRONLY, 0o4755),
    "mkfifo": lambda: os.mkfifo("pipe", 0o4755),
    "mknod": lambda: os.mknod("node", 0o104755),
    "plain": lambda: os.chmod("tool", 0o755),
    "new": lambda: os.open("new", os.O_CREAT | os.O_WRONLY, 0o755),
    "pipe": lambda: os.mkfifo("pipe", 0o600),
}
os.mkdir("folder", 0o6755)
print(json.dumps({name: attempt(act) for name, act in tries.items()}))
"""


def test_it_can_not_leave_a_setuid_file_on_the_host(daemon: RunningDaemon) -> None:
    """Any user of the host could run one with the rights of the workspace's owner."""
    folder = daemon.workspace("setuid", uid=1000)
    agent = daemon.spawn(
        "python3", "-c", MAKES_SETUID, team=team(daemon), network="none", workspace={"source": str(folder)}
    )
    daemon.wait(agent)
    tried = json.loads(daemon.output(agent))
    allowed = {"plain", "new", "pipe"}
    assert {name for name, outcome in tried.items() if outcome == "done"} == allowed
    assert {outcome for name, outcome in tried.items() if name not in allowed} == {"Operation not permitted"}
    left = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert left == {"tool": 0o755, "new": 0o755, "pipe": 0o600, "folder": 0o755}


@pytest.mark.parametrize("place", ["itself", "parent"])
def test_swapping_a_folder_for_a_link_gains_nothing(daemon: RunningDaemon, tmp_path: Path, place: str) -> None:
    """The attacker owns the folder's parent and exchanges it for a link to a folder they must not see, ever faster."""
    outside = tmp_path / "outside"
    (outside / "work").mkdir(parents=True)
    for folder in (outside, outside / "work"):
        (folder / "canary").write_text("")
    base = daemon.workspace(f"race-{place}")
    (base / "top" / "work").mkdir(parents=True)
    for folder in (base / "top", base / "top" / "work"):
        (folder / "mine").write_text("")
    swapped, link = (base / "top" / "work", outside / "work") if place == "itself" else (base / "top", outside)
    decoy = base / "decoy"
    decoy.symlink_to(link)
    swapper = Path(__file__).parent / "attacks" / "swapper.py"
    with subprocess.Popen(
        ["python3", str(swapper), str(swapped), str(decoy)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as attacker:
        assert attacker.stdin is not None
        assert attacker.stdout is not None
        assert attacker.stdout.readline() == "swapping\n"
        outcomes: dict[str, int] = {}
        for _ in range(30):
            answer = asking(daemon, base / "top" / "work", "/workspace", command=["ls", "/workspace"])
            if answer.status == 201:
                daemon.wait(answer.json)
                assert daemon.output(answer.json["id"]) == "mine\n"
                word = "right"
            else:
                word = answer.json["code"]
                assert word in ("mount_is_link", "mount_not_found", "box_mismatch"), answer.content
            outcomes[word] = outcomes.get(word, 0) + 1
        swaps, _ = attacker.communicate("end\n", timeout=20)
    assert int(swaps) > 1000
    assert outcomes.get("right", 0) > 0, outcomes
    assert outcomes.get("mount_is_link", 0) > 0, outcomes
