"""``python -m mmtrain COMMAND ...``."""

import sys

from mmtrain.cli.__main__ import main

sys.exit(main())
