"""When to save a checkpoint; the runner's `Checkpointer` decides how."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmtrain.evaluation.metric_rule import GREATER_KEYS, LESS_KEYS
from mmtrain.hooks.base import Hook
from mmtrain.hooks.checkpoint_arguments import as_names, check_arguments
from mmtrain.registry import HOOKS
from mmtrain.runner import Runner
from mmtrain.runner.save_policy import SavePolicy

DEFAULT_ITERATIONS = 1000
DEFAULT_SECONDS = 15 * 60.0
DEFAULT_KEPT = 3


@HOOKS.register_module()
class CheckpointHook(Hook):
    """Asks for checkpoints: every ``interval``, at the end, when a metric is the best so far, every so many seconds.

    MMEngine's arguments keep their meaning. ``by_epoch`` defaults to the unit of the run. Without ``interval`` and
    ``every_seconds`` a checkpoint is saved every epoch, or, in a run that is counted in iterations, every 1,000
    iterations and ten times in a run of less than 10,000; also every 15 minutes and at the end; and the newest three
    are kept unless ``max_keep_ckpts`` says otherwise. ``interval=-1`` switches that off. New arguments:

    * ``every_seconds``: also save when this much time has passed since the last save; such a checkpoint is temporary:
      it is deleted when a newer one exists;
    * ``keep_every``: checkpoints at multiples of this (in the unit of ``interval``) are never deleted;
    * ``save_frozen``: False leaves out parameters that do not train; they come from the model's construction;
    * ``weights_interval``: also write only the weights, this often, under ``weights/``: ``iter_N.safetensors``, or the
      directory ``iter_N`` for a Hugging Face model, which ``from_pretrained`` reads;
    * ``async_save``: training continues while a checkpoint is written;
    * ``published_keys``: when the run is complete, also write the last and the best checkpoint as
      ``<name>-<hash>.pth`` for MMEngine with these of its keys: "meta", "state_dict", "ema_state_dict";
    * ``on_save_error``: "continue" or "stop" when a checkpoint cannot be written.

    Raises ConfigError at the start for an invalid argument, including the metric of ``save_best``.
    """

    priority = "VERY_LOW"

    def __init__(  # noqa: PLR0913 - MMEngine's arguments
        self,
        interval: int | None = None,
        by_epoch: bool | None = None,
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        out_dir: str | Path | None = None,
        max_keep_ckpts: int | None = None,
        save_last: bool = True,
        save_best: str | Sequence[str] | None = None,
        rule: str | Sequence[str] | None = None,
        greater_keys: str | Sequence[str] | None = None,
        less_keys: str | Sequence[str] | None = None,
        filename_tmpl: str | None = None,
        published_keys: str | Sequence[str] | None = None,
        save_begin: int = 0,
        every_seconds: float | None = None,
        keep_every: int | None = None,
        save_frozen: bool = True,
        weights_interval: int | None = None,
        async_save: bool = True,
        on_save_error: str = "continue",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_arguments({name: value for name, value in locals().items() if name != "self"})
        if interval is None and every_seconds is None:
            every_seconds = DEFAULT_SECONDS
            max_keep_ckpts = DEFAULT_KEPT if max_keep_ckpts is None else max_keep_ckpts
        elif interval is None:
            interval = -1
        self.interval = interval  # None until the run is known
        self.by_epoch = by_epoch
        self.save_begin = save_begin
        self.save_last = save_last
        self.every_seconds = every_seconds
        self.weights_interval = weights_interval
        self.save_policy = SavePolicy(
            by_epoch=by_epoch,
            save_optimizer=save_optimizer,
            save_param_scheduler=save_param_scheduler,
            save_frozen=save_frozen,
            save_last=save_last,
            async_save=async_save,
            on_save_error=on_save_error,
            out_dir=None if out_dir is None else str(out_dir),
            filename_tmpl=filename_tmpl,
            max_keep_ckpts=-1 if max_keep_ckpts is None else max_keep_ckpts,
            keep_every=keep_every,
            save_best=as_names(save_best),
            rule=as_names(rule),
            greater_keys=as_names(greater_keys) or GREATER_KEYS,
            less_keys=as_names(less_keys) or LESS_KEYS,
            published_keys=as_names(published_keys),
        )
        self._clock = clock
        self._last_save = 0.0

    def before_train(self, runner: Runner) -> None:
        """Start the clock, fit the interval to the run where none was given, and log when checkpoints are saved."""
        self._last_save = self._clock()
        if self.by_epoch is None and runner.train_loop is not None:
            self.by_epoch = runner.train_loop.by_epoch
        if self.interval is None:
            longest = DEFAULT_ITERATIONS if runner.max_iters is None else runner.max_iters // 10
            self.interval = 1 if self.by_epoch else max(1, min(DEFAULT_ITERATIONS, longest))
        runner.logger.info("%s", self.describe(runner.max_epochs if self.by_epoch else runner.max_iters))

    def describe(self, length: int | None = None) -> str:
        """When checkpoints are saved in a run of ``length`` epochs or iterations, and how many stay, as one line."""
        unit = "epoch" if self.by_epoch else "iteration"
        regular = []
        if self.interval is not None and self.interval > 0:
            regular.append(f"every {unit}" if self.interval == 1 else f"every {self.interval:,} {unit}s")
            if self.save_begin > 0:
                regular[0] += f" from {unit} {self.save_begin:,}"
        if self.every_seconds is not None:
            minutes, rest = divmod(self.every_seconds, 60)
            regular.append(f"every {self.every_seconds:g} seconds" if rest else f"every {minutes:g} minutes")
        when = [*regular, *(f"at the best {metric}" for metric in self.save_policy.save_best)]
        if self.save_last:
            when.append("at the end")
        kept = self.save_policy.max_keep_ckpts
        keeps = f"the newest {kept} are kept" if kept > 0 else "all are kept"
        line = f"Checkpoints: {', '.join(when) or 'none'}; {keeps}"
        first = self.save_begin or self.interval or 0
        if self.every_seconds is not None or (regular and (length is None or first < length)):
            return line
        return f"{line}. A run that is killed before the end starts over; set a smaller interval or every_seconds"

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Ask for the saves that are counted in iterations or seconds."""
        done = runner.iter + 1
        if not self.by_epoch and self._is_due(done):
            runner.request_save("interval")
        elif self.save_last and runner.train_loop is not None and runner.train_loop.finished:
            runner.request_save("last")
        if not self.by_epoch and self.weights_interval and done % self.weights_interval == 0:
            runner.request_save("weights", weights_only=True)
        if self.every_seconds is not None and self._clock() - self._last_save >= self.every_seconds:
            self._last_save = self._clock()
            runner.request_save("time", temporary=True)

    def after_train_epoch(self, runner: Runner) -> None:
        """Ask for the saves that are counted in epochs."""
        done = runner.epoch + 1
        if self.by_epoch and self._is_due(done):
            runner.request_save("interval")
        if self.by_epoch and self.weights_interval and done % self.weights_interval == 0:
            runner.request_save("weights", weights_only=True)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Restart the clock of ``every_seconds``."""
        self._last_save = self._clock()

    def _is_due(self, done: int) -> bool:
        assert self.interval is not None
        return self.interval > 0 and done >= max(self.save_begin, 1) and (done - self.save_begin) % self.interval == 0
