"""From text to names and back, without a box: paths, ranges, times; and a copy's end."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isolator.api.download import wanted_range
from isolator.files.facts import FileFacts, moment
from isolator.files.paths import MOST_NAME, MOST_PATH, locate, parse_absolute, parse_path, path_text, quote_path
from isolator.files.refusals import refusing
from isolator.files.roots import Target
from isolator.files.writing import Commits, Copy, WriteOptions
from isolator.model.box import BoxMount
from isolator.model.errors import BadRequest, Forbidden, IsolatorError, RangeRefused

NAMES = st.binary(min_size=1, max_size=40).filter(
    lambda name: name not in (b".", b"..") and b"/" not in name and b"\x00" not in name
)


def mount(target: str) -> BoxMount:
    return BoxMount(f"/srv{target}", target, read_only=False, staged="", device=1, inode=2, is_folder=True)


@given(st.lists(NAMES, max_size=8).map(tuple))
def test_any_names_survive_the_way_through_an_address(names: tuple[bytes, ...]) -> None:
    assert parse_absolute(quote_path(names)) == names
    assert quote_path(names).isascii()
    path_text(names).encode()


@given(st.text(max_size=60))
def test_whatever_is_sent_gives_harmless_names_or_a_refusal(text: str) -> None:
    try:
        names = parse_path(text)
    except BadRequest:
        return
    assert {b"", b".", b".."}.isdisjoint(names)
    assert not any(b"/" in name or b"\x00" in name for name in names)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "..",
            "a/..",
            "a/../b",
            "%2e%2e",
            "a/%2E./b",
            ".",
            "a/.",
            "/a",
            "a//b",
            "a/",
            "%2Fa",
            "a%2F%2Fb",
            "a%2F..",
            "a%00",
        ),
        *("%", "%2", "%zz", "a" * (MOST_NAME + 1), "a/" * (MOST_PATH // 2) + "abc"),
    ],
)
def test_paths_that_wander_are_refused(text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_path(text)
    assert caught.value.code == "file_path_invalid"


def test_the_longest_path_is_taken() -> None:
    assert len(parse_path("a/" * (MOST_PATH // 2) + "b")) == MOST_PATH // 2 + 1
    assert parse_path("a" * MOST_NAME) == (b"a" * MOST_NAME,)


def test_a_place_is_the_mount_and_what_is_below() -> None:
    mounts = [mount("/workspace"), mount("/data/models")]
    assert locate((b"workspace",), mounts).within == ()
    assert locate((b"data", b"models", b"x", b"y"), mounts).relative == b"x/y"
    for outside in ((), (b"data",), (b"workspaces",), (b"workspace2", b"x"), (b"tmp", b"x"), (b"Workspace",)):
        with pytest.raises(Forbidden) as caught:
            locate(outside, mounts)
        assert caught.value.code == "file_outside_mounts"
        assert caught.value.fields["mounts"] == ["/workspace", "/data/models"]


@given(st.integers(0, 50), st.integers(0, 60), st.one_of(st.none(), st.integers(0, 60)))
def test_a_range_is_the_bytes_a_slice_would_give(size: int, first: int, last: int | None) -> None:
    content = bytes(range(size))
    header = f"bytes={first}-{'' if last is None else last}"
    if last is not None and last < first:
        assert wanted_range(header, size) is None
        return
    expected = content[first:] if last is None else content[first : last + 1]
    if not expected:
        with pytest.raises(RangeRefused):
            wanted_range(header, size)
        return
    found = wanted_range(header, size)
    assert found is not None
    assert content[found[0] : found[0] + found[1]] == expected
    assert found[1] == len(expected)


@given(st.integers(0, 50), st.integers(1, 60))
def test_a_suffix_range_is_the_end(size: int, count: int) -> None:
    if size == 0:
        with pytest.raises(RangeRefused):
            wanted_range(f"bytes=-{count}", size)
    else:
        assert wanted_range(f"bytes=-{count}", size) == (max(0, size - count), min(count, size))


@pytest.mark.parametrize(
    "header", [None, "", "bytes=", "bytes=-", "lines=1-2", "bytes=1-2,4-5", "bytes=a-b", "bytes=\u0661-"]
)
def test_what_is_no_single_range_is_passed_over(header: str | None) -> None:
    assert wanted_range(header, 10) is None


@given(st.integers(-(2**63), 2**63 - 1))
def test_any_time_can_be_told(nanoseconds: int) -> None:
    assert moment(nanoseconds * 1000) is None or moment(nanoseconds) is None or "T" in str(moment(nanoseconds))
    FileFacts("file", 1, 0o644, nanoseconds, 7).answer((b"\xff",))


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_every_error_of_the_kernel_has_a_code(number: int) -> None:
    with pytest.raises(IsolatorError) as caught, refusing("/workspace/x"):
        raise OSError(number, "told by the kernel")
    assert caught.value.status in (400, 403, 404, 409, 413, 429, 503)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes a box's identity, which only root may")
def test_a_copy_of_a_file_that_grows_as_fast_as_it_is_copied_has_an_end(tmp_path: Path) -> None:
    folder = tmp_path / "mount"
    folder.mkdir()
    facts = folder.stat()
    here = replace(mount(str(folder)), device=facts.st_dev, inode=facts.st_ino)
    agent: Any = SimpleNamespace(id="a", pid=os.getpid(), spec=SimpleNamespace(uid=0, gid=0))
    names = parse_absolute(quote_path((*str(folder).strip("/").encode().split(b"/"), b"log")))
    source = Target(agent, locate(names, [here]))
    copy = Target(agent, locate((*names[:-1], b"copy"), [here]))
    log = folder / "log"
    log.write_bytes(b"all there is")
    copying = Copy(source, copy, WriteOptions(), Commits())
    steps = 0
    with log.open("ab") as growing:
        growing.write(b", and more")
        growing.flush()
        while copying.step() and steps < 10:
            steps += 1
            growing.write(b", and more")
            growing.flush()
    copying.commit()
    copying.abort()
    assert (folder / "copy").read_bytes() == b"all there is"
