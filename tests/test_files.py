"""Files in a running agent's mounts, on a real box: what they do, and every way out of a mount that was thought of.

The attacks come first; each stands beside a "can", so that a daemon that refuses everything would fail too.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import json
import os
import random
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import docker
import psutil
import pytest
from api_helpers import AsUser, assert_problem, open_to_everybody, raw_connection, read_to_end
from attack_helpers import audit_entries, program, said, team
from conftest import Answer, RunningDaemon, UnixConnection, running_daemon, wait_for

from isolator.client import Client, ProblemError

pytestmark = pytest.mark.engine
UID = 1000
MIB = 1 << 20


@dataclass
class Box:
    """A running agent with a workspace, a second folder, a read-only one and a file of its own."""

    daemon: RunningDaemon
    agent: str
    workspace: Path
    data: Path
    fixed: Path
    outside: Path

    @property
    def base(self) -> str:
        return f"/v1/agents/{self.agent}/files"

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.daemon.request(method, self.base + path, body, named)

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, **headers)

    def put(self, path: str, body: bytes = b"", **headers: str) -> Answer:
        return self.ask("PUT", path, body, **headers)

    def names(self, path: str) -> list[str]:
        return sorted(item["name"] for item in self.get(f"{path}?list").json["items"])

    def owned(self, path: Path) -> Path:
        os.chown(path, UID, UID, follow_symlinks=False)
        return path


@pytest.fixture(scope="module")
def daemon(engine: docker.DockerClient, image_pins: dict[str, str]) -> Iterator[RunningDaemon]:
    with running_daemon(engine, image_pins, ISOLATOR_REQUEST_TIMEOUT="2") as running:
        yield running


@pytest.fixture(scope="module")
def box(daemon: RunningDaemon) -> Box:
    folders = [daemon.workspace(name, UID) for name in ("ws", "data", "fixed", "outside")]
    (folders[2] / "given").write_bytes(b"from the host")
    (folders[3] / "file").write_bytes(b"outside")
    single = daemon.roots / "single.txt"
    single.write_bytes(b"a file of its own")
    single.chmod(0o644)
    mounts = [
        {"source": str(folders[1]), "target": "/data", "mode": "rw"},
        {"source": str(folders[2]), "target": "/fixed"},
        {"source": str(single), "target": "/single.txt"},
    ]
    workspace = {"source": str(folders[0])}
    agent = daemon.spawn("sleep", "600", team=team(daemon), workspace=workspace, mounts=mounts, network="none")
    assert agent["uid"] == UID
    return Box(daemon, agent["id"], *folders)


# attacks


@pytest.mark.parametrize(
    "path",
    [
        *("/workspace/../etc/passwd", "/workspace/%2e%2e/etc/passwd", "/workspace/x/..", "/..", "/%2e%2e/%2e%2e/etc"),
        *("/workspace/./x", "//workspace", "/workspace//x", "/workspace/", "/workspace/..%2fetc", "/workspace/a%00b"),
        *("/%2Fetc/passwd", "/workspace/%", "/workspace/" + "a" * 256),
    ],
)
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_a_path_that_wanders_is_refused_before_anybody_resolves_it(box: Box, method: str, path: str) -> None:
    before = sorted(box.workspace.rglob("*"))
    with raw_connection(box.daemon.socket) as connection:
        head = f"{method} {box.base}{path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode())
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 400 "), answer[:300]
    assert b'"file_path_invalid"' in answer
    assert sorted(box.workspace.rglob("*")) == before


@pytest.mark.parametrize(
    "path", ["/tmp/x", "/etc/passwd", "/proc/self/environ", "/", "/run/isolator/guest.py", "/dat", "/data2/x", "/root"]
)
def test_what_is_no_mount_is_outside(box: Box, path: str) -> None:
    problem = assert_problem(box.get(path), 403, "file_outside_mounts")
    assert problem["mounts"] == ["/workspace", "/data", "/fixed", "/single.txt"]


def test_links_out_lead_nowhere(box: Box) -> None:
    targets = {
        "host": str(box.outside),
        "absolute": "/data",
        "climbing": "../../../..",
        "own-root": "/",
        "proc": "/proc/1/root",
        "self": "/proc/self/root",
        "sideways": "../data",
        "circle": "circle",
    }
    (box.data / "file").write_bytes(b"other mount")
    for name, target in targets.items():
        link = box.workspace / name
        link.symlink_to(target)
        box.owned(link)
        inner = f"/workspace/{name}/file"
        answers = [
            box.get(inner),
            box.get(f"/workspace/{name}"),
            box.get(f"/workspace/{name}?list"),
            box.ask("HEAD", f"/workspace/{name}"),
            box.get(f"{inner}?stat"),
            box.put(inner, b"written"),
            box.put(f"/workspace/{name}/new/deep?parents", b"written"),
            box.ask("DELETE", inner),
            box.ask("POST", f"/workspace/{name}/made?mkdir"),
            box.ask("POST", f"{inner}?rename=/workspace/stolen"),
            box.ask("POST", f"{inner}?copy=/workspace/stolen"),
        ]
        assert {answer.status for answer in answers} <= {403, 404}, (name, [answer.status for answer in answers])
        assert box.get(f"/workspace/{name}?stat").json["target"] == target
    assert not (box.workspace / "stolen").exists()
    assert [path.name for path in box.outside.iterdir()] == ["file"]
    assert (box.outside / "file").read_bytes() == b"outside"
    assert (box.data / "file").read_bytes() == b"other mount"
    # A link that stays is followed; the last name of what changes is never followed.
    (box.workspace / "real").mkdir()
    box.owned(box.workspace / "real")
    (box.workspace / "near").symlink_to("real")
    assert box.put("/workspace/near/file", b"through a link").status == 201
    assert (box.workspace / "real" / "file").read_bytes() == b"through a link"
    assert box.get("/workspace/near/file").content == b"through a link"
    (box.workspace / "final").symlink_to(box.outside / "file")
    assert box.put("/workspace/final", b"instead of the link").status == 200
    assert not (box.workspace / "final").is_symlink()
    assert (box.outside / "file").read_bytes() == b"outside"
    assert box.ask("DELETE", "/workspace/host").status == 204
    assert (box.outside / "file").read_bytes() == b"outside"
    for name in targets:
        (box.workspace / name).unlink(missing_ok=True)


def test_an_agent_that_exchanges_folders_for_links_meanwhile_gains_nothing(daemon: RunningDaemon) -> None:
    """Thousands of calls while the box swaps a folder with links to the root, to another mount, and upwards."""
    workspace, data = daemon.workspace("raced"), daemon.workspace("raced-data")
    (data / "file").write_bytes(b"other mount")
    os.chown(data / "file", UID, UID)
    agent = daemon.spawn(
        *program("exchanger", {"targets": ["/etc", "/data", "../data", "/proc/self/root/etc"]}),
        team=team(daemon),
        workspace={"source": str(workspace)},
        mounts=[{"source": str(data), "target": "/data", "mode": "rw"}],
        network="none",
    )
    said(daemon, agent, "swapping")
    door = f"/v1/agents/{agent['id']}/files/workspace/door"
    seen: dict[tuple[str, int], int] = {}
    wrong: list[Any] = []
    connection = UnixConnection(daemon.socket)

    def ask(method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection.request(method, path, body)
        response = connection.getresponse()
        content = response.read()
        key = (method, response.status)
        seen[key] = seen.get(key, 0) + 1
        return response.status, content

    end = time.monotonic() + 8
    for number in range(1500):
        status, content = ask("GET", f"{door}/file")
        if status == 200 and content != b"inside":
            wrong.append(content)
        if ask("GET", f"{door}/hostname")[0] == 200 or ask("GET", f"{door}?list")[1].find(b'"passwd"') >= 0:
            wrong.append("the box's own /etc")
        ask("PUT", f"{door}/new-{number % 50}", b"written")
        ask("POST", f"{door}/made-{number % 50}/deep?mkdir&parents")
        ask("POST", f"{door}/new-{number % 50}?rename=/workspace/door/moved-{number % 50}")
        ask("DELETE", f"{door}/made-{number % 50}?recursive")
        if time.monotonic() > end and number > 200:
            break
    connection.close()
    assert not wrong
    assert {status for _, status in seen} <= {200, 201, 204, 403, 404, 409}, seen
    # Both sides of the race were met: the folder, and links.
    for method, good in (("GET", 200), ("PUT", 201), ("POST", 201)):
        assert seen[method, good] > 0, seen
        assert seen[method, 403] > 0, seen
    assert [path.name for path in data.iterdir()] == ["file"]
    assert (data / "file").read_bytes() == b"other mount"
    assert daemon.delete(f"/v1/agents/{agent['id']}?grace=0").status == 200


def test_what_is_no_plain_file_is_never_opened(box: Box) -> None:
    os.mkfifo(box.workspace / "fifo", 0o666)
    os.mknod(box.workspace / "device", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(box.workspace / "socket"))
    for name in ("fifo", "device", "socket"):
        (box.workspace / name).chmod(0o666)
        box.owned(box.workspace / name)
        assert assert_problem(box.get(f"/workspace/{name}"), 409, "file_kind_refused")["kind"] == "other"
        assert_problem(box.put(f"/workspace/{name}", b"x"), 409, "file_kind_refused")
        assert_problem(box.ask("POST", f"/workspace/{name}?copy=/workspace/copied"), 409, "file_kind_refused")
        assert box.get(f"/workspace/{name}?stat").json["type"] == "other"
        assert box.ask("DELETE", f"/workspace/{name}").status == 204
    assert_problem(box.get("/workspace"), 409, "file_kind_refused")


def test_a_lease_holds_up_nobody(daemon: RunningDaemon) -> None:
    """An agent that holds a lease on its file makes whoever opens that wait for 45 s, if they let themselves wait."""
    workspace = daemon.workspace("leased")
    script = (
        "import fcntl, os, signal, time\nsignal.signal(signal.SIGIO, signal.SIG_IGN)\n"
        "f = os.open('/workspace/f', os.O_RDWR | os.O_CREAT)\nos.write(f, b'x')\n"
        "fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_WRLCK)\nprint('leased', flush=True)\ntime.sleep(600)"
    )
    agent = daemon.spawn(
        "python3", "-c", script, team=team(daemon), workspace={"source": str(workspace)}, network="none"
    )
    said(daemon, agent, "leased")
    path = f"/v1/agents/{agent['id']}/files/workspace/f"
    assert_problem(daemon.request("GET", path, timeout=10), 409, "file_busy")
    assert daemon.request("GET", f"{path}?stat", timeout=10).status == 200
    assert daemon.request("PUT", path, b"replaced all the same", timeout=10).status == 200
    assert daemon.request("GET", path, timeout=10).content == b"replaced all the same"
    daemon.delete(f"/v1/agents/{agent['id']}?grace=0")


def test_the_agents_own_rights_are_the_bound(box: Box) -> None:
    others = {"closed": (0, 0o600), "readable": (0, 0o644), "mine-closed": (UID, 0o000)}
    for name, (owner, mode) in others.items():
        (box.workspace / name).write_bytes(b"content")
        (box.workspace / name).chmod(mode)
        os.chown(box.workspace / name, owner, owner)
    (box.workspace / "roots").mkdir(mode=0o755)
    (box.workspace / "hidden").mkdir(mode=0o700)
    (box.workspace / "hidden" / "file").write_bytes(b"content")
    assert_problem(box.get("/workspace/closed"), 403, "file_not_permitted")
    assert_problem(box.get("/workspace/mine-closed"), 403, "file_not_permitted")
    assert box.get("/workspace/readable").content == b"content"
    assert_problem(box.put("/workspace/roots/new", b"x"), 403, "file_not_permitted")
    assert_problem(box.ask("POST", "/workspace/roots/new?mkdir"), 403, "file_not_permitted")
    assert_problem(box.get("/workspace/hidden/file"), 403, "file_not_permitted")
    assert_problem(box.get("/workspace/hidden?list"), 403, "file_not_permitted")
    assert_problem(box.ask("DELETE", "/workspace/hidden?recursive"), 403, "file_not_permitted")
    assert_problem(box.ask("POST", "/workspace/closed?copy=/workspace/opened"), 403, "file_not_permitted")
    assert not (box.workspace / "opened").exists()
    assert box.put("/workspace/by-api", b"x").status == 201
    made = (box.workspace / "by-api").stat()
    assert (made.st_uid, made.st_gid) == (UID, UID)
    # The daemon's own threads are root again: its next call is not refused, and makes nothing of root's.
    assert box.get("/workspace/by-api").content == b"x"


def test_read_only_mounts_and_mounts_themselves_stay_as_they_are(box: Box) -> None:
    assert box.get("/fixed/given").content == b"from the host"
    assert box.ask("POST", "/fixed/given?copy=/workspace/taken").status == 201
    for method, path in (
        ("PUT", "/fixed/given"),
        ("PUT", "/fixed/new?parents"),
        ("DELETE", "/fixed/given"),
        ("POST", "/fixed/new?mkdir"),
        ("POST", "/fixed/given?rename=/fixed/other"),
        ("POST", "/workspace/taken?copy=/fixed/other"),
    ):
        assert_problem(box.ask(method, path, b""), 403, "file_read_only")
    assert [path.name for path in box.fixed.iterdir()] == ["given"]
    for method, path in (
        ("DELETE", "/workspace?recursive"),
        ("PUT", "/workspace"),
        ("POST", "/workspace?rename=/workspace/inner"),
        ("POST", "/workspace/taken?rename=/data"),
        ("PUT", "/single.txt"),
        ("DELETE", "/single.txt"),
    ):
        assert_problem(box.ask(method, path, b""), 403, "file_is_mount")
    assert box.get("/single.txt").content == b"a file of its own"
    assert box.get("/single.txt?stat").json["type"] == "file"
    assert_problem(box.ask("POST", "/workspace/taken?rename=/data/taken"), 409, "file_other_mount")


def test_nobody_elses_and_nothing_that_does_not_run(box: Box, as_user: AsUser) -> None:
    open_to_everybody(box.daemon)
    box.put("/workspace/mine", b"mine")
    for method in ("GET", "PUT", "DELETE", "POST"):
        with as_user(4321):
            answer = box.ask(method, "/workspace/mine?mkdir" if method == "POST" else "/workspace/mine", b"")
        assert_problem(answer, 404, "agent_not_found")
    assert box.get("/workspace/mine").content == b"mine"
    ended = box.daemon.spawn("true", team=team(box.daemon), workspace={"source": str(box.workspace)}, network="none")
    box.daemon.wait(ended)
    path = f"/v1/agents/{ended['id']}/files/workspace/mine"
    assert_problem(box.daemon.get(path), 409, "agent_not_running")
    assert_problem(box.daemon.request("PUT", path, b"x"), 409, "agent_not_running")


def test_a_caller_who_hangs_up_half_way_changes_nothing(box: Box) -> None:
    folder = box.workspace / "half"
    folder.mkdir()
    box.owned(folder)
    assert box.put("/workspace/half/file", b"old").status == 201
    part = b"n" * (3 * MIB)
    heads = {
        "length": (f"Content-Length: {8 * MIB}\r\n", part),
        "small": ("Content-Length: 100\r\n", b"only a part"),
        "chunked": ("Transfer-Encoding: chunked\r\n", f"{len(part):x}\r\n".encode() + part + b"\r\n"),
        "half a chunk": ("Transfer-Encoding: chunked\r\n", b"ffff\r\n" + b"n" * 100),
    }
    for ending in (socket.SHUT_WR, socket.SHUT_RDWR):
        for header, body in heads.values():
            with raw_connection(box.daemon.socket) as connection:
                connection.sendall(f"PUT {box.base}/workspace/half/file HTTP/1.1\r\nHost: x\r\n{header}\r\n".encode())
                connection.sendall(body)
                time.sleep(0.05)
                connection.shutdown(ending)
                time.sleep(0.05)
    with raw_connection(box.daemon.socket) as connection:  # silent, but there
        connection.sendall(
            f"PUT {box.base}/workspace/half/file HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n".encode()
        )
        assert b" 408 " in connection.recv(200)
    assert box.get("/workspace/half/file").content == b"old"
    wait_for(lambda: [path.name for path in folder.iterdir()] == ["file"], 5)
    ends = [entry for entry in audit_entries(box.daemon) if entry["act"] == "file.write" and entry["kind"] == "outcome"]
    assert "done" not in {entry["result"] for entry in ends[-3:]}


def test_readers_see_the_old_or_the_new_and_never_half(box: Box) -> None:
    old, new = b"o" * (700 * 1024), b"n" * (2 * MIB)
    assert box.put("/workspace/whole", old).status == 201
    odd: list[int] = []
    stopping = threading.Event()

    def look() -> None:
        while not stopping.is_set():
            content = (box.workspace / "whole").read_bytes()
            if content not in (old, new):
                odd.append(len(content))

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(20):
        assert box.put("/workspace/whole", (old, new)[number % 2]).status == 200
    stopping.set()
    for reader in readers:
        reader.join(10)
    assert odd == []
    box.ask("DELETE", "/workspace/whole")


def test_a_tree_is_removed_with_nothing_behind_its_links(box: Box) -> None:
    tree = box.workspace / "tree"
    place = tree
    for depth in range(20):
        place.mkdir()
        (place / "file").write_bytes(b"x")
        (place / "out").symlink_to(box.outside)
        os.mkfifo(place / "fifo")
        place = place / f"level {depth}"
    for path in (tree, *tree.rglob("*")):
        box.owned(path)
    assert_problem(box.ask("DELETE", "/workspace/tree"), 409, "folder_not_empty")
    assert box.ask("DELETE", "/workspace/tree?recursive").status == 204
    assert not tree.exists()
    assert (box.outside / "file").read_bytes() == b"outside"
    place = box.workspace / "deep"
    for _ in range(140):
        place.mkdir()
        box.owned(place)
        place = place / "d"
    assert_problem(box.ask("DELETE", "/workspace/deep?recursive"), 409, "folder_too_deep")
    assert box.ask("DELETE", "/workspace/deep" + "/d" * 100 + "?recursive").status == 204
    assert box.ask("DELETE", "/workspace/deep?recursive").status == 204
    deep = "/workspace/made" + "/d" * 140
    assert_problem(box.ask("POST", f"{deep}?mkdir&parents"), 409, "folder_too_deep")
    assert not (box.workspace / "made").exists()


# what it is for


def test_the_whole_round(box: Box) -> None:
    assert box.put("/workspace/round/a/file?parents&mode=0640", b"one").status == 201
    assert stat.S_IMODE((box.workspace / "round" / "a" / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((box.workspace / "round" / "a").stat().st_mode) == 0o755
    replaced = box.put("/workspace/round/a/file", b"two!")
    assert (replaced.status, replaced.json["size"], replaced.json["mode"]) == (200, 4, "0640")
    read = box.get("/workspace/round/a/file")
    assert (read.content, read.headers["x-isolator-mode"]) == (b"two!", "0640")
    assert read.headers["etag"] == replaced.headers["etag"] == replaced.json["etag"]
    head = box.ask("HEAD", "/workspace/round/a/file")
    for name in ("content-length", "etag", "last-modified", "x-isolator-mode", "x-isolator-type"):
        assert head.headers[name] == read.headers[name]
    assert box.ask("HEAD", "/workspace/round").headers["x-isolator-type"] == "folder"
    copied = box.ask("POST", "/workspace/round/a/file?copy=/data/copy")
    assert (copied.status, copied.json["mode"]) == (201, "0640")
    assert box.get("/data/copy").content == b"two!"
    assert_problem(box.ask("POST", "/workspace/round/a/file?copy=/data/copy&replace=false"), 409, "file_exists")
    assert_problem(box.ask("POST", "/workspace/round?copy=/data/folder"), 409, "file_kind_refused")
    assert box.ask("POST", "/workspace/round/a?rename=/workspace/round/b").status == 200
    assert box.names("/workspace/round") == ["b"]
    box.put("/workspace/round/other", b"other")
    assert_problem(
        box.ask("POST", "/workspace/round/other?rename=/workspace/round/b/file&replace=false"), 409, "file_exists"
    )
    assert box.ask("POST", "/workspace/round/other?rename=/workspace/round/b/file").status == 200
    assert box.get("/workspace/round/b/file").content == b"other"
    assert box.ask("POST", "/workspace/round/new?mkdir").status == 201
    assert_problem(box.ask("POST", "/workspace/round/new?mkdir"), 409, "file_exists")
    assert box.ask("POST", "/workspace/round/new?mkdir&parents").status == 200
    assert_problem(box.ask("POST", "/workspace/missing/new?mkdir"), 404, "file_not_found")
    assert box.ask("DELETE", "/workspace/round/new").status == 204
    assert_problem(box.get("/workspace/round/new?stat"), 404, "file_not_found")
    assert box.names("/") == ["/data", "/fixed", "/single.txt", "/workspace"]
    assert {item["path"] for item in box.get("/?list").json["items"]} == set(box.names("/"))


def test_conditions_hold(box: Box) -> None:
    assert box.put("/workspace/once?exclusive", b"first").status == 201
    assert_problem(box.put("/workspace/once?exclusive", b"second"), 409, "file_exists")
    assert_problem(box.put("/workspace/once", b"second", If_None_Match="*"), 409, "file_exists")
    etag = box.get("/workspace/once").headers["etag"]
    assert box.put("/workspace/once", b"second", If_Match=etag).status == 200
    told = assert_problem(box.put("/workspace/once", b"third", If_Match=etag), 412, "file_changed")
    assert told["etag"] == box.get("/workspace/once").headers["etag"]
    assert_problem(box.put("/workspace/never", b"x", If_Match="*"), 412, "file_changed")
    assert box.get("/workspace/once").content == b"second"
    for parameter in ("mode=4755", "mode=1777", "mode=8", "mode=-1", "mode="):
        assert_problem(box.put(f"/workspace/modes?{parameter}", b"x"), 400, "invalid_query")
    assert_problem(box.put("/workspace/modes", b"x", Content_Encoding="gzip"), 400, "encoding_unsupported")
    assert_problem(box.put("/workspace/modes", b"x", Content_Range="bytes 0-0/5"), 400, "content_range_refused")
    assert_problem(box.put("/workspace/modes", b"x", If_Match="W/x"), 400, "condition_unsupported")
    assert not (box.workspace / "modes").exists()
    for query in ("", "?mkdir&rename=/workspace/x", "?parents", "?mkdir=false"):
        assert_problem(box.ask("POST", f"/workspace/x{query}"), 400, "invalid_query")
    assert_problem(box.ask("POST", "/workspace/once?rename=relative"), 400, "file_path_invalid")
    assert_problem(box.ask("POST", "/workspace/once?rename=/workspace/../x"), 400, "file_path_invalid")
    assert_problem(box.ask("POST", "/workspace/once?copy=/etc/x"), 403, "file_outside_mounts")


def test_one_of_many_exclusive_writers_wins(box: Box) -> None:
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: statuses.append(box.put("/workspace/race?exclusive", b"%d" % n).status))
        for n in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(statuses) == [201] + [409] * 11


@pytest.mark.parametrize("size", [1000, 3 * MIB + 17])
def test_ranges_are_slices(box: Box, size: int) -> None:
    content = random.Random(size).randbytes(size)
    box.put("/workspace/ranged", content)
    for header, part in (
        ("bytes=0-0", content[:1]),
        ("bytes=5-", content[5:]),
        ("bytes=-7", content[-7:]),
        (f"bytes=10-{size * 2}", content[10:]),
        (f"bytes={size // 2}-{size // 2 + 300}", content[size // 2 : size // 2 + 301]),
    ):
        answer = box.get("/workspace/ranged", Range=header)
        assert answer.status == 206
        assert answer.content == part
        start = content.index(part[:8]) if len(part) > 8 else None
        assert answer.headers["content-range"].endswith(f"/{size}")
        assert start is None or answer.headers["content-range"].startswith(f"bytes {start}-")
    answer = box.get("/workspace/ranged", Range=f"bytes={size}-")
    assert_problem(answer, 416, "range_refused")
    assert answer.headers["content-range"] == f"bytes */{size}"
    assert box.get("/workspace/ranged", Range="bytes=0-1,3-4").content == content
    etag = box.get("/workspace/ranged").headers["etag"]
    assert box.get("/workspace/ranged", Range="bytes=1-2", If_Range=etag).status == 206
    assert box.get("/workspace/ranged", Range="bytes=1-2", If_Range='"other"').content == content
    box.put("/workspace/empty", b"")
    assert box.get("/workspace/empty").content == b""


def test_names_may_be_any_bytes(box: Box) -> None:
    hard = [
        b"new\nline",
        b"\xff\xfe",
        b"per%20cent",
        b"a b+c&d=e?f#g",
        "ünï→".encode(),
        b"-rf",
        b"...",
        b"\x01\x1b[31m",
    ]
    hard += [b"n" * 255, b'"quoted"\\', b"\xed\xa0\x80", b" "]
    assert box.ask("POST", "/workspace/names?mkdir").status == 201
    for name in hard:
        assert box.put(f"/workspace/names/{quote(name, safe='')}", name).status == 201, name
    assert sorted(os.fsencode(path.name) for path in (box.workspace / "names").iterdir()) == sorted(hard)
    listed = box.get("/workspace/names?list").json["items"]
    for item in listed:
        content = box.get(item["path"]).content
        assert content in hard
        assert item["name"] == content.decode("utf-8", "backslashreplace")
        longer = item["path"] + "%FF"
        moved = box.ask("POST", f"{item['path']}?rename={longer}")
        if len(content) == 255:
            assert_problem(moved, 400, "file_path_invalid")
        else:
            assert moved.json["path"] == longer
            assert box.get(longer).content == content
    assert box.ask("DELETE", "/workspace/names?recursive").status == 204


def test_a_long_list_is_cut_and_says_so(box: Box) -> None:
    folder = box.workspace / "many"
    folder.mkdir()
    for number in range(10_050):
        os.mknod(folder / f"{number}")
    answer = box.get("/workspace/many?list").json
    assert (len(answer["items"]), answer["truncated"]) == (10_000, True)
    box.owned(folder)
    assert box.ask("DELETE", "/workspace/many?recursive").status == 204


class _Counted:
    """Random bytes that are never all in memory, and their digest."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.digest = hashlib.blake2b()
        self._piece = os.urandom(MIB)

    def read(self, _: int = 0) -> bytes:
        piece = self._piece[: min(MIB, self.left)]
        self.left -= len(piece)
        self.digest.update(piece)
        return piece


def test_a_large_file_passes_through_a_small_daemon(box: Box) -> None:
    assert box.daemon.process is not None
    process, size = psutil.Process(box.daemon.process.pid), 256 * MIB
    before = highest = process.memory_info().rss
    stopping = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not stopping.wait(0.005):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    source, digest = _Counted(size), hashlib.blake2b()
    connection = UnixConnection(box.daemon.socket)
    connection.blocksize = MIB
    connection.request("PUT", f"{box.base}/workspace/large", source, {"Content-Length": str(size)})
    assert connection.getresponse().read().startswith(b'{"name":"large"')
    connection.request("GET", f"{box.base}/workspace/large")
    response = connection.getresponse()
    assert response.length == size
    while piece := response.read(MIB):
        digest.update(piece)
    connection.close()
    stopping.set()
    watcher.join(5)
    assert digest.digest() == source.digest.digest()
    assert highest - before < 48 * MIB, (highest - before) // MIB
    assert box.ask("POST", "/workspace/large?copy=/data/large").status == 201
    assert (box.data / "large").stat().st_size == size
    for path in ("/workspace/large", "/data/large"):
        assert box.ask("DELETE", path).status == 204


def test_a_file_that_shrinks_meanwhile_ends_the_connection(box: Box) -> None:
    with (box.workspace / "shrinking").open("wb") as file:
        file.truncate(64 * MIB)
    box.owned(box.workspace / "shrinking")
    connection = UnixConnection(box.daemon.socket)
    connection.request("GET", f"{box.base}/workspace/shrinking")
    response = connection.getresponse()
    got = len(response.read(MIB))
    os.truncate(box.workspace / "shrinking", 100)
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):  # noqa: PT012
        while piece := response.read(MIB):
            got += len(piece)
        if got < 64 * MIB:
            raise ConnectionError
    connection.close()
    assert got < 64 * MIB


def test_a_reader_who_stops_or_leaves_harms_nobody(box: Box) -> None:
    with (box.workspace / "slow").open("wb") as file:
        file.truncate(64 * MIB)
    box.owned(box.workspace / "slow")
    assert box.daemon.process is not None
    process = psutil.Process(box.daemon.process.pid)
    files = process.num_fds()
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            connection = stack.enter_context(raw_connection(box.daemon.socket))
            connection.sendall(f"GET {box.base}/workspace/slow HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        for _ in range(20):
            assert box.put("/workspace/quick", b"quick").status in (200, 201)
            assert box.get("/workspace/quick").content == b"quick"
    wait_for(lambda: process.num_fds() <= files + 1, 10, lambda: f"{process.num_fds()} open files, before {files}")
    assert "Traceback" not in box.daemon.log, "who leaves is no failure of ours, and must not fill the log"


def test_changes_are_in_the_audit_log_and_reads_are_not(box: Box) -> None:
    count = len(audit_entries(box.daemon))
    name = "caf\\xe9"
    box.put("/workspace/caf%E9", b"x")
    box.get("/workspace/caf%E9")
    box.ask("POST", "/workspace/caf%E9?rename=/workspace/tea")
    box.ask("DELETE", "/workspace/nothing")
    box.ask("DELETE", "/workspace/tea")

    def entries() -> list[dict[str, Any]]:
        return audit_entries(box.daemon)[count:]

    wait_for(lambda: len(entries()) == 8, 5, lambda: json.dumps(entries()))
    acts = [(entry["act"], entry["kind"]) for entry in entries() if entry["kind"] == "intent"]
    assert [act for act, _ in acts] == ["file.write", "file.rename", "file.remove", "file.remove"]
    written, moved = entries()[0], next(entry for entry in entries() if entry["act"] == "file.rename")
    assert written["detail"]["path"] == f"/workspace/{name}"
    assert written["actor"] == "uid:0"
    assert written["agent"] == box.agent
    assert moved["detail"]["to"] == "/workspace/tea"
    results = {entry["id"]: entry["result"] for entry in entries() if entry["kind"] == "outcome"}
    assert [results[entry["id"]] for entry in entries() if entry["kind"] == "intent"] == ["done"] * 2 + [
        "failed",
        "done",
    ]


# the client and the command line


def test_the_client_has_every_call(box: Box) -> None:
    with Client(box.daemon.socket) as client:
        files = client.files(box.agent)
        odd = b"/workspace/client/a b+\xff"
        with pytest.raises(ProblemError, match="file_not_found"):
            files.write(odd, b"x")
        made = files.write(odd, b"content", parents=True, mode=0o600)
        assert (made.path, made.size, made.mode) == (odd, 7, 0o600)
        assert files.read(odd) == b"content"
        assert files.read(odd, 2, 3) == b"nte"
        assert files.write(odd, io.BytesIO(b"stream" * MIB), match=made.etag).size == 6 * MIB
        with files.open(odd, offset=6 * (MIB - 1)) as stream:
            assert (stream.size, b"".join(stream)) == (6, b"stream")
        for content in (b"n" * (8 * MIB), io.BytesIO(b"n" * (8 * MIB))):
            with pytest.raises(ProblemError, match="file_read_only"):
                files.write("/fixed/new", content)
        assert files.copy(odd, "/data/copied").mode == 0o600
        with pytest.raises(ProblemError, match="file_exists"):
            files.rename(odd, "/workspace/client", replace=False)
        assert files.rename(odd, b"/workspace/client/\n").name == "\n"
        assert files.make_folder("/workspace/client/inner").type == "folder"
        assert {item.path for item in files.list("/workspace/client").items} == {
            b"/workspace/client/\n",
            b"/workspace/client/inner",
        }
        assert files.stat("/workspace/client/inner").type == "folder"
        files.remove("/workspace/client", recursive=True)
        assert len(files.list().items) == 4


def test_cp_and_ls(box: Box, tmp_path: Path) -> None:
    def isolator(*arguments: str, stdin: bytes = b"") -> bytes:
        command = [sys.executable, "-m", "isolator", *arguments]
        ended = subprocess.run(
            command, input=stdin, capture_output=True, timeout=30, check=False, env=box.daemon.environment()
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    local = tmp_path / "tool.sh"
    local.write_bytes(b"#!/bin/sh\n" * 1000)
    local.chmod(0o750)
    isolator("cp", str(local), f"{box.agent}:/workspace/")
    isolator("cp", f"{box.agent}:/workspace/tool.sh", f"{box.agent}:/data/passed on")
    isolator("cp", f"{box.agent}:/data/passed on", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == local.read_bytes()
    assert stat.S_IMODE((tmp_path / "back").stat().st_mode) == 0o750
    isolator("cp", "-", f"{box.agent}:/workspace/piped", stdin=b"through a pipe")
    assert isolator("cp", f"{box.agent}:/workspace/piped", "-") == b"through a pipe"
    assert b"passed on" in isolator("ls", f"{box.agent}:/data")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "tool.sh"]
