"""The short form of benchmarks/soak.py: a few SIGKILLs at random moments of real runs; no run is lost or differs.

In full: ``python benchmarks/soak.py --kills 200``.
"""

import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"
CLEAN = ("lost", "differing", "checkpoints_skipped_as_bad", "left_over", "processes_that_outlived")


def test_six_kills_at_random_moments(tmp_path):
    options = ["--kills", "6", "--seed", "7", "--iters", "80", "--lanes", "1", "--no-write", "--folder", str(tmp_path)]
    soak = subprocess.run(
        [sys.executable, str(SOAK), *options], capture_output=True, text=True, check=False, timeout=600
    )
    assert soak.returncode == 0, soak.stdout + soak.stderr
    figures = dict(line.split(None, 1) for line in soak.stdout.splitlines())
    assert int(figures["kills"]) >= 6
    assert [figures[name] for name in CLEAN] == ["0"] * len(CLEAN)
