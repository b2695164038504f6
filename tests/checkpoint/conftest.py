"""Makes `saved_state` importable, here and from tests/faults."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
