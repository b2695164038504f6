"""The one train loop: an endless stream of epochs with a position.

``max_epochs`` and ``max_iters`` only say where it ends and in which unit it validates; epoch hooks fire at every pass
over the data in both. `EpochBasedTrainLoop`, `IterBasedTrainLoop` and xtuner's `TrainLoop` are names for it.
"""

import gc
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmtrain import dist
from mmtrain.dtensor import local_tensor
from mmtrain.errors import ConfigError, RunError
from mmtrain.progress import window_length
from mmtrain.randomness import seed_step
from mmtrain.runner.guards import NonfiniteGuard, UntrainedGuard
from mmtrain.runner.model_call import ModelCall
from mmtrain.types import Batch, StepResult

if TYPE_CHECKING:
    from mmtrain.runner.flexible_runner import FlexibleRunner


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What ``train_cfg`` asks for. Exactly one of ``max_epochs`` and ``max_iters`` is set."""

    max_epochs: int | None = None
    max_iters: int | None = None
    val_begin: int = 1
    val_interval: int = 1
    dynamic_intervals: tuple[tuple[int, int], ...] = ()
    flush_at_epoch_end: bool = False
    nonfinite: str = "stop"
    ledger: bool = False

    @property
    def by_epoch(self) -> bool:
        """Whether the run's length and its validation are counted in epochs."""
        return self.max_epochs is not None

    def __post_init__(self) -> None:
        if (self.max_epochs is None) == (self.max_iters is None):
            raise ConfigError("train_cfg needs exactly one of max_epochs and max_iters")
        if self.nonfinite not in ("stop", "skip"):
            raise ConfigError(f"train_cfg.nonfinite is {self.nonfinite!r}; expected 'stop' or 'skip'")

    def validates_after(self, done: int, *, is_end: bool) -> bool:
        """Whether validation is due after ``done`` epochs or iterations (whichever this plan counts)."""
        interval = self.val_interval
        for begin, value in self.dynamic_intervals:
            if done >= begin:
                interval = value
        return done >= self.val_begin and (is_end or (interval > 0 and done % interval == 0))


class TrainLoop:
    """Runs training steps from wherever the runner's position stands until the plan's end.

    One step, in this order: take a batch, seed from (seed, rank, iteration), forward and backward, at a window's end
    the optimizer step, advance the position, hooks, validate if due, save if due or asked, stop if asked.
    """

    def __init__(self, runner: "FlexibleRunner", plan: TrainPlan, *, accumulative_counts: int = 1) -> None:
        self.runner = runner
        self.plan = plan
        self.accumulative_counts = accumulative_counts
        self.log_interval = 0  # set by the hook that logs; gradient norms are measured for the iterations it shows
        runner.optim_wrapper.skip_nonfinite = plan.nonfinite == "skip"
        self._guard = NonfiniteGuard(plan.nonfinite, runner.device)
        self._call = ModelCall(runner.model, runner.strategy.module, runner.device)
        if self._call.has_own_train_step and not runner.strategy.takes_own_train_step:
            raise ConfigError(
                f"model: {type(runner.model).__name__} has a train_step of its own, whose gradients "
                f"{type(runner.strategy).__name__} does not exchange; return the loss from forward(), or train it with "
                "FSDPStrategy"
            )
        self._ledger = runner.ledger
        self._rank = dist.data_rank() if runner.randomness.diff_rank_seed else 0
        self._positional = runner.randomness.positional
        self._window = self._micro = 0
        self._warned = False

    @property
    def dataloader(self) -> Any:
        return self.runner.train_dataloader

    @property
    def by_epoch(self) -> bool:
        return self.plan.by_epoch

    def run(self) -> None:
        """Train to the end of the plan, or until a stop is asked for."""
        runner = self.runner
        self._window, self._micro = 1, 0  # a resume begins at an update boundary
        self._take, self._record = runner.train_dataloader.__next__, runner.scalars.record
        self._before, self._after = runner.hooks.points["before_train_iter"], runner.hooks.points["after_train_iter"]
        if self._ledger is not None:
            self._ledger.begin(runner.progress, moved_by=runner.data_moved_by)
        self._untrained = UntrainedGuard(runner.model, runner.optim_wrapper.optimizers.values())
        runner.strategy.module.train()
        runner.hooks.call("before_train", runner)
        runner.set_schedule()
        # What was built so far lives as long as the run. Set aside, it spares every full collection of Python's garbage
        # collector, tens of milliseconds in the middle of training, from walking over the modules of torch again.
        gc.freeze()
        try:
            self._run_steps()
        finally:
            gc.unfreeze()
        self._guard.check()
        self._untrained.check()
        runner.hooks.call("after_train", runner)
        runner.saving.finish(runner)

    def _run_steps(self) -> None:
        runner, progress, entering = self.runner, self.runner.progress, True
        while not self.finished and not (runner.stop_requested and self._micro == 0):
            if entering or progress.epoch_iteration == 0:
                runner.hooks.call("before_train_epoch", runner)
                entering = False
            self._step()

    @property
    def finished(self) -> bool:
        """Whether the position has reached the end of the plan."""
        progress, plan = self.runner.progress, self.plan
        if plan.max_epochs is not None:
            return progress.epoch >= plan.max_epochs
        return progress.iteration >= (plan.max_iters or 0)

    def _step(self) -> None:
        runner, progress, record = self.runner, self.runner.progress, self._record
        started = perf_counter()
        batch: Batch = self._take()
        arrived = perf_counter()
        if self._positional:
            seed_step(runner.seed, self._rank, progress.iteration)
        data, batch_idx = batch.data, progress.epoch_iteration
        for hook in self._before:
            hook(runner, batch_idx=batch_idx, data_batch=data)
        last = self._enter_window()
        weight = batch.weight
        outputs = self._compute(data, last=last, weight=weight)
        if self._ledger is not None:
            self._ledger.observe(batch, self._micro - 1)
        for name, value in outputs.items():
            record(name, value if weight == 1.0 else value * weight)
        progress.advance(batch.samples, epoch_end=batch.epoch_end)
        runner.update_result = self._leave_window() if last else None
        record("data_time", arrived - started)
        record("time", perf_counter() - started)
        for hook in self._after:
            hook(runner, batch_idx=batch_idx, data_batch=data, outputs=outputs)
        self._edge(epoch_end=batch.epoch_end)

    def _enter_window(self) -> bool:
        """Open a window where none is open; return whether this micro-batch is the window's last."""
        optim = self.runner.optim_wrapper
        if self._micro == 0 and self.accumulative_counts > 1:
            self._window = self._window_length()
        self._micro += 1
        last = self._micro == self._window
        optim.set_window(self._window, last)
        if last:
            done, interval = self.runner.progress.iteration + 1, self.log_interval
            # Where nothing is clipped, the norm is measured only in the update whose window holds a logged iteration.
            optim.want_grad_norm = interval > 0 and done // interval > (done - self._window) // interval
        return last

    def _window_length(self) -> int:
        runner, remaining = self.runner, None
        if runner.max_iters is not None:
            remaining = runner.max_iters - runner.progress.iteration
        if self.plan.flush_at_epoch_end and runner.iterations_left_in_epoch is not None:
            left = runner.iterations_left_in_epoch
            remaining = left if remaining is None else min(left, remaining)
        return window_length(runner.progress.iteration, self.accumulative_counts, remaining=remaining)

    def _compute(self, data: Any, *, last: bool, weight: float) -> dict[str, Any]:
        """Forward and backward of one micro-batch; returns its scalars, detached.

        ``weight`` is `types.Batch.weight`; the scalars are those of this rank's own samples.
        """
        runner, call = self.runner, self._call
        iteration = runner.progress.iteration + 1
        if call.has_own_train_step:
            runner.optim_wrapper.loss_weight = weight
            parts = call.train_step(data, runner.optim_wrapper)
            loss = parts.get("loss")
        else:
            with runner.strategy.forward_context():
                loss, parts = call.losses(call(call.prepare(data, training=True)))
            if not loss.requires_grad:
                raise RunError(
                    f"the loss of iteration {iteration} has no gradient: no parameter that is trained took part in it, "
                    "or it was detached"
                )
            share = loss / self._window if self._window > 1 else loss
            runner.strategy.backward(share if weight == 1.0 else share * weight, last=last)
        if loss is not None:
            self._guard.observe(iteration, loss)
        return {name: value.detach() if isinstance(value, Tensor) else value for name, value in parts.items()}

    def _leave_window(self) -> StepResult:
        runner = self.runner
        result = runner.optim_wrapper.take_result() if self._call.has_own_train_step else None
        if result is None:
            result = runner.strategy.step()
        if result.grad_norm is not None:
            runner.scalars.record("grad_norm", result.grad_norm)
        runner.progress.count_update(iterations=self._window, applied=result.applied)
        runner.set_schedule()
        self._micro = 0
        return result

    def _edge(self, *, epoch_end: bool) -> None:
        """The end of a step: epoch hooks, validation, saves; hooks still see this iteration as the one in progress."""
        runner, plan, progress = self.runner, self.plan, self.runner.progress
        if self.log_interval and progress.iteration % self.log_interval == 0:
            self._guard.check()
            self._untrained.check()
        if epoch_end:
            runner.hooks.call("after_train_epoch", runner)
        if runner.val_loop is not None and (epoch_end or not plan.by_epoch):
            done = progress.epoch if plan.by_epoch else progress.iteration
            if plan.validates_after(done, is_end=self.finished):
                self._validate()
        if runner.agreement is not None:
            if self._micro == 0:
                runner.agreement.look(runner, log_interval=self.log_interval)
        elif runner.signals.received:
            runner.leave_on_signal()
        runner.iter, runner.epoch = progress.iteration, progress.epoch
        if self._micro == 0:
            if runner.stop_requested:
                runner.saving.request_at_stop()
            if runner.saving.requests:
                self._guard.check()
                if self._call.has_own_train_step and not self._warned:
                    self._warn_of_gradients()
                runner.saving.save(runner)
        runner.saving.poll(runner)

    def _warn_of_gradients(self) -> None:
        """Say once that a model's own step leaves gradients at a save: no checkpoint holds what they would add."""
        gradients = ((name, parameter.grad) for name, parameter in self.runner.model.named_parameters())
        left = next((name for name, grad in gradients if grad is not None and local_tensor(grad).any()), "")
        if left:
            self._warned = True
            self.runner.logger.warning(
                "train_step leaves gradients behind (%s): a resume does not have them, so it is not exact. Call the "
                "optimizer's zero_grad at its end, or keep the other part from gathering them (requires_grad_(False))",
                left,
            )

    def _validate(self) -> None:
        runner = self.runner
        assert runner.val_loop is not None
        metrics = runner.val_loop.run()
        runner.strategy.module.train()
        if runner.schedules is not None:
            runner.schedules.observe(metrics, epoch=runner.progress.epoch)
            runner.set_schedule()
