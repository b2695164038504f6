"""Lets these tests import one another's helpers."""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / name) for name in ("dist", "contract", "strategies")]
