"""Fuzzes every target for a while: `python tests/fuzz/run.py [SECONDS] [TARGET…]`; 20 s each if nothing is said.

Needs atheris, which the extra `dev` brings where it has wheels. What made a target fail is kept as a file named
crash-… in the folder this runs in; give it to targets.py as an argument to see it again.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TARGETS = ("daemon", "guest", "api")


def main() -> int:
    """The number of targets that failed."""
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    failed = 0
    for target in sys.argv[2:] or TARGETS:
        options = [f"-max_total_time={seconds}", "-max_len=20000", "-rss_limit_mb=1024", "-timeout=10"]
        ended = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("targets.py")), target, *options],
            timeout=seconds + 60,
            check=False,
        )
        failed += ended.returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
