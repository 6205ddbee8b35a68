"""Where the files that ship beside the code are: seccomp profiles, image recipes, systemd units.

In a checkout they stand at the repository's top, where people look for them; in an installed wheel the
build puts the same folders into `isolator/_data`.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resource_folder(name: str) -> Path:
    """The folder `name` (`seccomp`, `images`, `systemd`).

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    for candidate in (_PACKAGE / "_data" / name, _PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"isolator's {name}/ folder is missing: reinstall the package")
