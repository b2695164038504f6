"""How a run counts (samples, iterations, updates), and a position counted at another batch size."""

import math
from dataclasses import dataclass, replace
from typing import Any

from mmtrain.checkpoint import Manifest
from mmtrain.progress import Progress


@dataclass(frozen=True, slots=True)
class BatchGeometry:
    """``global_batch``: samples of one iteration over all ranks; ``accumulative_counts``: iterations of one update;
    ``iterations_per_epoch``: iterations of one epoch. None if a number is unknown."""

    global_batch: int | None
    accumulative_counts: int = 1
    iterations_per_epoch: int | None = None

    @property
    def effective_batch(self) -> int | None:
        """Samples of one update over all ranks."""
        return None if self.global_batch is None else self.global_batch * self.accumulative_counts


def saved_geometry(manifest: Manifest) -> BatchGeometry:
    """How the run that saved a checkpoint counted."""
    batch = manifest.meta.get("batch_size")
    return BatchGeometry(
        global_batch=batch * manifest.meta.get("data_size", manifest.world_size) if batch else None,
        accumulative_counts=manifest.meta.get("accumulative_counts", 1),
        iterations_per_epoch=manifest.meta.get("iterations_per_epoch"),
    )


def rescale(progress: Progress, old: BatchGeometry, new: BatchGeometry, *, same_data: bool = True) -> Progress:
    """The same position at another global batch: samples stay, iterations are recounted from them.

    ``iter_1500`` at 128 samples per iteration is iteration 3000 at 64: the same share of the epoch and of the run.
    ``same_data`` is False if the epochs of ``new`` are over another dataset.
    """
    if old.global_batch == new.global_batch or not old.global_batch or not new.global_batch:
        return progress
    in_epoch = math.ceil(progress.offset / new.global_batch)
    before = old.iterations_per_epoch
    after = new.iterations_per_epoch
    if before is None or after is None:
        iteration = round(progress.samples / new.global_batch)
    elif same_data and progress.iteration == progress.epoch * before + progress.epoch_iteration:
        iteration = progress.epoch * after + in_epoch
    else:  # epochs over other data, or at another batch size, are among them
        iteration = round(progress.iteration * old.global_batch / new.global_batch)
    skipped = round(progress.skipped * old.global_batch / new.global_batch)
    return replace(progress, iteration=iteration, epoch_iteration=in_epoch, skipped=skipped)


def move_in_data(progress: Progress, choice: Any, geometry: BatchGeometry) -> Progress:
    """The position after ``resume_data``: "continue", "restart", or ``dict(skip_iters=k)``, as `check_config` allows.

    "restart" goes to the start of the current epoch, ``skip_iters`` to k iterations after that.
    """
    if choice in (None, "continue"):
        return progress
    if choice == "restart":
        return replace(progress, offset=0, epoch_iteration=0)
    skip = int(choice["skip_iters"])
    per_epoch = geometry.iterations_per_epoch
    epochs, rest = divmod(skip, per_epoch) if per_epoch else (0, skip)
    offset = rest * (geometry.global_batch or 0)
    return replace(progress, epoch=progress.epoch + epochs, offset=offset, epoch_iteration=rest)


def geometry_lines(old: BatchGeometry, new: BatchGeometry, *, lr: float | None) -> tuple[list[str], list[str]]:
    """What to report about a changed batch size: (lines to log, warnings)."""
    if old == new or old.effective_batch is None or new.effective_batch is None:
        return [], []
    change = (
        f"global batch {old.global_batch} x accumulation {old.accumulative_counts} -> "
        f"{new.global_batch} x {new.accumulative_counts}"
    )
    if old.effective_batch == new.effective_batch:
        if old.global_batch == new.global_batch:
            return [], []
        return [f"Batch geometry changed ({change}): the effective batch is still {new.effective_batch} samples."], []
    advice = ""
    if lr is not None:
        ratio = new.effective_batch / old.effective_batch
        advice = (
            f" The config's lr {lr:g} is used unchanged; the linear rule would make it {lr * ratio:g}, "
            f"the square-root rule {lr * math.sqrt(ratio):g}."
        )
    return [], [
        f"THE EFFECTIVE BATCH CHANGED from {old.effective_batch} to {new.effective_batch} samples per update "
        f"({change}).{advice}"
    ]


def recount_line(old: BatchGeometry, new: BatchGeometry, *, before: int, after: int) -> str | None:
    """The line that translates the iteration numbers of a checkpoint into today's, if they differ."""
    if before == after:
        return None
    return (
        f"Iterations are now counted at global batch size {new.global_batch}: "
        f"iteration {after} corresponds to the old {before}."
    )
