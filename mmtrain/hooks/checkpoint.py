"""When to save a checkpoint, and which one is the best; how it is saved is the runner's business."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmtrain.errors import ConfigError, RunError
from mmtrain.hooks.base import Hook
from mmtrain.hooks.checkpoint_arguments import as_names, check_arguments
from mmtrain.hooks.metric_rule import GREATER_KEYS, LESS_KEYS, infer_rule
from mmtrain.registry import HOOKS


@HOOKS.register_module()
class CheckpointHook(Hook):
    """Asks for checkpoints: every ``interval``, at the end, when a metric is the best so far, every so many seconds.

    MMEngine's arguments keep their meaning. ``by_epoch`` defaults to the unit of the run. Those that are new:

    * ``every_seconds``: also save when so much time has passed since the last save; such a checkpoint is temporary, it
      goes when a newer one exists;
    * ``keep_every``: checkpoints at multiples of this (in the unit of ``interval``) are never deleted;
    * ``save_frozen``: False leaves out parameters that do not train; they come from the model's own construction;
    * ``weights_interval``: also write the weights alone, this often, under ``weights/``: ``iter_N.safetensors``, or the
      directory ``iter_N`` for a Hugging Face model, which ``from_pretrained`` reads;
    * ``async_save``: training goes on while a checkpoint is written;
    * ``published_keys``: when the run is complete, write the last and the best checkpoint once more as
      ``<name>-<hash>.pth`` for MMEngine with these of its keys: "meta", "state_dict", "ema_state_dict";
    * ``on_save_error``: "continue" or "stop" when a checkpoint cannot be written.

    Raises ConfigError at the start where an argument cannot be right, the metric of ``save_best`` among them.
    """

    priority = "VERY_LOW"

    def __init__(  # noqa: PLR0913 - MMEngine's arguments
        self,
        interval: int = -1,
        by_epoch: bool | None = None,
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        out_dir: str | None = None,
        max_keep_ckpts: int = -1,
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
        self.interval = interval
        self.by_epoch = by_epoch
        self.save_begin = save_begin
        self.save_last = save_last
        self.out_dir = out_dir
        self.every_seconds = every_seconds
        self.keep_every = keep_every
        self.weights_interval = weights_interval
        self.published_keys = as_names(published_keys)
        self.policy = {
            "max_keep": max_keep_ckpts, "keep_every": keep_every, "optimizer": save_optimizer,
            "schedules": save_param_scheduler, "frozen": save_frozen, "asynchronous": async_save,
            "on_error": on_save_error, "filename_tmpl": filename_tmpl, "at_stop": save_last,
        }  # fmt: skip
        self._clock = clock
        self._greater, self._less = as_names(greater_keys) or GREATER_KEYS, as_names(less_keys) or LESS_KEYS
        self._best_metrics = as_names(save_best)
        rules = as_names(rule) if self._best_metrics else []
        self._rules = rules * len(self._best_metrics) if len(rules) == 1 else rules
        self.best: dict[str, dict[str, Any]] = {}
        self._found_by: dict[str, str] = {}  # the rule by which a metric's best value was found
        self._kept: dict[str, dict[str, Any]] = {}  # the records whose checkpoints stand: what best.json says

    # ---- when ---------------------------------------------------------------------------------------------------
    def before_run(self, runner: Any) -> None:
        """Hand the policy over; the unit of the interval is the run's where none was given."""
        if runner.train_loop is not None:
            if self.by_epoch is None:
                self.by_epoch = runner.train_loop.by_epoch
            runner.saving.configure(self.policy, by_epoch=self.by_epoch)

    def before_train(self, runner: Any) -> None:
        """Check the metrics of ``save_best`` against what one batch of validation gives, and start the clock."""
        self._last_save = self._clock()
        if self._best_metrics:
            self._name_metrics(runner)
        other = self._drop_other_rules(runner)
        runner.saving.protect(record["checkpoint"] for record in self.best.values())
        self._kept = runner.saving.catch_up(self.best, resumed=runner.resumed_from)
        if other:
            runner.saving.write_best(self._kept)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Ask for the saves that are counted in iterations or seconds."""
        done = runner.iter + 1
        if not self.by_epoch and self._is_due(done, self.interval):
            runner.request_save("interval")
        elif self.save_last and runner.train_loop.finished:
            runner.request_save("last")
        if not self.by_epoch and self.weights_interval and done % self.weights_interval == 0:
            runner.request_save("weights", weights_only=True)
        if self.every_seconds is not None and self._clock() - self._last_save >= self.every_seconds:
            self._last_save = self._clock()
            runner.request_save("time", temporary=True)

    def after_train_epoch(self, runner: Any) -> None:
        """Ask for the saves that are counted in epochs."""
        done = runner.epoch + 1
        if self.by_epoch and self._is_due(done, self.interval):
            runner.request_save("interval")
        if self.by_epoch and self.weights_interval and done % self.weights_interval == 0:
            runner.request_save("weights", weights_only=True)

    def _is_due(self, done: int, interval: int) -> bool:
        return interval > 0 and done >= max(self.save_begin, 1) and (done - self.save_begin) % interval == 0

    def after_run(self, runner: Any) -> None:
        """Publish the last and the best checkpoint of a finished run where ``published_keys`` asks for it."""
        if self.published_keys and runner.train_loop is not None and runner.train_loop.finished:
            best = {record["checkpoint"] for record in self._kept.values()}
            runner.saving.publish(best, self.published_keys, last=self.save_last)

    # ---- the best -----------------------------------------------------------------------------------------------
    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Ask for a save when a metric is the best so far; the record is written when that checkpoint exists."""
        if runner.train_loop is None or not self._rules:
            return  # nothing is trained: there is nothing to save
        self._drop_unsaved(runner)
        for metric, rule in zip(self._best_metrics, self._rules, strict=True):
            if metrics is None or metric not in metrics:
                raise RunError(f"save_best: validation gave no {metric!r}; it gave {sorted(metrics or {})}")
            value = float(metrics[metric])
            if math.isfinite(value) and self._is_better(value, self.best.get(metric, {}).get("value"), rule):
                self.best[metric] = {"value": value, "checkpoint": None, "iteration": runner.progress.iteration}
                runner.request_save(f"best {metric}", best=metric)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Name the checkpoint that is being written in the records it is the best of; it must not be retired."""
        self._last_save = self._clock()
        self._drop_unsaved(runner)
        for record in self.best.values():
            if record["checkpoint"] is None:
                record["checkpoint"] = checkpoint["name"]
        runner.saving.protect(record["checkpoint"] for record in self.best.values())

    def _drop_unsaved(self, runner: Any) -> None:
        """Where the save of the best one failed, the best one is still the one before it."""
        for metric in [metric for metric, record in self.best.items() if record["checkpoint"] in runner.saving.failed]:
            del self.best[metric]
            if metric in self._kept:
                self.best[metric] = dict(self._kept[metric])

    def after_save_checkpoint(self, runner: Any, entry: str) -> None:
        """Write ``best.json`` once the checkpoint it names is complete."""
        complete = {metric: dict(record) for metric, record in self.best.items() if record["checkpoint"] == entry}
        if complete:
            self._kept |= complete
            runner.saving.write_best(self._kept)

    def _name_metrics(self, runner: Any) -> None:
        if runner.val_loop is None:
            raise ConfigError("default_hooks.checkpoint.save_best needs a val_dataloader")
        found = runner.val_loop.metric_names()
        metrics = [found[0] if metric == "auto" and found else metric for metric in self._best_metrics]
        for metric in metrics:
            if metric not in found:
                raise ConfigError(
                    f"default_hooks.checkpoint.save_best is {metric!r}, which validation does not give; "
                    f"it gives {', '.join(sorted(found))}"
                )
        self._best_metrics, self._rules = metrics, self._rules or [self._rule_of(metric) for metric in metrics]

    def _drop_other_rules(self, runner: Any) -> bool:
        """Forget the best values that were found by another rule than today's; return whether there were any."""
        rules = dict(zip(self._best_metrics, self._rules, strict=True))
        other = [m for m in self.best if m in rules and self._found_by.get(m, rules[m]) != rules[m]]
        for metric in other:
            value, rule = self.best.pop(metric)["value"], rules[metric]
            runner.logger.warning(
                "save_best: the best %s so far, %s, was found by rule=%r; by rule=%r the search begins anew",
                metric, value, self._found_by[metric], rule,
            )  # fmt: skip
        self._found_by |= rules
        return bool(other)

    def _rule_of(self, metric: str) -> str:
        rule = infer_rule(metric, greater=self._greater, less=self._less)
        if rule is None:
            raise ConfigError(
                f"default_hooks.checkpoint.save_best: is {metric!r} better when greater or when less? "
                "say so with rule='greater' or rule='less'"
            )
        return rule

    @staticmethod
    def _is_better(value: float, best: float | None, rule: str) -> bool:
        if best is None:
            return True
        return value > best if rule == "greater" else value < best

    # ---- state --------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """The best values so far, the checkpoints that have them and the rules by which they were found."""
        return {"best": {metric: dict(record) for metric, record in self.best.items()}, "rules": dict(self._found_by)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.best = {metric: dict(record) for metric, record in state_dict["best"].items()}
        self._found_by = dict(state_dict.get("rules", {}))
