"""The base class of hooks: the points and helpers of MMEngine's base class, and two more points.

A hook written for MMEngine's base class registers unmodified, because only its methods matter. This class does not
derive from it, because importing ``mmengine.hooks`` loads MMEngine's models, its optimizers and torch's RPC: a quarter
of a second at every start that no run needs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mmtrain.runner.interface import Runner


class Hook:
    """Runs code at fixed points of a run; override the methods of the points you need.

    ``runner.iter`` and ``runner.epoch`` are the 0-based index of the iteration and epoch in progress at every point.
    ``priority`` orders the hooks of one point: a number from 0 (first) to 100, or one of MMEngine's names. A hook that
    has ``state_dict`` and ``load_state_dict`` is saved with every checkpoint and restored by a resume.
    The order of the points is drawn in ``mmtrain/runner/hook_points.py``.
    """

    priority: str | int = "NORMAL"

    # ---- the run ------------------------------------------------------------------------------------------------
    def before_run(self, runner: Runner) -> None:
        """Before training, validation or test begins."""

    def after_run(self, runner: Runner) -> None:
        """After it ended without an error."""

    def on_exception(self, runner: Runner, error: BaseException) -> None:
        """Instead of the remaining points, when ``error`` ends the run (Ctrl-C included)."""

    # ---- training -----------------------------------------------------------------------------------------------
    def before_train(self, runner: Runner) -> None:
        """After a resume has been restored, before the first iteration."""

    def after_train(self, runner: Runner) -> None:
        """After the last iteration."""

    def before_train_epoch(self, runner: Runner) -> None:
        """Before the first iteration of an epoch, and of the rest of one after a resume."""
        self._before_epoch(runner, mode="train")

    def after_train_epoch(self, runner: Runner) -> None:
        """After the last iteration of an epoch."""
        self._after_epoch(runner, mode="train")

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Before the forward pass; ``batch_idx`` is the 0-based index in the epoch."""
        self._before_iter(runner, batch_idx=batch_idx, data_batch=data_batch, mode="train")

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """After the backward pass and, at a window's end, the step; ``outputs`` holds the detached losses."""
        self._after_iter(runner, batch_idx=batch_idx, data_batch=data_batch, outputs=outputs, mode="train")

    # ---- validation and test ------------------------------------------------------------------------------------
    def before_val(self, runner: Runner) -> None:
        """Before a validation."""

    def after_val(self, runner: Runner) -> None:
        """After a validation."""

    def before_val_epoch(self, runner: Runner) -> None:
        """Before the first batch of the validation sets."""
        self._before_epoch(runner, mode="val")

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, float] | None = None) -> None:
        """After the last batch, with the metrics."""
        self._after_epoch(runner, mode="val")

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Before one validation batch."""
        self._before_iter(runner, batch_idx=batch_idx, data_batch=data_batch, mode="val")

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | Any = None
    ) -> None:
        """After one validation batch, with the model's outputs."""
        self._after_iter(runner, batch_idx=batch_idx, data_batch=data_batch, outputs=outputs, mode="val")

    def before_test(self, runner: Runner) -> None:
        """Before a test."""

    def after_test(self, runner: Runner) -> None:
        """After a test."""

    def before_test_epoch(self, runner: Runner) -> None:
        """Before the first batch of the test sets."""
        self._before_epoch(runner, mode="test")

    def after_test_epoch(self, runner: Runner, metrics: Mapping[str, float] | None = None) -> None:
        """After the last batch, with the metrics."""
        self._after_epoch(runner, mode="test")

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Before one test batch."""
        self._before_iter(runner, batch_idx=batch_idx, data_batch=data_batch, mode="test")

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | Any = None
    ) -> None:
        """After one test batch, with the model's outputs."""
        self._after_iter(runner, batch_idx=batch_idx, data_batch=data_batch, outputs=outputs, mode="test")

    # ---- one method for training, validation and test (``mode`` is "train", "val" or "test"), as in MMEngine ---------
    def _before_epoch(self, runner: Runner, mode: str = "train") -> None:
        """Before an epoch, unless the mode's own method is overridden."""

    def _after_epoch(self, runner: Runner, mode: str = "train") -> None:
        """After an epoch, unless the mode's own method is overridden."""

    def _before_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, mode: str = "train") -> None:
        """Before a batch, unless the mode's own method is overridden."""

    def _after_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None, mode: str = "train"
    ) -> None:
        """After a batch, unless the mode's own method is overridden."""

    # ---- checkpoints --------------------------------------------------------------------------------------------
    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Before a checkpoint's state is collected; plain values put into ``checkpoint`` are saved with it."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """After a resume has restored a checkpoint, with what `before_save_checkpoint` put into it."""

    def after_save_checkpoint(self, runner: Runner, entry: str) -> None:
        """When the checkpoint named ``entry`` is complete on disk; at the same iteration on every rank."""

    # ---- helpers, as in MMEngine --------------------------------------------------------------------------------
    def every_n_epochs(self, runner: Runner, n: int, start: int = 0) -> bool:
        """Whether the epoch in progress is the n-th, 2n-th, ... after ``start``."""
        return _every(runner.epoch + 1 - start, n)

    def every_n_train_iters(self, runner: Runner, n: int, start: int = 0) -> bool:
        """Whether the iteration in progress is the n-th, 2n-th, ... of the run after ``start``."""
        return _every(runner.iter + 1 - start, n)

    def every_n_inner_iters(self, batch_idx: int, n: int) -> bool:
        """Whether the batch is the n-th, 2n-th, ... of its epoch."""
        return _every(batch_idx + 1, n)

    def end_of_epoch(self, dataloader: Any, batch_idx: int) -> bool:
        """Whether the batch is the last one of its epoch."""
        return batch_idx + 1 == len(dataloader)

    def is_last_train_epoch(self, runner: Runner) -> bool:
        """Whether the epoch in progress is the run's last."""
        return runner.epoch + 1 == runner.max_epochs

    def is_last_train_iter(self, runner: Runner) -> bool:
        """Whether the iteration in progress is the run's last."""
        return runner.iter + 1 == runner.max_iters


def _every(done: int, n: int) -> bool:
    return n > 0 and done >= 0 and done % n == 0
