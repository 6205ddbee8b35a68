"""Where the daemon's socket is, found without loading all settings: `isolator ps` should not wait for that.

The order is the daemon's own: ISOLATOR_SOCKET, the configuration file, the runtime folder. A caller who named
nothing and is not root also looks at the system's daemon, since that is the one most machines have.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYSTEM_SOCKET = Path("/run/isolator/isolator.sock")
_CONFIG = Path("/etc/isolator/isolator.toml")
_FILE = "isolator.sock"


@dataclass(frozen=True, slots=True)
class Location:
    """A socket's path; `named`: somebody said so; else a default place, which anybody might have taken."""

    path: Path
    named: bool


def find_socket(given: Path | None = None) -> Location:
    """The socket to connect to. Looks at environment and files, connects to nothing, raises nothing."""
    if given is not None:
        return Location(given.absolute(), named=True)
    if socket := os.environ.get("ISOLATOR_SOCKET"):
        return Location(Path(socket), named=True)
    configured = _configured()
    if isinstance(socket := configured.get("socket"), str):
        return Location(Path(socket), named=True)
    folder = os.environ.get("ISOLATOR_RUNTIME_DIR") or configured.get("runtime_dir")
    if isinstance(folder, str):
        return Location(Path(folder) / _FILE, named=True)
    if os.geteuid() == 0:
        return Location(SYSTEM_SOCKET, named=False)
    own = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/isolator-{os.geteuid()}") / "isolator" / _FILE
    return Location(own if own.exists() or not SYSTEM_SOCKET.exists() else SYSTEM_SOCKET, named=False)


def _configured() -> dict[str, Any]:
    """The configuration file's keys; one we can't read says nothing (the daemon's start judges it)."""
    import tomllib  # noqa: PLC0415 - only where nothing else names the socket

    path = Path(os.environ.get("ISOLATOR_CONFIG") or _CONFIG)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
