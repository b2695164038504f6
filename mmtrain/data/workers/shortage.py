"""Saying which resource ran out when batches are handed over from data workers."""

import errno
import shutil
from pathlib import Path
from typing import Any

from mmtrain.data.options import WorkerOptions

SHARED_MEMORY = Path("/dev/shm")
PREFETCH_FACTOR = 2  # as torch's DataLoader


def explain(error: BaseException | None, request: Any, options: WorkerOptions, path: str) -> str | None:
    """Return the sentence to report if an error is about shared memory or open files, else None.

    Workers hand over tensors in files of shared memory, so where neither the dataset nor ``collate_fn`` can do anything
    about it, torch's error comes from inside of one of them.
    """
    number, text = getattr(error, "errno", None), str(error)
    if "shared memory" in text or (number == errno.ENOSPC and str(SHARED_MEMORY) in text):
        return _memory_is_full(request, options, path)
    if number == errno.EMFILE or "Too many open files" in text or "ancdata" in text:
        return (
            f"{path}.num_workers: too many open files. Each tensor of a batch from a data worker needs one; raise the "
            "limit (ulimit -n), stack tensors in collate_fn, or lower prefetch_factor or num_workers."
        )
    return None


def _memory_is_full(request: Any, options: WorkerOptions, path: str) -> str:
    size = ""
    if SHARED_MEMORY.is_dir():
        usage = shutil.disk_usage(SHARED_MEMORY)
        size = f" ({usage.total / 1e6:.0f} MB, {usage.free / 1e6:.0f} MB free)"
    prefetch = options.prefetch_factor or PREFETCH_FACTOR
    samples = len(getattr(request, "indices", ()))
    batches = f"batches of {samples} samples" if samples else "batches"
    return (
        f"{path}: {SHARED_MEMORY}{size} has no room for another batch. Data workers keep {batches} there: up to "
        f"{prefetch * options.num_workers} that are read ahead (num_workers={options.num_workers} x "
        f"prefetch_factor={prefetch}), and those in use. Make it larger (docker run --shm-size), or lower batch_size, "
        "prefetch_factor or num_workers."
    )
