"""Settings: one place each, in a known order, and nothing misspelt or impossible is passed over."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest

from isolator.model.sizes import format_size, parse_size
from isolator.settings import Settings, load_settings


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting from the shell that runs the tests; an empty file instead of the host's."""
    for name in list(os.environ):
        if name.startswith("ISOLATOR_"):
            monkeypatch.delenv(name)
    (tmp_path / "empty.toml").write_text("")
    monkeypatch.setenv("ISOLATOR_CONFIG", str(tmp_path / "empty.toml"))


def from_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "isolator.toml"
    path.write_text(text)
    monkeypatch.setenv("ISOLATOR_CONFIG", str(path))
    return load_settings()


def refused(**overrides: object) -> str:
    with pytest.raises(pydantic.ValidationError) as caught:
        load_settings(**overrides)
    return str(caught.value)


def test_the_defaults_are_the_documented_ones() -> None:
    settings = load_settings()
    assert (settings.default_cpus, settings.default_memory, settings.default_pids) == (1.0, 512 * 2**20, 256)
    assert settings.workspace_roots == []
    assert settings.allowed_images == []
    assert settings.admin_uids == [0]
    assert settings.socket_path == Path("/run/isolator/isolator.sock")
    assert settings.image_lock_path == Path("/var/lib/isolator/images.json")


def test_environment_beats_file_beats_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = 'default_pids = 100\ndefault_memory = "128m"\nworkspace_roots = ["/srv/a"]\n'
    settings = from_file(monkeypatch, tmp_path, text)
    assert (settings.default_pids, settings.default_memory) == (100, 128 * 2**20)
    assert settings.workspace_roots == [Path("/srv/a")]
    monkeypatch.setenv("ISOLATOR_DEFAULT_PIDS", "50")
    settings = load_settings()
    assert (settings.default_pids, settings.default_memory, settings.default_nofile) == (50, 128 * 2**20, 4096)
    assert load_settings(default_pids=20).default_pids == 20


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOLATOR_DEFAULT_PIDS", "")
    assert load_settings().default_pids == 256


@pytest.mark.parametrize("key", ["max_pidss", "privileged", "socket-group"])
def test_an_unknown_key_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        from_file(monkeypatch, tmp_path, f"{key} = 5\n")
    assert key in str(caught.value)


def test_an_unknown_section_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(pydantic.ValidationError, match="limits"):
        from_file(monkeypatch, tmp_path, "[limits]\npids = 5\n")


def test_a_named_file_must_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ISOLATOR_CONFIG", str(tmp_path / "missing.toml"))
    with pytest.raises(FileNotFoundError, match=r"missing\.toml"):
        load_settings()


def test_a_file_that_is_no_toml_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 1"):
        from_file(monkeypatch, tmp_path, "max_pids: 5\n")


@pytest.mark.parametrize(
    ("text", "roots"),
    [
        ("/a:/b", ["/a", "/b"]),
        ('["/a", "/b:c"]', ["/a", "/b:c"]),
        ("/a", ["/a"]),
        ("/a::/b:", ["/a", "/b"]),
        ("[]", []),
    ],
)
def test_lists_are_json_or_colons(monkeypatch: pytest.MonkeyPatch, text: str, roots: list[str]) -> None:
    monkeypatch.setenv("ISOLATOR_WORKSPACE_ROOTS", text)
    assert load_settings().workspace_roots == [Path(root) for root in roots]


@pytest.mark.parametrize("text", ["a:b", "./a", "~/a", '["a"]', '["/a"', "[1]"])
def test_lists_of_anything_else_are_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ISOLATOR_WORKSPACE_ROOTS", text)
    assert "workspace_roots" in refused()


def test_digests_and_uids_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = ["sha256:" + "a" * 64, "sha256:" + "b" * 64]
    monkeypatch.setenv("ISOLATOR_ALLOWED_IMAGES", ", ".join(digests))
    monkeypatch.setenv("ISOLATOR_ADMIN_UIDS", "0,1000")
    settings = load_settings()
    assert (settings.allowed_images, settings.admin_uids) == (digests, [0, 1000])


@pytest.mark.parametrize(
    "image", ["debian", "debian:12", "sha256:abc", "sha256:" + "A" * 64, "*", "sha256:" + "a" * 65]
)
def test_an_image_is_allowed_by_digest_only(image: str) -> None:
    assert "allowed_images" in refused(allowed_images=[image])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512m", 2**29),
        ("1.5g", 3 * 2**29),
        ("64k", 2**16),
        ("100", 100),
        ("1GiB", 2**30),
        (" 2 M ", 2**21),
        (4096, 4096),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size
    assert load_settings(max_body=text).max_body == size


@pytest.mark.parametrize(
    "text", ["0", "-1", 0, -1, "1e9", "512mm", "", "m", "0x10", "\u0665m", "1,5g", 1.5, True, 2**54]
)
def test_no_sizes(text: object) -> None:
    assert "max_body" in refused(max_body=text)


def test_sizes_are_shown_as_they_are_written() -> None:
    for text in ("512m", "1.5g", "64k", "100"):
        assert format_size(parse_size(text)) == text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("default_pids", 0),
        ("default_pids", -1),
        ("default_cpus", 0),
        ("default_cpus", float("nan")),
        ("cleanup_grace", -1),
        ("max_ttl", 0),
        ("engine_timeout", float("inf")),
        ("agent_uid", 0),
        ("agent_uid", 2**31),
        ("max_agents", 0),
        ("max_connections", 0),
        ("request_timeout", 0),
        ("socket", "isolator.sock"),
        ("state_dir", "state"),
        ("backend", "podman"),
        ("instance", "Default"),
        ("instance", "a b"),
        ("instance", ""),
        ("instance", "x\n"),
        ("admin_uids", [-1]),
        ("admin_uids", ["root"]),
    ],
)
def test_a_value_that_can_not_be_is_refused_by_name(name: str, value: object) -> None:
    assert name in refused(**{name: value})


@pytest.mark.parametrize(
    ("pool", "prefix"),
    [
        ("10.208.0.0/12", 11),
        ("10.208.0.1/12", 24),
        ("8.8.0.0/16", 24),
        ("10.0.0.0/25", 24),
        ("fd00::/8", 24),
        ("everything", 24),
        ("10.0.0.0/33", 24),
    ],
)
def test_a_subnet_pool_that_can_not_be_cut_is_refused(pool: str, prefix: int) -> None:
    assert "subnet" in refused(subnet_pool=pool, subnet_prefix=prefix).lower()


def test_a_subnet_pool_that_can() -> None:
    assert load_settings(subnet_pool="192.168.0.0/16", subnet_prefix=28).subnet_prefix == 28


@pytest.mark.parametrize("name", ["memory", "pids", "disk", "nofile"])
def test_a_default_above_its_maximum_is_refused(name: str) -> None:
    least = {"memory": 2**20, "pids": 4, "disk": 4096, "nofile": 64}[name]
    assert f"default_{name}" in refused(**{f"max_{name}": least})
    assert load_settings(**{f"max_{name}": least, f"default_{name}": least})


def test_a_default_ttl_above_the_longest_is_refused() -> None:
    assert "default_ttl" in refused(default_ttl=100, max_ttl=50)
    assert load_settings(default_ttl=50, max_ttl=50).default_ttl == 50


def test_settings_do_not_change() -> None:
    settings = load_settings()
    with pytest.raises(pydantic.ValidationError):
        settings.max_pids = 10**6  # type: ignore[misc]


def test_a_user_without_root_gets_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    monkeypatch.setenv("XDG_STATE_HOME", "/home/ada/.local/state")
    settings = load_settings()
    assert settings.socket_path == Path("/run/user/1000/isolator/isolator.sock")
    assert settings.state_dir == Path("/home/ada/.local/state/isolator")


def test_own_folders_are_known_by_their_real_paths(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    settings = load_settings(state_dir=str(tmp_path / "link"), runtime_dir=str(tmp_path / "run"))
    assert str(tmp_path / "real") in [str(folder) for folder in settings.own_folders()]
    assert stat.S_ISDIR((tmp_path / "real").stat().st_mode)


def test_every_setting_says_what_it_is() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize("backend", ["bubblewrap", "landlock"])
def test_a_backend_that_is_not_here_is_refused_and_nothing_made(tmp_path: Path, backend: str) -> None:
    """Served by another backend than the one asked for would be a silent weakening."""
    places = {f"ISOLATOR_{name}_DIR": str(tmp_path / name) for name in ("STATE", "RUNTIME")}
    refused = subprocess.run(
        [sys.executable, "-m", "isolator", "daemon"],
        env={
            **os.environ,
            **places,
            "ISOLATOR_SOCKET": str(tmp_path / "socket"),
            "ISOLATOR_BACKEND": backend,
            "ISOLATOR_MAX_MEMROY": "1g",
        },
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert refused.returncode == 125
    assert f"no backend {backend}" in refused.stderr
    assert "(backend_unavailable)" in refused.stderr
    assert "ISOLATOR_MAX_MEMROY" in refused.stderr, "a misspelt setting is at least told"
    assert [left.name for left in tmp_path.iterdir()] == ["empty.toml"]
