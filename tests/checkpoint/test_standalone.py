"""The checkpoint engine can be used without the rest of the framework."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORT_ALL = """
import importlib, pkgutil, sys
import mmtrain.checkpoint
for module in pkgutil.walk_packages(mmtrain.checkpoint.__path__, "mmtrain.checkpoint."):
    importlib.import_module(module.name)
print(*sys.modules, sep="\\n")
"""
MINE = {"checkpoint", "dist", "dtensor", "errors", "files", "heartbeat", "model_state", "printable", "version"}


def test_it_does_not_import_mmengine_and_little_of_mmtrain():
    result = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=True, cwd=ROOT)
    modules = [name.split(".") for name in result.stdout.split()]
    assert {parts[1] for parts in modules if parts[0] == "mmtrain" and len(parts) > 1} == MINE
    assert not [parts for parts in modules if parts[0] in ("mmengine", "deepspeed", "transformers", "fsspec")]
