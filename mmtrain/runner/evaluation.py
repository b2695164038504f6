"""Validation and test: one ordered pass over each set, with its metrics; the loss needs no evaluator."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from mmtrain import dist, heartbeat
from mmtrain.data.batch import count_samples
from mmtrain.errors import RunError
from mmtrain.modes import evaluation_mode
from mmtrain.optim import OptimWrapperDict
from mmtrain.randomness import STREAM_VAL, capture, mix, restore, seed_generators
from mmtrain.runner.model_call import ModelCall
from mmtrain.runner.run import EvaluationSet, Run
from mmtrain.types import accumulation_window


class EvaluationLoop:
    """Runs the validation or the test sets (``kind`` is "val" or "test").

    ``sets`` maps a name to (loader, evaluator or None). The metrics of a set named "" keep their own names; those of
    any other are called ``<set>/<metric>``. ``fp16`` is ``val_cfg.fp16``: run the model under float16 autocast.
    """

    def __init__(self, runner: Run, kind: str, sets: Mapping[str, EvaluationSet], *, fp16: bool = False) -> None:
        self.runner = runner
        self.kind = kind
        self.sets = dict(sets)
        self._fp16 = fp16
        self._call = ModelCall(runner.model, runner.strategy.evaluation_module, runner.device)

    @property
    def dataloader(self) -> Any:
        """The first set's loader."""
        return next(iter(self.sets.values())).loader

    @property
    def evaluator(self) -> Any:
        """The first set's evaluator."""
        return next(iter(self.sets.values())).evaluator

    def run(self, *, max_batches: int | None = None) -> dict[str, float]:
        """Evaluate every set, call the hooks and return the metrics. Leaves the model in evaluation mode."""
        runner, kind = self.runner, self.kind
        runner.strategy.module.eval()
        runner.hooks.call(f"before_{kind}", runner)
        runner.hooks.call(f"before_{kind}_epoch", runner)
        metrics = self.measure(max_batches=max_batches)
        runner.metrics = metrics
        runner.hooks.call(f"after_{kind}_epoch", runner, metrics=metrics)
        runner.hooks.call(f"after_{kind}", runner)
        return metrics

    def close(self) -> None:
        """End the workers of every set's loader."""
        for loader, _ in self.sets.values():
            close = getattr(loader, "close", None)
            if callable(close):
                close()

    def metric_names(self) -> list[str]:
        """The names of the metrics, from one batch of every set, without hooks.

        Model and generators are left as they were: asking for names must not change the run.
        """
        generators = capture()
        try:
            with evaluation_mode(self.runner.strategy.module):
                return list(self.measure(max_batches=1, quiet=True))
        finally:
            restore(generators)

    def measure(self, *, max_batches: int | None = None, quiet: bool = False) -> dict[str, float]:
        """Evaluate every set with the model as it is; ``quiet`` calls no hook."""
        runner = self.runner
        if runner.randomness.positional:
            seed_generators(mix(STREAM_VAL, runner.seed, dist.data_rank(), runner.progress.iteration))
        runner.strategy.share_buffers()
        runner.strategy.forget_gathered()
        metrics: dict[str, float] = {}
        with torch.no_grad():
            for name, (loader, evaluator) in self.sets.items():
                found = self._measure_set(loader, evaluator, max_batches, quiet)
                metrics.update({f"{name}/{key}" if name else key: value for key, value in found.items()})
        runner.strategy.forget_gathered()
        return metrics

    def _measure_set(self, loader: Any, evaluator: Any, max_batches: int | None, quiet: bool) -> dict[str, float]:
        runner, points = self.runner, self.runner.hooks.points
        before, after = points[f"before_{self.kind}_iter"], points[f"after_{self.kind}_iter"]
        losses = _LossMean()
        count = 0
        for index, batch in enumerate(loader):
            if max_batches is not None and index >= max_batches:
                break
            heartbeat.beat()
            if batch is None:  # the last batch of the set has no sample for this rank
                if runner.strategy.forward_is_collective:
                    self._predict(loader.stand_in(), None, _LossMean())
                continue
            if not quiet:
                for hook in before:
                    hook(runner, batch_idx=index, data_batch=batch)
            outputs = self._predict(batch, evaluator, losses)
            count += count_samples(batch)
            if not quiet:
                for hook in after:
                    hook(runner, batch_idx=index, data_batch=batch, outputs=outputs)
        total = int(dist.sum_over_ranks(torch.tensor(count)).item()) // dist.model_parallel()
        if total == 0:
            raise RunError(f"the {self.kind} set is empty: its loader returned no batch")
        metrics = losses.mean()
        if evaluator is not None:
            metrics.update(evaluator.evaluate(total if max_batches is not None else len(loader.dataset)))
        return metrics

    def _precision(self) -> AbstractContextManager[Any]:
        """That of training, or float16 where ``val_cfg.fp16`` says so.

        With several optimizers, which may train in several precisions, it is the weights' own, as in MMEngine.
        """
        runner = self.runner
        if self._fp16:
            return torch.autocast(runner.device.type, dtype=torch.float16)
        one = runner.optim_wrapper is not None and not isinstance(runner.optim_wrapper, OptimWrapperDict)
        return runner.strategy.forward_context(accumulation_window(1)[0]) if one else nullcontext()

    def _predict(self, batch: Any, evaluator: Any, losses: "_LossMean") -> Any:
        call, runner = self._call, self.runner
        with self._precision():
            if evaluator is not None and call.has_mode:
                outputs = getattr(runner.model, f"{self.kind}_step")(batch)
            else:
                prepared = call.prepare(batch, training=False)
                outputs = call(prepared)
                if call.has_mode or evaluator is None or _has_loss(outputs):
                    losses.add(call.losses(outputs)[1], count_samples(batch))
        if evaluator is not None:
            evaluator.process(data_samples=outputs, data_batch=batch)
        return outputs


class _LossMean:
    """The mean of each loss over samples and ranks, summed in float64 and read once."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._samples = 0

    def add(self, parts: Mapping[str, torch.Tensor], samples: int) -> None:
        for name, value in parts.items():
            weighted = value.detach().double() * samples
            self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted
        self._samples += samples

    def mean(self) -> dict[str, float]:
        if not self._sums:
            return {}
        names = sorted(self._sums, key=lambda name: (name != "loss", name))
        values = torch.stack([*(self._sums[name].cpu() for name in names), torch.tensor(float(self._samples)).double()])
        totals = dist.sum_over_ranks(values).tolist()
        return {name: total / totals[-1] for name, total in zip(names, totals[:-1], strict=True)}


def _has_loss(outputs: Any) -> bool:
    return ("loss" in outputs) if isinstance(outputs, Mapping) else hasattr(outputs, "loss")
