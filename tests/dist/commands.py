"""The train command in two processes, with a config that may contain a fault."""

import sys
import time
from pathlib import Path

import strategy_parts
from ranks import ROOT, free_port, outcomes, start_all

SOON = 120  # seconds: if a failure were not reported, the others would wait for 300 or more
TRAIN = [sys.executable, str(ROOT / "tools" / "train.py")]


def write_config(folder, name, **changes):
    import parts

    cfg = parts.config(
        Path(folder) / name, **{**strategy_parts.changes(2, iterations=40), "log_level": "INFO", **changes}
    )
    lines = [f"{key} = {value!r}\n" for key, value in cfg.items()]
    path = Path(folder) / f"{name}.py"
    path.write_text("custom_imports = dict(imports=['dist_parts', 'strategy_parts'])\n" + "".join(lines))
    return path


def with_failure(folder, name, kind, rank, *, iteration=16, once=False, **changes):
    hook = {"type": "FailOrHang", "kind": kind, "rank": rank, "iteration": iteration}
    if once:
        hook["marker"] = str(Path(folder) / "marker")
    hooks = [hook, *changes.pop("custom_hooks", ())]
    return write_config(folder, name, custom_hooks=hooks, resume=True, **changes)


def run(path, *options, **variables):
    """(exit statuses, what each rank wrote to stderr, seconds)."""
    began = time.monotonic()
    found = outcomes(start_all([*TRAIN, str(path), *options], 2, **variables))
    return [status for status, _ in found], [errors for _, errors in found], time.monotonic() - began


def torchrun(path, *options, size=2):
    """The same under torchrun; exit status, and what all processes wrote to stderr."""
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", f"--master-port={free_port()}",
        *options, str(ROOT / "tools" / "train.py"), str(path),
    ]  # fmt: skip
    ((status, errors),) = outcomes(start_all(command, 1, RANK="", WORLD_SIZE=""), timeout=SOON)
    return status, errors


def causes(errors):
    """The sentences that say why a run ended."""
    return [line for line in errors.splitlines() if line.startswith("error: ")]


def first_line(errors):
    lines = [line for line in errors.splitlines() if line.strip() and " - mmtrain - " not in line]
    return lines[0] if lines else ""
