"""What a run says of itself at its beginning and at its end."""

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from mmtrain import dist

if TYPE_CHECKING:
    from mmtrain.runner.flexible_runner import FlexibleRunner


def opening_lines(runner: "FlexibleRunner") -> list[str]:
    """Where the run writes, what it trains, and how long it will be."""
    # A parameter that ZeRO-3 has cut is empty between its uses, and remembers its size.
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in runner.model.parameters()]
    trains = [parameter.requires_grad for parameter in runner.model.parameters()]
    trained = sum(size for size, own in zip(sizes, trains, strict=True) if own)
    share = "all trained" if trained == sum(sizes) else f"{trained:,} of them trained"
    processes = "1 process" if runner.world_size == 1 else f"{runner.world_size} processes"
    if dist.model_parallel() > 1:
        processes += f" as dp {dist.data_size()} x tp {dist.model_parallel()}"
    return [
        f"Run {runner.experiment_name} in {runner.log_dir} ({runner.device.type}, {processes}, seed {runner.seed})",
        f"Model {type(runner.model).__name__}: {sum(sizes):,} parameters, {share}",
        _data_line(runner),
    ]


def _data_line(runner: "FlexibleRunner") -> str:
    stream, per_epoch, total = runner.train_dataloader, runner.iterations_per_epoch, runner.max_iters
    line = f"Data {type(stream.dataset).__name__}"
    if stream.samples is not None:
        line += f": {stream.samples:,} samples an epoch"
    if per_epoch is not None:
        line += f", {per_epoch:,} iterations of {runner.scale.global_batch}"
    if total is not None:
        line += f"; {total:,} iterations in all"
        if per_epoch:
            line += f" ({total / per_epoch:.1f} epochs)"
    return line


def closing_lines(runner: "FlexibleRunner", *, seconds: float) -> list[str]:
    """How far the run came, and where everything is."""
    progress = runner.progress
    spent = timedelta(seconds=round(seconds))
    ended = "Stopped" if runner.stop_requested else "Finished"
    lines = [f"{ended} at iteration {progress.iteration:,} ({progress.samples:,} samples) after {spent}"]
    if runner.metrics:
        told = ", ".join(
            f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
            for name, value in runner.metrics.items()
        )
        lines[0] += f"; last validation: {told}"
    newest = runner.saving.store.pointer()
    if newest is not None:
        lines.append(f"Newest checkpoint: {runner.saving.store.root / newest}")
    lines.append(f"Log, config and scalars: {Path(runner.log_dir)}")
    if runner.stop_requested and not runner.stops_for_good and progress.iteration < (runner.max_iters or 0):
        lines.append("To continue, start the same command with --resume")
    return lines
