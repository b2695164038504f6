"""Validation and test: one ordered pass over each set, with its metrics; the loss needs no evaluator."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from mmtrain import dist, heartbeat
from mmtrain.data.batch import count_samples
from mmtrain.data.stream import is_iterable_style
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
        runner.strategy.check_in_step()
        runner.strategy.share_buffers()
        runner.strategy.forget_gathered()
        metrics: dict[str, float] = {}
        with torch.no_grad():
            for name, (loader, evaluator) in self.sets.items():
                found = self._measure_set(loader, evaluator, max_batches, quiet)
                metrics.update({f"{name}/{key}" if name else key: value for key, value in found.items()})
        runner.strategy.check_in_step()
        runner.strategy.forget_gathered()
        return metrics

    def _measure_set(self, loader: Any, evaluator: Any, max_batches: int | None, quiet: bool) -> dict[str, float]:
        runner, points = self.runner, self.runner.hooks.points
        before, after = points[f"before_{self.kind}_iter"], points[f"after_{self.kind}_iter"]
        losses = _LossMean()
        count = 0
        for index, (batch, is_own) in enumerate(self._batches(loader)):
            if max_batches is not None and index >= max_batches:
                break
            heartbeat.beat()
            if not is_own:
                self._predict(batch, None, _LossMean())
                continue
            if not quiet:
                for hook in before:
                    hook(runner, batch_idx=index, data_batch=batch)
            outputs = self._predict(batch, evaluator, losses)
            count += count_samples(batch)
            if not quiet:
                for hook in after:
                    hook(runner, batch_idx=index, data_batch=batch, outputs=outputs)
        ranks = dist.gather_objects((count, losses.sums()))
        total = sum(samples for samples, _ in ranks) // dist.model_parallel()
        if total == 0:
            raise RunError(f"the {self.kind} set is empty: its loader returned no batch")
        metrics = _mean_of(sums for _, sums in ranks)
        if evaluator is not None:
            metrics.update(evaluator.evaluate(total if max_batches is not None else _size(loader, total)))
        return metrics

    def _batches(self, loader: Any) -> Iterator[tuple[Any, bool]]:
        """The loader's batches, and whether the samples are this rank's own.

        Where every rank must run forward when one does, a rank that has no batch (left) gets one whose results do not
        count, until all ranks have none: its last one, or that of another rank.
        """
        if not self.runner.strategy.forward_is_collective or dist.world_size() == 1:
            yield from ((batch, True) for batch in loader if batch is not None)
            return
        own = iter(loader)
        last = None
        while True:
            batch = next(own, None)
            last = last if batch is None else batch
            has = torch.tensor([batch is not None, last is not None], dtype=torch.int64)
            with_batch, with_some = dist.sum_over_ranks(has).tolist()
            if not with_batch:
                return  # a loader gives None only as its last batch
            if with_some < dist.world_size():
                source = dist.gather_objects(last is not None).index(True)
                lent = dist.broadcast_object(last, source)
                last = lent if last is None else last
            yield last, batch is not None

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
                    tokens = call.num_tokens(outputs)
                    losses.add(call.losses(outputs)[1], count_samples(batch) if tokens is None else tokens)
        if evaluator is not None:
            evaluator.process(data_samples=outputs, data_batch=batch)
        return outputs


class _LossMean:
    """The sum of each loss over the samples, or tokens, of the batches that report it, in float64, and their number."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._samples: dict[str, Any] = {}

    def add(self, parts: Mapping[str, torch.Tensor], samples: Any) -> None:
        for name, value in parts.items():
            if name == "num_tokens":
                continue
            weighted = value.detach().double() * samples
            self._sums[name] = self._sums[name] + weighted if name in self._sums else weighted
            self._samples[name] = self._samples.get(name, 0) + samples

    def sums(self) -> dict[str, tuple[float, float]]:
        """The sum and the number of samples of each loss, as plain numbers."""
        if not self._sums:
            return {}
        values = torch.stack([value.cpu() for value in self._sums.values()]).tolist()
        return {name: (value, float(self._samples[name])) for name, value in zip(self._sums, values, strict=True)}


def _mean_of(ranks: Iterable[Mapping[str, tuple[float, float]]]) -> dict[str, float]:
    """The mean of each loss over the samples of all ranks; ranks may have met different losses, or none."""
    totals: dict[str, tuple[float, float]] = {}
    for sums in ranks:
        for name, (value, samples) in sums.items():
            total, count = totals.get(name, (0.0, 0.0))
            totals[name] = (total + value, count + samples)
    names = sorted(totals, key=lambda name: (name != "loss", name))
    return {name: totals[name][0] / totals[name][1] if totals[name][1] else math.nan for name in names}


def _size(loader: Any, total: int) -> int:
    """The number of samples in a set: its length, beyond which samplers pad; without one, those that were read."""
    dataset = getattr(loader, "dataset", None)
    return total if dataset is None or is_iterable_style(dataset) else len(dataset)


def _has_loss(outputs: Any) -> bool:
    return ("loss" in outputs) if isinstance(outputs, Mapping) else hasattr(outputs, "loss")
