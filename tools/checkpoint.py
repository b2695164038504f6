"""`python tools/checkpoint.py VERB ...`: the same as `mmtrain checkpoint VERB ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmtrain.cli.checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
