"""Known holes in the engine's parts, told by version number.

A number says little: distributions repair without changing it, and the text says so. What isolator does about
each stands beside it, so that a reader knows which ones still need hands.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from isolator.cli.checks.engine import components
from isolator.cli.checks.finding import Facts, Finding, Level

Version = tuple[int, int, int]
_NUMBER: Final = re.compile(r"v?(\d+)\.(\d+)(?:\.(\d+))?")
_BY_VERSION: Final = " By version only; distributions patch without changing the number: see its changelog."


@dataclass(frozen=True, slots=True)
class Hole:
    """One hole (or several with one cure).

    repaired: first version without it in each line of releases (1.2, 1.3, …), oldest line first. Lines newer than
    the last never had it; any other line that is not named was never repaired.
    closed: isolator itself leaves no way to it.
    """

    component: str
    names: str
    repaired: tuple[Version, ...]
    meaning: str
    action: str
    closed: bool = False

    def concerns(self, version: Version) -> bool:
        """Whether this version has it, by its number."""
        own = [fix for fix in self.repaired if fix[:2] == version[:2]]
        return version < (own or self.repaired)[-1]


HOLES: Final = (
    Hole(
        "runc",
        "CVE-2024-21626",
        ((1, 1, 12),),
        "a leaked descriptor lets an image's working directory lead to the host.",
        "upgrade runc. isolator sets every working directory itself and uses images by digest only",
    ),
    Hole(
        "runc",
        "CVE-2025-31133, CVE-2025-52565, CVE-2025-52881",
        ((1, 2, 8), (1, 3, 3), (1, 4, 0)),
        "a hostile image, or a folder two starting boxes share read-write, can make runc mount or write over the "
        "host's /proc.",
        "upgrade runc to 1.2.8, 1.3.3 or newer. Until then allow no foreign image; isolator gives boxes no "
        "terminal and a read-only root",
    ),
    Hole(
        "runc",
        "CVE-2026-41579",
        ((1, 3, 6), (1, 4, 3), (1, 5, 0)),
        "an image whose /dev is a link misleads runc.",
        "upgrade runc. isolator refuses such images before it starts them",
        closed=True,
    ),
    Hole(
        "engine",
        "CVE-2024-29018",
        ((23, 0, 11), (25, 0, 5), (26, 0, 0)),
        "name lookups from closed networks are forwarded to the outside: a way out for data.",
        "isolator closes it (its boxes have no resolver, and the network self-test tries); upgrade all the same",
        closed=True,
    ),
    Hole(
        "engine",
        "CVE-2026-41567, CVE-2026-42306",
        ((29, 5, 1),),
        "docker cp on a hostile container runs that container's programs as root of the host, or overwrites the "
        "host's files.",
        "never run docker cp on an agent's container (isolator itself never does); upgrade the engine to 29.5.1",
    ),
)


def check_holes(facts: Facts) -> list[Finding]:
    """One finding for each hole that the engine's versions speak of, or one that says there is none."""
    if facts.version is None:
        return []
    versions = components(facts.version)
    versions.setdefault("engine", str(facts.version.get("Version", "")))
    findings = []
    for hole in HOLES:
        version = parse_version(versions.get(hole.component, ""))
        if version is None or not hole.concerns(version):
            continue
        level: Level = "ok" if hole.closed else "weak"
        said = f"{hole.component} {versions[hole.component]}: {hole.meaning}{_BY_VERSION}"
        findings.append(Finding(hole.names, level, said, hole.action))
    return findings or [Finding("known holes", "ok", "none of those known to this version of isolator")]


def parse_version(text: str) -> Version | None:
    """The leading number of a version such as `20.10.24+dfsg1`; None if there is none."""
    match = _NUMBER.match(text)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None
