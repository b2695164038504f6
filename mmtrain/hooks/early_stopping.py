"""Stops a run whose metric no longer improves."""

import math
from collections.abc import Mapping
from typing import Any

from mmtrain.errors import ConfigError, RunError
from mmtrain.evaluation.metric_rule import infer_rule
from mmtrain.hooks.base import Hook
from mmtrain.registry import HOOKS
from mmtrain.runner.interface import Runner


@HOOKS.register_module()
class EarlyStoppingHook(Hook):
    """Asks the run to stop when ``monitor`` did not improve by ``min_delta`` in ``patience`` validations in a row.

    MMEngine's arguments; the rule is inferred from the metric's name as in MMEngine. The count and the best value are
    saved with checkpoints, so patience continues after a restart. A run that was stopped ends at once when it is
    started again, unless its new arguments let it continue. It also stops when the metric passes
    ``stopping_threshold`` and, with ``check_finite``, when it becomes NaN or infinite. Raises RunError for a metric
    that validation does not report; with ``strict=False`` this is a warning, given once. Raises ConfigError when the
    rule cannot be inferred.
    """

    priority = "LOWEST"

    def __init__(
        self,
        monitor: str,
        rule: str | None = None,
        *,
        min_delta: float = 0.1,
        strict: bool = True,
        check_finite: bool = True,
        patience: int = 5,
        stopping_threshold: float | None = None,
    ) -> None:
        rule = rule or infer_rule(monitor)
        if rule not in ("greater", "less"):
            found = f"rule is {rule!r}" if rule else f"{monitor!r} does not say whether greater or less is better"
            raise ConfigError(f"EarlyStoppingHook: {found}; expected rule='greater' or rule='less'")
        if patience < 1:
            raise ConfigError(f"EarlyStoppingHook: patience is {patience}; expected 1 or more validations")
        self.monitor = monitor
        self.rule = rule
        self.min_delta = min_delta
        self.strict = strict
        self.check_finite = check_finite
        self.patience = patience
        self.stopping_threshold = stopping_threshold
        self.wait_count = 0
        self.best_score: float | None = None
        self.last_score: float | None = None
        self._warned_missing = False

    def before_train(self, runner: Runner) -> None:
        """Stop a run that was started again although its last validation had stopped it."""
        self._stop(runner)

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        metrics = metrics or {}
        if self.monitor not in metrics:
            self._missing(runner, metrics)
            return
        self._note(float(metrics[self.monitor]))
        self._stop(runner)

    def _stop(self, runner: Runner) -> None:
        reason = self._reason()
        if reason is not None:
            runner.request_stop(f"{reason} (EarlyStoppingHook)", for_good=True)

    def _missing(self, runner: Runner, metrics: Mapping[str, Any]) -> None:
        sentence = (
            f"EarlyStoppingHook: validation did not report {self.monitor!r}; "
            f"it reported {', '.join(sorted(metrics)) or 'no metrics'}"
        )
        if self.strict:
            raise RunError(f"{sentence}. Set monitor to one of these")
        if not self._warned_missing:
            runner.logger.warning("%s; early stopping is off", sentence)
            self._warned_missing = True

    def _note(self, score: float) -> None:
        self.last_score = score
        if self.check_finite and not math.isfinite(score):
            return
        if self._is_past_threshold(score):
            self.best_score = score
        elif self._improves(score):
            self.best_score, self.wait_count = score, 0
        else:
            self.wait_count += 1

    def _reason(self) -> str | None:
        """Why to stop after the last value, or None to continue."""
        score = self.last_score
        if score is None:
            return None
        if self.check_finite and not math.isfinite(score):
            return f"{self.monitor} is {score}; its best value was {self.best_score}"
        if self._is_past_threshold(score):
            return f"{self.monitor} = {score} is {self.rule} than stopping_threshold={self.stopping_threshold}"
        if self.wait_count < self.patience:
            return None
        return f"{self.monitor} did not improve in {self.wait_count} validations; best value: {self.best_score}"

    def _is_past_threshold(self, score: float) -> bool:
        limit = self.stopping_threshold
        return limit is not None and (score > limit if self.rule == "greater" else score < limit)

    def _improves(self, score: float) -> bool:
        # As in MMEngine, a value exactly min_delta beyond the best one is an improvement. NaN never is.
        if self.best_score is None:
            return not math.isnan(score)
        if self.rule == "greater":
            return score >= self.best_score + self.min_delta
        return score <= self.best_score - self.min_delta

    def state_dict(self) -> dict[str, Any]:
        names = ("monitor", "best_score", "wait_count", "last_score")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the count, unless it is that of another metric."""
        if state_dict["monitor"] == self.monitor:
            self.best_score, self.wait_count = state_dict["best_score"], int(state_dict["wait_count"])
            self.last_score = state_dict.get("last_score")
