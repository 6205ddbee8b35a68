"""Recipes, the pin file, reproducible layers, what is in the built images, and the check of foreign ones."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
import time

import docker
import pytest

from isolator.images.archive import write_docker_archive
from isolator.images.build import available_images, build_image
from isolator.images.inspect import check_foreign_image
from isolator.images.layer import write_layer
from isolator.images.lock import read_lock, write_lock
from isolator.images.recipe import load_recipe, parse_recipe
from isolator.images.rootfs import Package, build_rootfs
from isolator.images.sources import find_sources
from isolator.images.tarstream import ChunkReader, TarError, gunzip, read_members
from isolator.model.errors import (
    BadRequest,
    BoxFailed,
    Forbidden,
    IsolatorError,
    NotFound,
    TooLarge,
    Unavailable,
)

DIGEST = "sha256:" + "ab" * 32

# --- recipes ---------------------------------------------------------------------------------------------

GOOD = b"""
name = "toy"
version = "1.0"
suite = "bookworm"
packages = ["python3"]
"""


def test_shipped_recipes_parse_and_share_the_base():
    assert available_images() == ("agent-node", "agent-python", "skill")
    for name in available_images():
        recipe = load_recipe(name)
        assert {"python3", "ca-certificates"} <= set(recipe.packages)
        assert any(file.path == "/etc/passwd" for file in recipe.files)
    assert load_recipe("skill").executables is not None
    assert load_recipe("agent-python").executables is None


def test_recipe_wins_over_base_and_lists_join():
    base = b'suite = "bookworm"\npackages = ["netbase"]\n[links]\n"/usr/bin/a" = "b"\n'
    base += b'[[file]]\npath = "/etc/x"\ncontent = "1"\n'
    text = GOOD + b'[links]\n"/usr/bin/a" = "c"\n[[file]]\npath = "/etc/x"\ncontent = "2"\n'
    recipe = parse_recipe(text, base=base, folder="toy")
    assert recipe.packages == ("netbase", "python3")
    assert recipe.links == (("/usr/bin/a", "c"),)
    assert [file.content for file in recipe.files] == [b"2"]
    assert recipe.digest != parse_recipe(text, base=base + b"\n", folder="toy").digest


@pytest.mark.parametrize(
    ("addition", "key"),
    [
        (b'exectuables = ["/usr/bin/python3"]', "exectuables"),
        (b'strip = "/usr"', "strip"),
        (b'strip = ["usr/share"]', "strip"),
        (b'strip = ["/usr/../etc"]', "strip"),
        (b'drop-packages = ["a; rm -rf /"]', "drop-packages"),
        (b'drop-packages = ["--option"]', "drop-packages"),
        (b"summary = 3", "summary"),
        (b'[links]\n"/usr/*" = "x"', "links./usr/*"),
        (b'[links]\n"/usr/bin/x" = "../../../etc/shadow"', "links./usr/bin/x"),
        (b'[labels]\n"openclaw.managed" = "true"', "labels.openclaw.managed"),
        (b'[labels]\n"isolator.image" = "skill"', "labels.isolator.image"),
        (b'[[file]]\npath = "/etc/x"\ncontent = "x"\nmode = "4755"', "file.mode"),
        (b'[[file]]\npath = "/etc/x"\ncontent = "x"\nowner = "root"', "file.owner"),
        (b'[[file]]\npath = "/../x"\ncontent = "x"', "file.path"),
        (b'[[file]]\npath = "/etc/x"\ncontent = 3', "file.content"),
    ],
)
def test_bad_recipe_is_refused_by_key(addition, key):
    with pytest.raises(BadRequest) as refusal:
        parse_recipe(GOOD + addition, folder="toy")
    assert refusal.value.code == "image_recipe_invalid"
    assert refusal.value.fields["key"] == key


@pytest.mark.parametrize("text", [b"name = ", b"\xff\xfe", b"x" * 100_000, GOOD.replace(b"toy", b"other"), b""])
def test_broken_recipe_is_refused(text):
    with pytest.raises(BadRequest):
        parse_recipe(text, folder="toy")


@pytest.mark.parametrize("name", ["nothing", "../skill", "skill/", "", "Skill", "a" * 100])
def test_unknown_recipe_is_told_with_the_known_ones(name):
    with pytest.raises(NotFound) as refusal:
        load_recipe(name)
    assert "agent-python" in refusal.value.detail


# --- the host's package sources --------------------------------------------------------------------------


def test_sources_take_debian_only(tmp_path):
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (tmp_path / "sources.list").write_text(
        "# deb http://old.example/debian bookworm main\n"
        "deb http://one.example/debian/ bookworm main contrib\n"
        "deb [trusted=yes signed-by=/usr/share/keyrings/other.gpg] http://evil.example/debian bookworm main\n"
        "deb-src http://one.example/debian bookworm main\n"
        "deb http://other.example/debian bookworm stable\n"
    )
    (parts / "debian.sources").write_text(
        "Types: deb\nURIs: http://two.example/debian-security\nSuites: bookworm-security\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n"
        "Types: deb\nURIs: http://evil.example/x\nSuites: bookworm\nComponents: main\n"
        "Signed-By: /etc/evil.gpg\n\n"
        "Types: deb\nEnabled: no\nURIs: http://off.example/x\nSuites: bookworm\nComponents: main\n"
    )
    (parts / "off.sources.disabled").write_text(
        "Types: deb\nURIs: http://no.example\nSuites: bookworm\nComponents: main"
    )
    found = find_sources("bookworm", tmp_path)
    assert [line.split()[2] for line in found] == [
        "http://one.example/debian",
        "http://two.example/debian-security",
    ]
    assert all("[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]" in line for line in found)
    with pytest.raises(Unavailable) as refusal:
        find_sources("trixie", tmp_path)
    assert refusal.value.code == "image_sources_missing"


def test_missing_builder_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable) as refusal:
        build_rootfs(load_recipe("skill"), tmp_path, cache=tmp_path, progress=print, timeout=1)
    assert refusal.value.code == "image_builder_missing"
    assert "apt-get install mmdebstrap" in refusal.value.detail


# --- the pin file ----------------------------------------------------------------------------------------


def test_lock_round_trip(tmp_path):
    path = tmp_path / "images.json"
    assert read_lock(path) == {}
    write_lock(path, {"isolator/skill": DIGEST})
    assert read_lock(path) == {"isolator/skill": DIGEST}
    assert path.stat().st_mode & 0o777 == 0o644
    write_lock(path, {})
    assert read_lock(path) == {}
    assert [entry.name for entry in tmp_path.iterdir()] == ["images.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"isolator/skill": "latest"}',
        '{"isolator/skill": "sha256:abc"}',
        '{"isolator/skill": null}',
        json.dumps({"Isolator/Skill": DIGEST}),
        json.dumps({"../skill": DIGEST}),
        f'{{"a": "{DIGEST}", "a": "{DIGEST}"}}',
        json.dumps({"isolator/skill": DIGEST + "\n"}),
        "[" * 50_000,
        " " * 70_000,
    ],
)
def test_malformed_lock_is_refused(tmp_path, text):
    path = tmp_path / "images.json"
    path.write_text(text)
    path.chmod(0o644)
    with pytest.raises(BadRequest) as refusal:
        read_lock(path)
    assert refusal.value.code == "image_lock_invalid"


def test_malformed_pins_are_not_written(tmp_path):
    path = tmp_path / "images.json"
    write_lock(path, {"a": DIGEST})
    with pytest.raises(BadRequest):
        write_lock(path, {"a": "latest"})
    assert read_lock(path) == {"a": DIGEST}


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_lock_others_can_write_is_refused(tmp_path, mode):
    path = tmp_path / "images.json"
    write_lock(path, {"a": DIGEST})
    path.chmod(mode)
    _demand_unsafe_lock(path)


def test_lock_in_a_folder_others_can_write_is_refused(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    write_lock(folder / "images.json", {"a": DIGEST})
    assert read_lock(folder / "images.json")
    folder.chmod(0o777)
    _demand_unsafe_lock(folder / "images.json")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_lock_of_another_user_is_refused(tmp_path):
    path = tmp_path / "images.json"
    write_lock(path, {"a": DIGEST})
    os.chown(path, 4242, 4242)
    _demand_unsafe_lock(path)


def test_lock_that_is_a_link_or_a_pipe_is_refused(tmp_path):
    write_lock(tmp_path / "real.json", {"a": DIGEST})
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    _demand_unsafe_lock(tmp_path / "link.json")
    os.mkfifo(tmp_path / "pipe.json", 0o644)
    _demand_unsafe_lock(tmp_path / "pipe.json")


def _demand_unsafe_lock(path):
    with pytest.raises(Forbidden) as refusal:
        read_lock(path)
    assert refusal.value.code == "image_lock_unsafe"


# --- deterministic layers --------------------------------------------------------------------------------

TOY = (
    GOOD
    + b"""
strip = ["/usr/share/doc", "/var/log/*", "/etc/machine-id"]
directories = ["/workspace"]
[bundles]
"/etc/ssl/all.crt" = "/usr/share/certs/*.crt"
[links]
"/usr/bin/python" = "python3"
[[file]]
path = "/etc/passwd"
content = "agent:x:10001:10001::/:/x"
"""
)


def _add(archive, name, data=None, **facts):
    info = tarfile.TarInfo(name)
    info.type = facts.pop("type", tarfile.REGTYPE if data is not None else tarfile.DIRTYPE)
    info.mode = 0o755
    for key, value in facts.items():
        setattr(info, key, value)
    info.size = len(data or b"")
    archive.addfile(info, io.BytesIO(data or b""))


def _toy_tree(path, seed):
    """The same tree in another order, at another time, with other logs and names of owners."""
    members = [
        ("./usr/bin/python3.11", {"data": b"\x7fELF", "mode": 0o6755}),
        ("./usr/bin/python3", {"type": tarfile.SYMTYPE, "linkname": "python3.11"}),
        ("./usr/bin/gone", {"type": tarfile.SYMTYPE, "linkname": "/usr/share/doc/x"}),
        ("./usr/bin/perlish", {"data": b"#!/usr/bin/perl -w\n"}),
        ("./usr/bin/pythonic", {"data": b"#!/usr/bin/env python3\n"}),
        ("./usr/share/doc/x", {"data": b"words"}),
        ("./usr/share/certs/b.crt", {"data": b"B"}),
        ("./usr/share/certs/a.crt", {"data": b"A\n"}),
        ("./var/log/build.log", {"data": b"%d" % seed}),
        ("./etc/machine-id", {"data": b"%d" % seed}),
        ("./etc/shared", {"data": b"x", "mode": 0o666}),
        ("./dev/null", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}),
        ("./usr/node", {"type": tarfile.BLKTYPE, "devmajor": 8}),
        ("./usr/pipe", {"type": tarfile.FIFOTYPE}),
        ("./proc", {"type": tarfile.SYMTYPE, "linkname": "/etc"}),
        ("./tmp/left", {"data": b"over"}),
        ("./zz-original", {"data": b"twice"}),
    ]
    if seed % 2:
        members.reverse()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, facts in members:
            xattrs = {"SCHILY.xattr.security.capability": "\x01\x02"} if seed % 2 else {}
            _add(archive, name, mtime=1e9 + seed, uname=f"user{seed}", pax_headers=xattrs, **facts)
        _add(archive, "./aa-link", type=tarfile.LNKTYPE, linkname="./zz-original", mtime=seed)
    return path


def test_layer_is_a_function_of_its_content(tmp_path):
    recipe = parse_recipe(TOY, folder="toy")
    packages = [Package("python3", "3.11", "Package: python3\n")]
    layers = [
        write_layer(_toy_tree(tmp_path / f"{seed}.tar", seed), tmp_path / f"{seed}.layer", recipe, packages)
        for seed in (1, 2)
    ]
    assert layers[0].path.read_bytes() == layers[1].path.read_bytes()
    assert layers[0].diff_id == hashlib.sha256(layers[0].path.read_bytes()).hexdigest()
    archives = []
    for number, layer in enumerate(layers):
        archives.append(
            write_docker_archive(
                layer, tmp_path / f"{number}.image", tags=("a:1",), labels={"b": "c"}, architecture="amd64"
            )
        )
        time.sleep(0.01)
    assert archives[0].config_digest == archives[1].config_digest
    assert archives[0].path.read_bytes() == archives[1].path.read_bytes()
    changed = parse_recipe(TOY.replace(b"/:/x", b"/:/y"), folder="toy")
    other = write_layer(tmp_path / "1.tar", tmp_path / "other.layer", changed, packages)
    assert other.diff_id != layers[0].diff_id


def test_layer_holds_no_privilege_and_no_litter(tmp_path):
    recipe = parse_recipe(TOY, folder="toy")
    layer = write_layer(_toy_tree(tmp_path / "1.tar", 1), tmp_path / "layer", recipe)
    with tarfile.open(layer.path) as archive:
        found = {member.name: member for member in archive}
        assert archive.extractfile("etc/ssl/all.crt").read() == b"A\nB\n"
        assert archive.extractfile("zz-original").read() == b"twice"
    assert found["zz-original"].islnk(), "the first name in order carries the data"
    assert list(found) == sorted(found)
    assert not any(member.mode & 0o6000 for member in found.values())
    assert not any(member.mode & 0o022 for name, member in found.items() if member.isreg())
    assert not any(member.isdev() or member.pax_headers for member in found.values())
    assert {member.mtime for member in found.values()} == {1686355200}
    assert {member.uname for member in found.values()} == {""}
    for name in ("dev", "proc", "sys", "run", "tmp", "var/tmp"):
        assert found[name].isdir()
    assert found["tmp"].mode == 0o1777
    assert found["workspace"].uid == 10001
    gone = {
        "usr/bin/gone",
        "usr/bin/perlish",
        "usr/share/doc/x",
        "var/log/build.log",
        "etc/machine-id",
        "tmp/left",
    }
    assert not gone & set(found)
    assert {"usr/bin/python", "usr/bin/pythonic", "etc/shared"} <= set(found)


def test_only_listed_programs_stay(tmp_path):
    recipe = parse_recipe(TOY.replace(b"[bundles]", b'executables = ["/usr/bin/python3.*"]\n[bundles]'), folder="toy")
    layer = write_layer(_toy_tree(tmp_path / "1.tar", 1), tmp_path / "layer", recipe)
    with tarfile.open(layer.path) as archive:
        assert [m.name for m in archive if m.isreg() and m.mode & 0o111] == ["usr/bin/python3.11"]
        assert "usr/bin/pythonic" not in archive.getnames()


def test_missing_bundle_parts_fail_the_build(tmp_path):
    recipe = parse_recipe(TOY.replace(b"certs/*", b"nothing/*"), folder="toy")
    with pytest.raises(BoxFailed):
        write_layer(_toy_tree(tmp_path / "1.tar", 1), tmp_path / "layer", recipe)


# --- hostile archives ------------------------------------------------------------------------------------


def _nothing(_count):
    return


def _members(data):
    return [(m.name, m.kind, m.link) for m in read_members(ChunkReader(iter([data[:700], b"", data[700:]]), _nothing))]


def _tar(members, fmt=tarfile.PAX_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=fmt) as archive:
        for name, facts in members:
            _add(archive, name, **facts)
    return buffer.getvalue()


@pytest.mark.parametrize("fmt", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_reader_agrees_with_tarfile(fmt):
    long = "/".join(["folder" * 10] * 6)
    data = _tar(
        [
            ("a", {"data": b"x" * 1000}),
            (long, {"data": b"y"}),
            ("link", {"type": tarfile.SYMTYPE, "linkname": long}),
            ("ünï", {"data": b""}),
            ("folder", {}),
        ],
        fmt,
    )
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [(m.name, m.type.decode(), m.linkname) for m in archive]
    assert [(name.rstrip("/"), kind, link) for name, kind, link in _members(data)] == expected
    packed = gzip.compress(data)
    source = ChunkReader(gunzip(iter([packed[:99], packed[99:]])), _nothing)
    assert len(list(read_members(source))) == len(expected)


def _raw(name=b"a", kind=b"0", size=0, magic=b"ustar\x0000"):
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\x00"
    block[124:136] = b"%011o\x00" % size if isinstance(size, int) else size
    block[156:157] = kind
    block[257:265] = magic
    block[148:156] = b"%06o\x00 " % (sum(block) + 8 * 32)
    return bytes(block)


END = bytes(1024)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"b" + _raw()[1:] + END, "checksum"),
        (b"garbage" * 100, "number"),
        (b"\xff" * 512, "number"),
        (_raw(size=10), "ends"),
        (_raw()[:300], "ends"),
        (_raw(size=b"\xff" * 12) + END, "negative"),
        (_raw(size=b"\x80" + b"\xff" * 11) + END, "range"),
        (_raw(size=b"00000009999\x00") + END, "number"),
        (_raw(kind=b"S") + END, "unknown type"),
        (_raw(kind=b"2", size=512) + bytes(512) + END, "content"),
        (_raw(kind=b"x", size=1 << 30), "too long"),
        (_raw(kind=b"L", size=1 << 30), "too long"),
        (_raw(kind=b"x", size=9) + b"99 path=x".ljust(512, b"\0") + _raw() + END, "malformed"),
        (_raw(kind=b"x", size=9) + b"x" * 512 + _raw() + END, "malformed"),
        (_raw(kind=b"x", size=22) + b"22 GNU.sparse.major=1\n".ljust(512, b"\0") + _raw() + END, "sparse"),
        (_raw(kind=b"g", size=10) + b"10 path=x\n".ljust(512, b"\0") + _raw() + END, "global"),
        (_raw(kind=b"x", size=10) + b"10 path=x\n".ljust(512, b"\0") + END, "no entry"),
        (_raw(name=b"proc/") + END, "slash"),
        (_raw(magic=b"ustar99x") + END, "format"),
        (_raw() + END + _raw(name=b"proc", kind=b"2") + END, "after the end"),
    ],
)
def test_unusual_archive_is_refused(data, why):
    with pytest.raises(TarError, match=why):
        _members(data)


def test_truncation_at_any_byte_never_crashes():
    data = _tar([("a" * 150, {"data": b"x" * 600}), ("b", {"type": tarfile.SYMTYPE, "linkname": "c" * 150})])
    for cut in range(0, len(data) - 1024, 37):
        try:
            _members(data[:cut])
        except TarError:
            continue
        assert cut % 512 == 0 or cut > len(data.rstrip(b"\0")) + 512


def test_damaged_compression_is_refused():
    packed = gzip.compress(_tar([("a", {"data": b"x" * 5000})]))
    for bad in (packed[:-20], packed + b"more", packed[:30] + b"\x00\x00\x00" + packed[33:]):
        with pytest.raises(TarError):
            list(read_members(ChunkReader(gunzip(iter([bad])), _nothing)))


# --- foreign images, on the engine -----------------------------------------------------------------------

PYTHON = [
    ("usr/local/bin/python3.12", {"data": b"\x7fELF"}),
    ("usr/local/bin/python3", {"type": tarfile.SYMTYPE, "linkname": "python3.12"}),
]
FOLDERS = [(name, {}) for name in ("dev", "proc", "sys", "etc", "run", "tmp")]
LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc"}


@pytest.fixture(scope="module")
def engine():
    client = docker.from_env(version="auto", timeout=60)
    try:
        client.ping()
    except (docker.errors.DockerException, OSError):
        pytest.skip("no Docker Engine")
    yield client
    client.close()


@pytest.fixture
def load(engine):
    """Loads an image of hand-made layers and gives its ID; all are removed at the end."""
    loaded = []

    def _load(*layers):
        blobs = [_tar(layer) for layer in layers]
        config = json.dumps(
            {
                "architecture": "amd64",
                "os": "linux",
                "config": {"Labels": {"isolator.test": str(len(loaded)) + os.urandom(8).hex()}},
                "rootfs": {
                    "type": "layers",
                    "diff_ids": [f"sha256:{hashlib.sha256(b).hexdigest()}" for b in blobs],
                },
            }
        ).encode()
        tag = f"isolator-test/foreign-{os.urandom(6).hex()}:1"
        manifest = [{"Config": "c.json", "RepoTags": [tag], "Layers": [f"{n}/layer.tar" for n in range(len(blobs))]}]
        files = [("c.json", config), ("manifest.json", json.dumps(manifest).encode())]
        files += [(f"{number}/layer.tar", blob) for number, blob in enumerate(blobs)]
        archive = _tar([(name, {"data": data}) for name, data in files])
        list(engine.api.load_image(archive, quiet=True) or ())
        loaded.append(tag)
        return engine.api.inspect_image(tag)["Id"]

    yield _load
    for tag in loaded:
        engine.api.remove_image(tag, force=True)


@pytest.mark.engine
def test_good_foreign_image_passes(engine, load):
    before = len(engine.api.containers(all=True, filters={"ancestor": "isolator-test"}))
    image = check_foreign_image(engine.api, load([*FOLDERS, *PYTHON]))
    assert image.python == "/usr/local/bin/python3"
    assert image.layers == 1
    assert image.entries >= len(FOLDERS) + len(PYTHON)
    assert len(engine.api.containers(all=True, filters={"ancestor": "isolator-test"})) == before


@pytest.mark.engine
@pytest.mark.parametrize(
    ("layers", "python"),
    [
        ([[("etc/x", {"data": b"x"})]], None),
        ([PYTHON, [("usr/local/bin/.wh.python3.12", {"data": b""})]], None),
        ([PYTHON, [("usr/local/bin/python3.12", {"data": b"", "mode": 0o644})]], None),
        ([PYTHON, [("usr/local/.wh..wh..opq", {"data": b""})]], None),
        ([[("proc", LINK)], [(".wh.proc", {"data": b""})], PYTHON], "/usr/local/bin/python3"),
        (
            [[*PYTHON, ("usr/bin/python3", {"type": tarfile.SYMTYPE, "linkname": "../local/bin/python3"})]],
            "/usr/bin/python3",
        ),
        ([[("usr/bin/python3", {"type": tarfile.SYMTYPE, "linkname": "python3"})]], None),
        (
            [
                [
                    ("opt/p", {"data": b"x"}),
                    ("usr/bin/python3", {"type": tarfile.LNKTYPE, "linkname": "opt/p"}),
                ]
            ],
            "/usr/bin/python3",
        ),
    ],
)
def test_python_is_found_as_the_layers_leave_it(engine, load, layers, python):
    assert check_foreign_image(engine.api, load(*layers)).python == python


@pytest.mark.engine
@pytest.mark.parametrize(
    ("layers", "path"),
    [
        ([[*PYTHON, ("proc", LINK)]], "/proc"),
        ([[*PYTHON, ("./dev", {"data": b"x"})]], "/dev"),
        ([[*FOLDERS, *PYTHON], [("sys", {"type": tarfile.SYMTYPE, "linkname": "/proc"})]], "/sys"),
        ([FOLDERS, [(".wh.sys", {"data": b""})], [("sys", LINK)]], "/sys"),
        ([[("etc", {"type": tarfile.SYMTYPE, "linkname": "/tmp"})]], "/etc"),
        ([[("run", {"type": tarfile.SYMTYPE, "linkname": "/tmp"})]], "/run"),
        ([[("tmp", {"type": tarfile.FIFOTYPE})]], "/tmp"),
        ([[("opt/link", LINK), ("proc", {"type": tarfile.LNKTYPE, "linkname": "opt/link"})]], "/proc"),
        ([[("workspace", LINK)]], "/workspace"),
        ([[*FOLDERS, ("run/secrets", LINK)]], "/run/secrets"),
    ],
)
def test_image_that_redirects_a_mount_is_refused(engine, load, layers, path):
    with pytest.raises(Forbidden) as refusal:
        check_foreign_image(engine.api, load(*layers))
    assert refusal.value.code == "image_unsafe"
    assert refusal.value.fields["path"] == path
    assert path in refusal.value.detail


@pytest.mark.engine
def test_bounds_and_names(engine, load):
    image_id = load([*FOLDERS, *PYTHON])
    for bounds, code in [
        ({"max_entries": 5}, "image_too_large"),
        ({"max_bytes": 4000}, "image_too_large"),
        ({"timeout": 0.0}, "image_check_timeout"),
    ]:
        with pytest.raises((TooLarge, Unavailable)) as refusal:
            check_foreign_image(engine.api, image_id, **bounds)
        assert refusal.value.code == code
    for wrong in ("isolator/skill:latest", image_id[:20], image_id + "\n", ""):
        with pytest.raises(BadRequest):
            check_foreign_image(engine.api, wrong)
    with pytest.raises(NotFound):
        check_foreign_image(engine.api, "sha256:" + "0" * 64)
    assert check_foreign_image(engine, image_id).image_id == image_id


class _ExportsBytes:
    """Stands for an engine whose stored image is hostile in a way `docker load` would refuse to take in."""

    def __init__(self, data):
        self._data = data

    def inspect_image(self, image_id):
        return {"Id": image_id}

    def get_image(self, _image_id, chunk_size):
        return (self._data[at : at + chunk_size] for at in range(0, len(self._data), chunk_size))


def _export(*layers, manifest=None, extra=()):
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    files = [
        (name, {"data": _tar(layer) if isinstance(layer, list) else layer})
        for name, layer in zip(names, layers, strict=True)
    ]
    text = json.dumps([{"Layers": names}] if manifest is None else manifest).encode()
    return _tar([*files, *extra, ("manifest.json", {"data": text})])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no tar at all" * 100,
        _export(PYTHON, manifest=[]),
        _export(PYTHON, manifest=[{"Layers": []}]),
        _export(PYTHON, manifest=[{"Layers": ["absent"]}]),
        _export(PYTHON, manifest=[{"Layers": ["../../etc/passwd"]}]),
        _export(PYTHON, manifest=[{"Layers": ["0/layer.tar"]}] * 2),
        _export(PYTHON, manifest={"Layers": 3}),
        _export(b"(\xb5/\xfd zstandard"),
        _export([("../../proc", LINK)]),
        _export([("foo", LINK), ("foo/proc", LINK)]),
        _export([("foo", LINK)], [("foo/x", {"data": b""})]),
        _export([("proc", LINK), (".wh.proc", {"data": b""})]),
        _export([("a", {"type": tarfile.LNKTYPE, "linkname": "missing"})]),
        _export([("", LINK)]),
        _export([("a/.wh..wh.plnk", {"data": b""})]),
    ],
)
def test_hostile_export_is_refused(data):
    with pytest.raises(Forbidden) as refusal:
        check_foreign_image(_ExportsBytes(data), DIGEST)
    assert refusal.value.code == "image_unsafe"


def test_shared_and_compressed_layers_are_read():
    link = ("1/layer.tar", {"type": tarfile.SYMTYPE, "linkname": "../0/layer.tar"})
    manifest = [{"Layers": ["0/layer.tar", "1/layer.tar"]}]
    assert check_foreign_image(_ExportsBytes(_export(PYTHON, manifest=manifest, extra=[link])), DIGEST).layers == 2
    packed = gzip.compress(_tar([*FOLDERS, *PYTHON]))
    assert check_foreign_image(_ExportsBytes(_export(packed)), DIGEST).python == "/usr/local/bin/python3"
    with pytest.raises(Forbidden):
        check_foreign_image(_ExportsBytes(_export(gzip.compress(_tar([("proc", LINK)])))), DIGEST)


def test_compression_bomb_is_bounded():
    bomb = gzip.compress(_tar([("zeros", {"data": bytes(64 << 20)})]))
    started = time.monotonic()
    with pytest.raises(TooLarge):
        check_foreign_image(_ExportsBytes(_export(bomb)), DIGEST, max_bytes=8 << 20)
    assert time.monotonic() - started < 5


# --- the real images -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def skill_image(engine):
    try:
        return engine.api.inspect_image("isolator/skill:latest")["Id"]
    except docker.errors.ImageNotFound:
        return build_image("skill", engine=engine, progress=print).image_id


def _built(engine, name):
    try:
        return engine.api.inspect_image(f"isolator/{name}:latest")
    except docker.errors.ImageNotFound:
        pytest.skip(f"isolator/{name} is not built")


def _run(engine, image, command):
    """Exit code and output of a throw-away container."""
    api = engine.api
    host = api.create_host_config(network_mode="none", read_only=True, cap_drop=["ALL"], tmpfs={"/tmp": "size=64m"})
    box = api.create_container(image, command, host_config=host, environment={"HOME": "/tmp"}, working_dir="/tmp")
    try:
        api.start(box)
        code = api.wait(box, timeout=60)["StatusCode"]
        return code, api.logs(box).decode()
    finally:
        api.remove_container(box, force=True, v=True)


LOOK = r"""
import os, stat, struct

def has_interpreter(path):  # what makes an ELF file a program, not a library
    data = open(path, "rb").read(4096)
    (start,), (size, count) = struct.unpack_from("<Q", data, 32), struct.unpack_from("<HH", data, 54)
    return any(struct.unpack_from("<I", data, start + n * size)[0] == 3 for n in range(count))

for folder, folders, files in os.walk("/"):
    if folder == "/":
        folders[:] = [name for name in folders if name not in ("proc", "sys", "dev")]
    for name in files:
        path = os.path.join(folder, name)
        facts = os.lstat(path)
        if not stat.S_ISREG(facts.st_mode) or path == "/.dockerenv":
            continue
        start = open(path, "rb").read(20) if os.access(path, os.R_OK) else b""
        program = has_interpreter(path) if start[:4] == b"\x7fELF" else start[:2] == b"#!" and "bin" in folder
        if os.access(path, os.X_OK) or program or facts.st_mode & 0o6000:
            print(path)
"""


@pytest.mark.engine
def test_skill_image_runs_nothing_but_python(engine, skill_image):
    code, output = _run(engine, skill_image, ["/usr/bin/python3", "-c", LOOK])
    assert code == 0, output
    programs = set(output.split())
    assert "/usr/bin/python3.11" in programs
    assert any("/ld-linux-" in path for path in programs)
    # The C library answers when the loader is asked to run it; it has no x bit and prints its version.
    harmless = ("/ld-linux-", "/libc.so.6")
    assert {path for path in programs if not any(word in path for word in harmless)} == {"/usr/bin/python3.11"}


@pytest.mark.engine
@pytest.mark.parametrize(
    "program", ["/bin/sh", "/bin/bash", "/usr/bin/env", "/bin/ls", "/usr/bin/perl", "/bin/busybox"]
)
def test_skill_image_has_no_shell(engine, skill_image, program):
    with pytest.raises(docker.errors.APIError, match="no such file"):
        _run(engine, skill_image, [program, "-c", "true"])


@pytest.mark.engine
def test_skill_image_python_works_and_cannot_shell_out(engine, skill_image):
    text = (
        "import asyncio, ctypes, hashlib, json, lzma, os, pwd, socket, sqlite3, ssl, subprocess, sys\n"
        "assert os.getuid() == 10001 and pwd.getpwuid(10001).pw_name == 'agent'\n"
        "assert ssl.create_default_context().cert_store_stats()['x509_ca'] > 50\n"
        "assert os.system('true') != 0\n"
        "for name in ('pip', 'ensurepip', 'venv', 'distutils'):\n"
        "    try: __import__(name)\n"
        "    except ImportError: continue\n"
        "    raise SystemExit(name)\n"
        "try: subprocess.run('true', shell=True)\n"
        "except FileNotFoundError: print('no shell')\n"
    )
    assert _run(engine, skill_image, ["/usr/bin/python3", "-c", text]) == (0, "no shell\n")


@pytest.mark.engine
def test_byte_code_is_used(engine, skill_image):
    code, output = _run(engine, skill_image, ["/usr/bin/python3", "-I", "-S", "-v", "-c", "import json, asyncio, ssl"])
    loaded = [line for line in output.splitlines() if line.startswith("# code object from")]
    assert code == 0
    assert len(loaded) > 30
    assert all(line.rstrip("'").endswith(".pyc") for line in loaded)


@pytest.mark.engine
@pytest.mark.parametrize("name", ["agent-python", "agent-node", "skill"])
def test_image_configuration_claims_nothing(engine, name):
    image = _built(engine, name)
    config = image["Config"]
    assert config["User"] == "10001:10001"
    assert config["WorkingDir"] == "/"
    assert sorted(config["Env"]) == ["LANG=C.UTF-8", "PATH=/usr/local/bin:/usr/bin:/bin"]
    assert not any(
        config.get(key) for key in ("Entrypoint", "Cmd", "Volumes", "ExposedPorts", "Healthcheck", "OnBuild")
    )
    assert config["Labels"]["isolator.image"] == name
    assert len(config["Labels"]["isolator.recipe"]) == 64
    checked = check_foreign_image(engine.api, image["Id"])
    assert checked.python == "/usr/bin/python3"


AGENT_TOOLS = (
    "set -e; cd /tmp; git init -q r; cd r; echo hi > a; git add a;"
    " git -c user.name=a -c user.email=a@b commit -qm x; git log --oneline | wc -l;"
    " curl --version >/dev/null; rg hi >/dev/null; find . | grep -q a; awk 'BEGIN{print 1}' | sed s/1/ok/; "
)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "more"),
    [
        (
            "agent-python",
            "pip --version >/dev/null; python3 -m venv --without-pip /tmp/v; python -c 'print(6*7)'",
        ),
        (
            "agent-node",
            "npm --version >/dev/null; npm init -y >/dev/null; npm pack --silent >/dev/null; node -p '6*7'",
        ),
    ],
)
def test_agent_images_have_their_tools(engine, name, more):
    image = _built(engine, name)["Id"]
    assert _run(engine, image, ["/bin/bash", "-c", AGENT_TOOLS + more]) == (0, "1\nok\n42\n")


@pytest.mark.engine
@pytest.mark.parametrize("name", ["agent-python", "agent-node"])
def test_agent_images_lack_what_raises_privilege(engine, name):
    image = _built(engine, name)["Id"]
    gone = "su sudo mount umount unshare nsenter chroot apt apt-get dpkg perl gcc cc ld busybox passwd newgrp"
    text = f"for name in {gone}; do command -v $name; done; find / -xdev -perm /6000 2>/dev/null; true"
    assert _run(engine, image, ["/bin/bash", "-c", text]) == (0, "")


@pytest.mark.engine
@pytest.mark.skipif(os.geteuid() != 0, reason="images are built as root")
def test_building_twice_gives_the_same_image(engine, skill_image):
    lines = []
    built = build_image("skill", engine=engine, progress=lines.append)
    again = build_image("skill", engine=engine, progress=lines.append)
    assert built.image_id == again.image_id
    assert built.packages == again.packages
    assert any(line.startswith("python3=3.11") for line in built.packages)
    assert len(lines) >= 8
    assert all(line.startswith("skill: ") and line.endswith(" s)") for line in lines)
    assert engine.api.inspect_image("isolator/skill:latest")["Id"] == built.image_id


@pytest.mark.engine
@pytest.mark.skipif(os.geteuid() != 0, reason="images are built as root")
def test_stuck_build_ends_and_leaves_nothing(engine, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tmp_path.chmod(0o755)
    started = time.monotonic()
    with pytest.raises(IsolatorError) as failure:
        build_image("skill", engine=engine, progress=print, timeout=0.5)
    assert failure.value.code == "image_build_timeout"
    assert time.monotonic() - started < 30
    assert list(tmp_path.iterdir()) == []
    mounts = subprocess.run(["cat", "/proc/mounts"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in mounts
