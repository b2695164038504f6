"""The lines at the beginning and at the end of a run's log."""

from datetime import timedelta
from pathlib import Path

from mmtrain import dist
from mmtrain.runner.run import Run


def opening_lines(run: Run) -> list[str]:
    """Where the run writes, what it trains, and how long it is."""
    sizes = [run.strategy.full_size(parameter) for parameter in run.model.parameters()]
    trains = [parameter.requires_grad for parameter in run.model.parameters()]
    trained = sum(size for size, own in zip(sizes, trains, strict=True) if own)
    share = "all trainable" if trained == sum(sizes) else f"{trained:,} trainable"
    processes = "1 process" if run.world_size == 1 else f"{run.world_size} processes"
    if dist.model_parallel() > 1:
        processes += f" as dp {dist.data_size()} x tp {dist.model_parallel()}"
    return [
        f"Run {run.experiment_name} in {run.log_dir} ({run.device.type}, {processes}, seed {run.seed})",
        f"Model {type(run.model).__name__}: {sum(sizes):,} parameters, {share}",
        _data_line(run),
        *_without_checkpoints(run),
    ]


def _without_checkpoints(run: Run) -> list[str]:
    """What to know of a run without a CheckpointHook, which otherwise says itself when it saves."""
    if any(hasattr(hook, "save_policy") for hook in run.hooks):
        return []
    return [
        "Checkpoints: only on SIGTERM, SIGUSR1 and Ctrl-C, because default_hooks.checkpoint is None; a run that is "
        "killed starts over"
    ]


def _data_line(run: Run) -> str:
    stream = run.train_dataloader
    assert stream is not None
    per_epoch = run.iterations_per_epoch
    total = run.max_iters
    line = f"Data {type(stream.dataset).__name__}"
    if stream.samples is not None:
        line += f": {stream.samples:,} samples per epoch"
    if per_epoch is not None:
        line += f", {per_epoch:,} iterations of {run.geometry.global_batch}"
    if total is not None:
        line += f"; {total:,} iterations in total"
        if per_epoch:
            line += f" ({total / per_epoch:.1f} epochs)"
    return line


def closing_lines(run: Run, *, seconds: float, newest: Path | None) -> list[str]:
    """Where the run ended, and where its files are. ``newest`` is the newest checkpoint."""
    progress = run.progress
    spent = timedelta(seconds=round(seconds))
    ended = "Stopped" if run.stop_requested else "Finished"
    lines = [f"{ended} at iteration {progress.iteration:,} ({progress.samples:,} samples) after {spent}"]
    if run.metrics:
        metrics = ", ".join(
            f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
            for name, value in run.metrics.items()
        )
        lines[0] += f"; last validation: {metrics}"
    if newest is not None:
        lines.append(f"Newest checkpoint: {newest}")
    lines.append(f"Log, config and scalars: {Path(run.log_dir)}")
    if run.stop_requested and not run.requests.stops_for_good and progress.iteration < (run.max_iters or 0):
        lines.append("To continue, start the same command with --resume")
    return lines
