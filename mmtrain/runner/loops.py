"""The one train loop: an endless stream of epochs with a position.

``max_epochs`` and ``max_iters`` only decide where it ends and in which unit it validates; epoch hooks run at every
epoch in both cases. `EpochBasedTrainLoop`, `IterBasedTrainLoop` and xtuner's `TrainLoop` are names for it.
"""

import gc
from collections.abc import Mapping
from time import perf_counter
from typing import Any

from torch import Tensor

from mmtrain import dist
from mmtrain.dtensor import local_tensor
from mmtrain.errors import ConfigError, RunError
from mmtrain.interruption import Interrupted, wait
from mmtrain.modes import begin_training, modes_kept
from mmtrain.progress import window_length
from mmtrain.randomness import seed_step
from mmtrain.runner.checkpointer import Checkpointer
from mmtrain.runner.evaluation import EvaluationLoop
from mmtrain.runner.guards import NonfiniteGuard, UntrainedGuard
from mmtrain.runner.model_call import ModelCall
from mmtrain.runner.run import Run
from mmtrain.runner.unsaved import UnsavedState
from mmtrain.runner.window_weights import WindowWeights
from mmtrain.types import Batch, MicroBatch, StepResult, accumulation_window


class TrainLoop:
    """Runs training steps from the run's position to the end of its train schedule.

    One step, in this order: take a batch, seed from (seed, rank, iteration), forward and backward, at a window's end
    the optimizer step, advance the position, hooks, validate if due, save if due or requested, stop if requested.
    """

    def __init__(self, runner: Run, checkpointer: Checkpointer, val_loop: EvaluationLoop | None = None) -> None:
        assert runner.train_schedule is not None
        assert runner.train_dataloader is not None
        assert runner.optim_wrapper is not None
        self.runner = runner
        self._optim = runner.optim_wrapper
        self.schedule = runner.train_schedule
        self.accumulative_counts = self._optim.accumulative_counts
        self.batch: Batch | None = None  # of the iteration in progress
        self._checkpointer = checkpointer
        self._val_loop = val_loop
        self._optim.skip_nonfinite = self.schedule.nonfinite == "skip"
        self._guard = NonfiniteGuard(self.schedule.nonfinite, runner.device)
        self._call = ModelCall(runner.model, runner.strategy.module, runner.device)
        if self._call.has_own_train_step and not runner.strategy.takes_own_train_step:
            raise ConfigError(
                f"model: {type(runner.model).__name__} has its own train_step, whose gradients "
                f"{type(runner.strategy).__name__} does not exchange; return the loss from forward(), or train it with "
                "FSDPStrategy"
            )
        self._is_alone = dist.world_size() == 1
        self._rank = dist.data_rank() if runner.randomness.diff_rank_seed else 0
        self._positional = runner.randomness.positional
        self._log_intervals = [hook.interval for hook in runner.hooks if getattr(hook, "shows_grad_norm", False)]
        self._next_logged = -1
        self._window_is_logged = False  # whether the current window holds a logged iteration
        self._window = accumulation_window(1)
        self.micro_batch: MicroBatch = self._window[0]  # of the iteration in progress
        self._micro = 0  # micro-batches of the current window that are done or in progress; 0 between windows
        self._weights = WindowWeights(runner, self._optim)
        self._warned_of_gradients = False
        self._is_save_prepared = False
        self._unsaved = UnsavedState(runner)

    @property
    def dataloader(self) -> Any:
        return self.runner.train_dataloader

    @property
    def by_epoch(self) -> bool:
        """Whether the run's length is counted in epochs."""
        return self.schedule.by_epoch

    @property
    def finished(self) -> bool:
        """Whether the position has reached the end of the train schedule."""
        return self.runner.is_complete

    def run(self) -> None:
        """Train to the end of the schedule, or until a stop is requested."""
        runner = self.runner
        self._prepare()
        runner.hooks.call("before_train", runner)
        for finish in runner.after_before_train:
            finish()
        for line in runner.switches.begin_training():
            runner.logger.info("%s", line)
        if runner.group_values is not None:
            runner.group_values.begin_training()
        names = self._val_loop.metric_names if self._val_loop is not None else None
        self._checkpointer.begin_training(names, resumed_from=runner.resumed_from)
        runner.set_schedule()
        self._unsaved.begin()
        # What was built so far lives as long as the run. Freezing it keeps full GC passes, tens of milliseconds each in
        # the middle of training, from rescanning the modules of torch again.
        gc.freeze()
        try:
            self._run_steps()
        finally:
            gc.unfreeze()
        self._guard.check()
        self._untrained.check()
        runner.hooks.call("after_train", runner)
        self._checkpointer.finish(runner)

    def _prepare(self) -> None:
        runner = self.runner
        assert runner.train_dataloader is not None
        self._micro = 0  # a resume begins between windows
        self._take = runner.train_dataloader.__next__
        self._record = runner.scalars.record
        self._before = runner.hooks.points["before_train_iter"]
        self._after = runner.hooks.points["after_train_iter"]
        self._next_logged = self._logged_after(runner.progress.iteration)
        self._saved_at = runner.progress.iteration  # the iteration of the last checkpoint, or where this start began
        self._untrained = UntrainedGuard(runner.model, self._optim.optimizers.values())
        for line in begin_training(runner.strategy.module, runner.model):
            runner.logger.info("%s", line)

    def _run_steps(self) -> None:
        runner = self.runner
        progress = runner.progress
        entering = first = True
        while not runner.is_complete and not (runner.requests.stop_reason and self._micro == 0):
            if entering or progress.epoch_iteration == 0:
                runner.hooks.call("before_train_epoch", runner)
                runner.strategy.follow_memory_format()
                entering = False
            self._step()
            if first:
                self._unsaved.settle()
                first = False

    def _step(self) -> None:
        runner, progress, record = self.runner, self.runner.progress, self._record
        started = perf_counter()
        wait.at_save_point = self._micro == 0 and self._is_alone
        try:
            self.batch = batch = self._take()
        except Interrupted:
            self._leave_waiting()
            return
        finally:
            wait.at_save_point = False
        arrived = perf_counter()
        if self._positional:
            seed_step(runner.seed, self._rank, progress.iteration)
        data, batch_idx = batch.data, progress.epoch_iteration
        for hook in self._before:
            hook(runner, batch_idx=batch_idx, data_batch=data)
        mb = self._next_micro_batch()
        weight: Any = batch.weight
        share = weight if mb.length == 1 else weight * self._weights.by_samples(mb, batch.samples)
        if self._call.has_own_train_step:
            outputs = self._own_train_step(data, mb, share)
        else:
            outputs, weight = self._forward_backward(batch, mb, share)
        for name, value in outputs.items():
            record(name, value if name == "num_tokens" else _weighted(value, weight))
        progress.advance(batch.samples, epoch_end=batch.epoch_end)
        runner.update_result = self._update(mb) if mb.is_last else None
        record("data_time", arrived - started)
        record("time", perf_counter() - started)
        for hook in self._after:
            hook(runner, batch_idx=batch_idx, data_batch=data, outputs=outputs)
        self.batch = None  # its memory is free before the next one is read
        self._end_step(epoch_end=batch.epoch_end)

    def _leave_waiting(self) -> None:
        """A signal arrived while a batch was awaited between two windows: save what the last step left, and stop.

        Only a process alone does so. With several, others may have their batch and be in the step already.
        """
        runner = self.runner
        runner.requests.agree(runner.progress.iteration, is_logged=False, at_window_end=True)
        self._checkpointer.finish(runner)
        if runner.progress.iteration == self._saved_at and self._checkpointer.failure is None:
            runner.requests.take_saves()
            runner.logger.info("Nothing to save: no update since iteration %d", self._saved_at)
        else:
            self._save_or_stop(at_window_end=True)

    def _next_micro_batch(self) -> MicroBatch:
        """The position of this iteration in its window; opens a window if none is open."""
        if self._micro == 0 and self.accumulative_counts > 1:
            length = self._window_length()
            self._window = accumulation_window(length)
            if length > 1:
                self._weights.open(self.runner.progress, length)
        self.micro_batch = mb = self._window[self._micro]
        self._micro += 1
        if mb.is_last:
            # If nothing is clipped, the norm is measured only in the update whose window contains a logged iteration.
            done = self.runner.progress.iteration + 1
            self._optim.want_grad_norm = self._window_is_logged or done == self._next_logged
        return mb

    def _window_length(self) -> int:
        runner, remaining = self.runner, None
        if runner.max_iters is not None:
            remaining = runner.max_iters - runner.progress.iteration
        if self.schedule.flush_at_epoch_end and runner.iterations_left_in_epoch is not None:
            left = runner.iterations_left_in_epoch
            remaining = left if remaining is None else min(left, remaining)
        return window_length(runner.progress.iteration, self.accumulative_counts, remaining=remaining)

    def _forward_backward(self, batch: Batch, mb: MicroBatch, share: Any) -> tuple[dict[str, Any], Any]:
        """Forward and backward of one micro-batch, whose loss counts ``share`` times in its window by samples.

        Returns the scalars of this rank's samples, detached, and what they count among the ranks.
        """
        runner, call = self.runner, self._call
        iteration = runner.progress.iteration + 1
        with runner.strategy.forward_context(mb):
            outputs = call(call.prepare(batch.data, training=True))
            loss, parts = call.losses(outputs)
        if not loss.requires_grad:
            raise RunError(
                f"the loss of iteration {iteration} does not require grad: no trainable parameter took part in it, or "
                "it was detached"
            )
        weight: Any = batch.weight
        tokens = call.num_tokens(outputs)
        if tokens is not None or self._weights.counts_tokens:
            weight, share = self._weights.by_tokens(mb, tokens, is_stand_in=weight == 0)
        loss = loss if mb.length == 1 else loss / mb.length
        runner.strategy.backward(_weighted(loss, share), mb)
        scalars = _detached(parts)
        self._guard.observe(iteration, scalars["loss"])
        return scalars, weight

    def _own_train_step(self, data: Any, mb: MicroBatch, weight: float) -> dict[str, Any]:
        """The same in the model's own ``train_step``, which also steps the optimizer."""
        self._optim.micro_batch = mb
        self._optim.loss_weight = weight
        self._checkpointer.wait_staged()
        outputs = _detached(self._call.train_step(data, self._optim))
        if "loss" in outputs:
            self._guard.observe(self.runner.progress.iteration + 1, outputs["loss"])
        return outputs

    def _update(self, mb: MicroBatch) -> StepResult:
        """The end of a window: step the optimizer, unless the model's own ``train_step`` has done so."""
        runner = self.runner
        self._guard.before_update()
        result = self._optim.take_result() if self._call.has_own_train_step else None
        if result is None:
            self._checkpointer.wait_staged()
            result = runner.strategy.step()
        if result.grad_norm is not None:
            runner.scalars.record("grad_norm", result.grad_norm)
        if not self._is_save_prepared and result.applied:
            self._is_save_prepared = True
            self._checkpointer.prepare(runner)
        runner.progress.count_update(iterations=mb.length, applied=result.applied)
        runner.set_schedule()
        self._micro = 0
        return result

    def _end_step(self, *, epoch_end: bool) -> None:
        """The end of a step; hooks still see this iteration as the one in progress until validation is done."""
        runner, progress = self.runner, self.runner.progress
        at_window_end = self._micro == 0
        if progress.iteration == self._next_logged:
            self._check_guards()
            self._window_is_logged = True
            self._next_logged = self._logged_after(progress.iteration)
        if epoch_end:
            runner.hooks.call("after_train_epoch", runner)
        if self._val_loop is not None and self._validation_is_due(epoch_end=epoch_end):
            self._validate(self._val_loop)
        runner.requests.agree(
            progress.iteration, is_logged=self._window_is_logged, at_window_end=at_window_end,
            is_saving=self._checkpointer.is_saving,
        )  # fmt: skip
        runner.iter = progress.iteration
        runner.epoch = progress.epoch
        self._save_or_stop(at_window_end=at_window_end)

    def _save_or_stop(self, *, at_window_end: bool) -> None:
        runner = self.runner
        if at_window_end:
            self._window_is_logged = False
            if runner.requests.saves or runner.requests.stop_reason:
                self._check_guards()
                self._warn_of_gradients()
                for line in self._unsaved.report():
                    runner.logger.warning("%s", line)
            if runner.requests.saves and not all(request.weights_only for request in runner.requests.saves):
                self._saved_at = runner.progress.iteration
        self._checkpointer.act(runner, at_window_end=at_window_end)

    def _logged_after(self, iteration: int) -> int:
        """The next iteration that a hook logs; -1 if none does."""
        return min(((iteration // interval + 1) * interval for interval in self._log_intervals), default=-1)

    def _check_guards(self) -> None:
        """Run the checks that are only done now and then: before a log line, before a save and at the end."""
        self._guard.check()
        self._untrained.check()

    def _warn_of_gradients(self) -> None:
        """Warn once if a model's own step leaves gradients behind: no checkpoint contains them."""
        if not self._call.has_own_train_step or self._warned_of_gradients:
            return
        gradients = ((name, parameter.grad) for name, parameter in self.runner.model.named_parameters())
        left = next((name for name, grad in gradients if grad is not None and local_tensor(grad).any()), "")
        if left:
            self._warned_of_gradients = True
            self.runner.logger.warning(
                "train_step leaves gradients behind (%s). They are not saved, so a resume is not exact. Call the "
                "optimizer's zero_grad at its end, or keep the other parameters from collecting gradients "
                "(requires_grad_(False))",
                left,
            )

    def _validation_is_due(self, *, epoch_end: bool) -> bool:
        schedule, progress = self.schedule, self.runner.progress
        if schedule.by_epoch and not epoch_end:
            return False
        done = progress.epoch if schedule.by_epoch else progress.iteration
        return schedule.validates_after(done, is_end=self.runner.is_complete)

    def _validate(self, val_loop: EvaluationLoop) -> None:
        runner = self.runner
        with modes_kept(runner.strategy.module):
            metrics = val_loop.run()
        if runner.schedules is not None:
            runner.schedules.observe(metrics, epoch=runner.progress.epoch)
            runner.set_schedule()
        self._checkpointer.observe(runner, metrics)


def _weighted(value: Any, weight: Any) -> Any:
    """``value * weight``, and exactly ``value`` for a weight of 1."""
    return value * weight if isinstance(weight, Tensor) or weight != 1.0 else value


def _detached(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in parts.items()}
