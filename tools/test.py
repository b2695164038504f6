"""`python tools/test.py CONFIG ...`: the same as `mmtrain test CONFIG ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmtrain.cli.test import main

if __name__ == "__main__":
    sys.exit(main())
