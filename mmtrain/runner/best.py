"""The best value of each metric of ``save_best``, and the checkpoint that has it."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mmtrain.errors import ConfigError, RunError
from mmtrain.evaluation.metric_rule import GREATER_KEYS, LESS_KEYS, infer_rule

Record = dict[str, Any]  # {"value": float, "checkpoint": name or None while it is not saved, "iteration": int}


class BestRecords:
    """Keeps the best value of each metric so far.

    ``metrics`` are names that validation reports, or "auto" for the first of them. ``rules`` ("greater" or "less") has
    one entry per metric, one for all, or none: then they are inferred from the names. The records are state: saved with
    every checkpoint. A record counts as saved once its checkpoint is complete (`confirm`); `saved` is the content of
    ``best.json``.
    """

    def __init__(
        self,
        metrics: Sequence[str] = (),
        rules: Sequence[str] = (),
        *,
        greater_keys: Sequence[str] = GREATER_KEYS,
        less_keys: Sequence[str] = LESS_KEYS,
    ) -> None:
        self.records: dict[str, Record] = {}
        self.saved: dict[str, Record] = {}
        self._metrics = list(metrics)
        self._rules = list(rules) * len(self._metrics) if len(rules) == 1 else list(rules)
        self._greater_keys = greater_keys
        self._less_keys = less_keys
        self._found_by: dict[str, str] = {}  # the rule by which each record was found

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics."""
        return self._metrics

    @property
    def checkpoints(self) -> set[str]:
        """The checkpoints that the records name: retention must keep them."""
        return {record["checkpoint"] for record in self.records.values() if record["checkpoint"]}

    def check_metrics(self, available: Sequence[str]) -> None:
        """Replace "auto" and infer the rules. Raises ConfigError for a metric that validation does not report."""
        metrics = [available[0] if metric == "auto" and available else metric for metric in self._metrics]
        for metric in metrics:
            if metric not in available:
                raise ConfigError(
                    f"default_hooks.checkpoint.save_best is {metric!r}, which validation does not report; "
                    f"it reports {', '.join(sorted(available))}"
                )
        self._metrics = metrics
        self._rules = self._rules or [self._infer_rule(metric) for metric in metrics]

    def forget_other_rules(self, logger: logging.Logger) -> bool:
        """Drop the records that were found by another rule than today's; return whether there were any."""
        rules = dict(zip(self._metrics, self._rules, strict=True)) if self._rules else {}
        other = [m for m in self.records if m in rules and self._found_by.get(m, rules[m]) != rules[m]]
        for metric in other:
            value = self.records.pop(metric)["value"]
            logger.warning(
                "save_best: the best %s so far (%s) was found with rule=%r; with rule=%r the search starts over",
                metric,
                value,
                self._found_by[metric],
                rules[metric],
            )
        self._found_by |= rules
        return bool(other)

    def observe(self, metrics: Mapping[str, Any], *, iteration: int) -> list[str]:
        """Take the values of a validation; return the metrics that improved. Raises RunError for a missing one."""
        improved = []
        for metric, rule in zip(self._metrics, self._rules, strict=True):
            if metric not in metrics:
                raise RunError(f"save_best: validation did not report {metric!r}; it reported {sorted(metrics)}")
            value = float(metrics[metric])
            best = self.records.get(metric, {}).get("value")
            if math.isfinite(value) and (best is None or (value > best if rule == "greater" else value < best)):
                self.records[metric] = {"value": value, "checkpoint": None, "iteration": iteration}
                improved.append(metric)
        return improved

    def assign(self, checkpoint: str) -> None:
        """The records without a checkpoint belong to the one that is being saved."""
        for record in self.records.values():
            if record["checkpoint"] is None:
                record["checkpoint"] = checkpoint

    def confirm(self, checkpoint: str) -> bool:
        """Move the records of a complete checkpoint to `saved`; return whether there were any."""
        complete = {m: dict(record) for m, record in self.records.items() if record["checkpoint"] == checkpoint}
        self.saved |= complete
        return bool(complete)

    def restore_saved(self, existing: Collection[str]) -> None:
        """Set `saved` from the records whose checkpoints exist; for the start of a run."""
        self.saved = {m: dict(record) for m, record in self.records.items() if record["checkpoint"] in existing}

    def drop_failed(self, failed: Collection[str]) -> None:
        """Where the save of the best one failed, the best one is still the previous one."""
        for metric in [metric for metric, record in self.records.items() if record["checkpoint"] in failed]:
            del self.records[metric]
            if metric in self.saved:
                self.records[metric] = dict(self.saved[metric])

    def _infer_rule(self, metric: str) -> str:
        rule = infer_rule(metric, greater=self._greater_keys, less=self._less_keys)
        if rule is None:
            raise ConfigError(
                f"default_hooks.checkpoint.save_best: cannot infer whether a greater or a smaller {metric!r} is "
                "better; set rule='greater' or rule='less'"
            )
        return rule

    def state_dict(self) -> dict[str, Any]:
        """The best values so far, the checkpoints that have them and the rules by which they were found."""
        return {"best": {metric: dict(r) for metric, r in self.records.items()}, "rules": dict(self._found_by)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.records = {metric: dict(record) for metric, record in state_dict["best"].items()}
        self._found_by = dict(state_dict.get("rules", {}))
