"""`python tools/train.py CONFIG ...`: the same as `mmtrain train CONFIG ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmtrain.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
