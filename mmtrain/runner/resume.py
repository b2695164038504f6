"""Restores a chosen checkpoint, in one fixed order, and reports what happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmtrain import dist, model_state, randomness
from mmtrain.checkpoint import Checkpoint, CheckpointStore, Manifest, copy_matched, describe, load_weights
from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.logging import LogPosition, cut_logs, note_start, starts_of
from mmtrain.optim import GroupValues
from mmtrain.progress import Progress
from mmtrain.runner import compare, data_identity
from mmtrain.runner.best import BestRecords
from mmtrain.runner.checkpoint_fields import saved_kinds
from mmtrain.runner.choose import StartPoint
from mmtrain.runner.frozen import FrozenParameters, frozen_names
from mmtrain.runner.geometry import geometry_lines, move_in_data, recount_line, rescale, saved_geometry
from mmtrain.runner.run import Run
from mmtrain.runner.state import restore_small_state, restoring, saved_model_entries
from mmtrain.strategies import native as native_format
from mmtrain.strategies.base import OptimizerState, SavedTensor


@dataclass
class ResumeReport:
    """Lines for the log about what was loaded or restored, and warnings."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def load_start_weights(run: Run, start: StartPoint) -> list[str]:
    """Copy the weights of ``load_from`` into the model, and nothing else; returns a line about them."""
    if start.weights_from is None:
        return []
    options = dict(run.cfg.get("load_options") or {})
    revise_keys = {"revise_keys": options["revise_keys"]} if "revise_keys" in options else {}
    weights = load_weights(start.weights_from, verify=start.verify == "full", **revise_keys)
    targets = run.strategy.model_targets({name: SavedTensor(w.shape, w.dtype) for name, w in weights.tensors.items()})
    report = copy_matched(
        weights.tensors, targets, source=weights.source, allow_mismatch=options.get("allow_mismatch", False)
    )
    run.strategy.load_model_state({name: targets[name] for name in report.matched})
    return [f"Loaded the weights of {weights.source} ({weights.kind}): {'; '.join(describe(report))}."]


def restore(run: Run, start: StartPoint, store: CheckpointStore, best: BestRecords, *, name: str) -> ResumeReport:
    """Restore the chosen checkpoint, or load weights, or leave the fresh state as it is; a collective.

    ``name`` is this run's `Manifest.run`.

    Raises CheckpointError if the checkpoint does not belong to this run, and ConfigError if the engine's own
    format cannot be kept on disks that are not shared.
    """
    if store.topology.is_divided:
        run.strategy.check_separate_disks(store.root)
    run.frozen = FrozenParameters(run.model)
    run.buffer_kinds = model_state.buffer_kinds(run.model)
    report = ResumeReport(list(start.notices))
    if start.checkpoint is not None:
        _Restorer(run, start, store, best, report).restore(start.checkpoint)
    else:
        report.lines += load_start_weights(run, start)
        if start.starts_over:
            _cut_logs(store, starts_of(run.work_dir), LogPosition(0, 0, run.geometry.global_batch))
    if dist.is_main():  # after the cut: a start that fails before this point has logged nothing
        with suppress(OSError):  # without the note, later starts cut these logs by step number
            note_start(run.log_dir, _log_position(run), run=name)
    return report


class _Restorer:
    """The steps of `restore` for a checkpoint."""

    def __init__(
        self, run: Run, start: StartPoint, store: CheckpointStore, best: BestRecords, report: ResumeReport
    ) -> None:
        self._run = run
        self._start = start
        self._store = store
        self._best = best
        self._report = report

    def restore(self, checkpoint: Checkpoint) -> None:
        run, report = self._run, self._report
        meta = checkpoint.manifest.meta
        values = compare.flat_config(run.cfg)
        self._check_belongs(checkpoint, values)
        state, own = checkpoint.state_by_name(), self._store.own_rng(checkpoint)
        if own is not None and not isinstance(own, Mapping):
            raise CheckpointError(f"{checkpoint.path}: what this rank saved is a {type(own).__name__}, expected a dict")
        self._restore_tensors(checkpoint, state, (own or {}).get("model", {}))
        state_report = restore_small_state(run, self._best, state)
        self._restore_position(checkpoint)
        if own is not None:
            with restoring("the generators"):
                randomness.restore(own["generators"])
            if run.data_moved_by is None:  # else the state is of other data, or of another position in it
                with restoring("train_dataloader"):
                    _stream(run).load_state_dict(own["data"])
        with restoring("extra"):
            extra = dict(state.get("extra", {}))
        run.hooks.call("after_load_checkpoint", run, checkpoint=extra)
        report.lines += state_report.lines()
        samples = int(checkpoint.manifest.position["samples"])
        position = LogPosition(checkpoint.manifest.iteration, samples, saved_geometry(checkpoint.manifest).global_batch)
        starts = starts_of(run.work_dir, run=checkpoint.manifest.run, first_log_dir=meta.get("began", ""))
        _cut_logs(self._store, starts, position)
        for line in compare.differences(meta.get("config_values", {}), values):
            report.lines.append(f"changed since the checkpoint: {line}")

    def _check_belongs(self, checkpoint: Checkpoint, values: Mapping[str, str]) -> None:
        """Refuse another optimizer and other data; find out whether ``resume_data`` moves this run."""
        run, manifest = self._run, checkpoint.manifest
        if "samples" not in manifest.position:
            raise CheckpointError(f"{checkpoint.path}: its manifest has no position.samples, so no run saved it")
        compare.check_same_optimizer(manifest.meta.get("optimizer", ""), run.optimizer_name)
        choice = run.cfg.get("resume_data")
        same_data = data_identity.same_data(manifest.data_fingerprint, run.data_fingerprint)
        if choice in (None, "continue"):
            data_identity.check_same_data_as_checkpoint(manifest.data_fingerprint, run.data_fingerprint)
        elif same_data and data_identity.moved_before(manifest.meta.get("config_values", {}), values):
            self._report.lines.append(
                f"resume_data={choice!r} was already applied by the run that saved this checkpoint; its data position "
                "is used."
            )
        else:
            run.data_moved_by = choice

    # ---- tensors ------------------------------------------------------------------------------------------------
    def _restore_tensors(self, checkpoint: Checkpoint, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Restore the model and the optimizer; ``own`` are entries of the model's state that only this rank has."""
        run = self._run
        meta = checkpoint.manifest.meta
        native = meta.get("native")
        partial = not checkpoint.manifest.has_frozen
        if partial and run.cfg.get("resume") == "auto" and run.cfg.get("load_from") is not None:
            frozen_from = replace(self._start, weights_from=str(run.cfg["load_from"]))
            self._report.lines += load_start_weights(run, frozen_from)  # the only place that has the frozen weights
        with restoring("the model"):
            model_state.reshape_buffers(run.model, saved_kinds(meta.get("buffers", {})))
        if native is not None and run.strategy.takes_native(native):
            run.strategy.load_native(checkpoint.path, native)
            if own:
                with restoring("the model"):
                    run.strategy.load_model_state(own)
            with restoring("the optimizer's groups"):
                self._report.lines += _group_values(run).merge(state.get("param_groups") or {})
        else:
            with restoring("the model"):
                entries = {**saved_model_entries(state), **own}
            with self._by_name(checkpoint, native) as source:
                self._restore_model(source, entries, partial=partial)
                if meta.get("has_optimizer", True):
                    self._restore_optimizer(source, state)
                else:
                    self._report.lines.append(
                        "The checkpoint has no optimizer state (save_optimizer=False): the optimizer starts fresh."
                    )
        if partial:
            run.frozen.check(meta.get("frozen") or {}, run.strategy, where=str(checkpoint.path))

    def _by_name(self, checkpoint: Checkpoint, native: Any) -> AbstractContextManager[Any]:
        """The tensors by name, also of a checkpoint that an engine wrote in its own format."""
        if native is None:
            return nullcontext(checkpoint)
        if self._store.topology.is_divided:
            raise CheckpointError(
                f"{checkpoint.path} was saved with {native_format.title(native)}. Reading it with other settings needs "
                "all of its files on one disk, but they are on several; copy them to one"
            )
        self._report.lines.append(
            f"The checkpoint is DeepSpeed's ({native_format.title(native)}) and was read through its universal format."
        )
        return native_format.open_by_name(checkpoint.path, native, room=self._store.root)

    def _restore_model(self, source: Any, entries: Mapping[str, Any], *, partial: bool) -> None:
        """Restore the tensors by name, with the other ``entries`` of the model's state."""
        run = self._run
        saved = native_format.saved_tensors(source, "model")
        targets = run.strategy.model_targets(saved)
        if partial:
            frozen = frozen_names(run.model)
            targets = {name: value for name, value in targets.items() if name in saved or name not in frozen}
            run.frozen.remove(set(saved))
        source.load("model", targets)
        with restoring("the model"):
            run.strategy.load_model_state({**targets, **entries})

    def _restore_optimizer(self, source: Any, state: Mapping[str, Any]) -> None:
        """Restore the state by name, and the values of the groups; also groups that a hook added while training."""
        run, groups = self._run, _group_values(self._run)
        tensors = run.strategy.optimizer_targets(native_format.saved_tensors(source, "optimizer"))
        source.load("optimizer", tensors)
        optimizer = OptimizerState(tensors, state.get("optimizer"))
        saved = state.get("param_groups") or {}

        def give(log: Callable[[str], None]) -> None:
            with restoring("the optimizer"):
                run.strategy.load_optimizer_state(optimizer)
                for line in groups.merge(saved):
                    log(line)

        with restoring("the optimizer's groups"):
            self._report.lines += groups.add_missing(saved)
            is_later = groups.has_missing(saved)
        if is_later:  # a hook's before_train may add them, as it did in the run that saved
            run.after_before_train.append(lambda: give(run.logger.info))
        else:
            give(self._report.lines.append)

    # ---- position -----------------------------------------------------------------------------------------------
    def _restore_position(self, checkpoint: Checkpoint) -> None:
        """Move the run to the checkpoint's position, counted at today's batch size."""
        run, manifest = self._run, checkpoint.manifest
        moved = self._position_today(manifest)
        progress = run.progress
        progress.load_state_dict(moved.state_dict())
        run.iter, run.epoch = progress.iteration, progress.epoch
        assert run.optim_wrapper is not None
        lr = next(iter(run.optim_wrapper.optimizers.values())).param_groups[0].get("initial_lr")
        old, new = saved_geometry(manifest), run.geometry
        lines, warnings = geometry_lines(old, new, lr=lr)
        recount = recount_line(old, new, before=manifest.iteration, after=progress.iteration)
        self._report.lines += lines + ([recount] if recount else [])
        self._report.warnings += warnings + compare.seed_warnings(manifest.seed, run.seed)

    def _position_today(self, manifest: Manifest) -> Progress:
        run = self._run
        choice = run.data_moved_by
        stream = _stream(run)
        if isinstance(choice, Mapping) and not stream.can_skip:
            kind = type(stream.dataset).__name__
            raise ConfigError(
                f"resume_data={dict(choice)}: {kind} is iterable-style, so samples cannot be skipped without reading "
                "them. Make the dataset start where it should, and use resume_data='restart'"
            )
        today = run.geometry
        rescaled = rescale(run.progress, saved_geometry(manifest), today, same_data=choice is None)
        moved = move_in_data(rescaled, choice, today)
        epoch, offset = stream.seek(moved.epoch, moved.offset)
        if (epoch, offset) == (moved.epoch, moved.offset):
            return moved
        return replace(moved, epoch=epoch, offset=offset, epoch_iteration=moved.epoch_iteration if offset else 0)


def _group_values(run: Run) -> GroupValues:
    assert run.group_values is not None
    return run.group_values


def _stream(run: Run) -> Any:
    assert run.train_dataloader is not None
    return run.train_dataloader


# ---- logs -------------------------------------------------------------------------------------------------------
def _cut_logs(store: CheckpointStore, starts: Sequence[Path], position: LogPosition) -> None:
    """Cut what earlier starts in this work dir logged past the checkpoint: those iterations will be done again.

    Rank 0 does this; without shared disks each disk's leader, for rank 0 may have been on another node.
    """
    if store.topology.is_leader:
        cut_logs(starts, position)


def _log_position(run: Run) -> LogPosition:
    """Where this start's logs begin, and how they count."""
    stream = _stream(run)
    known = stream.samples and stream.iterations_per_epoch
    mean = stream.samples / stream.iterations_per_epoch if known else None
    return LogPosition(run.progress.iteration, run.progress.samples, run.geometry.global_batch, mean)
