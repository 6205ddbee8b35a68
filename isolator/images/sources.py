"""Where packages come from: the host's own Debian sources, so that no mirror is written into the project.

Only entries signed with Debian's archive key, of the wanted suite and its updates and security companions,
component main, are taken: a third party's repository that happens to carry the same suite name must not
decide what is in an image. `trusted=yes` is never carried over: an unsigned mirror fails here, on purpose.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from isolator.model.errors import Unavailable

DEBIAN_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

_URI = re.compile(r"(https?|copy)://?[A-Za-z0-9._~:/@%+\[\]-]+")
_CARRIED_OPTION = re.compile(
    r'^(Acquire::(?:https?::(?:[^" ]*::)?Proxy|Check-Valid-Until|Check-Date)) "([^"\\\s]*)";$', re.IGNORECASE
)
_MAX_SOURCE_BYTES = 256 * 1024


def find_sources(suite: str, etc_apt: Path = Path("/etc/apt")) -> tuple[str, ...]:
    """One-line apt entries for `suite`, its `-updates` and `-security`, in a stable order.

    Raises:
        Unavailable: `image_sources_missing`: the host has no such Debian source, or lacks Debian's keyring.
    """
    if not DEBIAN_KEYRING.is_file():
        raise Unavailable(
            "image_sources_missing",
            f"{DEBIAN_KEYRING} is missing: apt-get install debian-archive-keyring, so packages are verified.",
        )
    wanted = (suite, f"{suite}-updates", f"{suite}-security")
    found: set[tuple[str, str]] = set()
    candidates = [etc_apt / "sources.list", *sorted((etc_apt / "sources.list.d").glob("*"))]
    for path in candidates:
        if path.suffix not in {".list", ".sources"} or not path.is_file():
            continue
        text = path.read_text(errors="replace")[:_MAX_SOURCE_BYTES]
        entries = _stanzas(text) if path.suffix == ".sources" else _lines(text)
        found |= {(uri, name) for uri, name in entries if name in wanted and _URI.fullmatch(uri)}
    if not any(name == suite for _, name in found):
        raise Unavailable(
            "image_sources_missing",
            f"The host has no Debian source for {suite} (component main, signed by Debian's archive key) in "
            f"{etc_apt}. Add one, then build again.",
            suite=suite,
        )
    return tuple(
        f"deb [signed-by={DEBIAN_KEYRING}] {uri} {name} main"
        for uri, name in sorted(found, key=lambda entry: (wanted.index(entry[1]), entry[0]))
    )


def carried_options() -> tuple[str, ...]:
    """The host's apt proxy and validity settings, `Key "value"`: behind a proxy or on a snapshot they matter.

    Signatures are checked whatever these say. Empty when apt-config can't be asked.
    """
    try:
        answer = subprocess.run(
            ["apt-config", "dump"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            stdin=subprocess.DEVNULL,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    matches = (_CARRIED_OPTION.match(line) for line in answer.splitlines())
    return tuple(f'{match[1]} "{match[2]}"' for match in matches if match and match[2])


def _lines(text: str) -> Iterator[tuple[str, str]]:
    for raw in text.splitlines():
        line = raw.partition("#")[0].strip()
        match = re.fullmatch(r"deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s+(.+)", line)
        if match and "main" in match[4].split() and _debian_signed(match[1] or ""):
            yield match[2].rstrip("/"), match[3]


def _stanzas(text: str) -> Iterator[tuple[str, str]]:
    for block in re.split(r"\n\s*\n", text):
        fields = _fields(block)
        usable = (
            "deb" in fields.get("types", "").split()
            and fields.get("enabled", "yes").lower() not in {"no", "false"}
            and "main" in fields.get("components", "").split()
            and _debian_signed(f"signed-by={fields['signed-by']}" if "signed-by" in fields else "")
        )
        if usable:
            for uri in fields.get("uris", "").split():
                for suite in fields.get("suites", "").split():
                    yield uri.rstrip("/"), suite


def _fields(block: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    key = ""
    for line in block.splitlines():
        if line.startswith("#"):
            continue
        if line[:1].isspace():
            fields[key] = f"{fields.get(key, '')} {line.strip()}"
        elif ":" in line:
            key, _, value = line.partition(":")
            key = key.strip().lower()
            fields[key] = value.strip()
    return fields


def _debian_signed(options: str) -> bool:
    """No key named (then Debian's is demanded) or Debian's: another key means another publisher."""
    key = re.search(r"signed-by=(\S+)", options, re.IGNORECASE)
    return key is None or "debian-archive" in key[1]
