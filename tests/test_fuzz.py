"""The fuzz targets, for a moment each: that they run and find nothing at once. tests/fuzz/run.py takes its time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz"


@pytest.mark.parametrize("target", ["daemon", "guest", "api"])
def test_a_moment_of_fuzzing_finds_nothing(target: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="it has no wheel here")
    ended = subprocess.run(
        [sys.executable, str(FUZZ / "targets.py"), target, "-max_total_time=2", "-max_len=2000", "-seed=1"],
        capture_output=True,
        cwd=tmp_path,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr.decode(errors="replace")[-3000:]
    assert b"cov:" in ended.stderr, "nothing was measured"
