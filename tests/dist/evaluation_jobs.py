"""Validations in which the ranks have unequal shares, or report unequal losses. Jobs for a group."""

import threading

import parts
import torch
from torch import nn

from mmtrain import dist
from mmtrain.errors import ConfigError
from mmtrain.registry import DATASETS, METRICS, MODELS


@MODELS.register_module()
class Parts(nn.Module):
    """Reports ``positive``, a part of the loss, only where a batch holds a positive sample."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(6, 2)

    def forward(self, x, y):
        found = {"loss": nn.functional.cross_entropy(self.line(x), y)}
        if y.any():
            found["positive"] = x[y == 1].sum(1).mean()
        return found


class Points:
    """``size`` points whose first ``negative`` are negative."""

    def __init__(self, size, negative=0):
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(size, 6, generator=generator)
        self.y = (torch.arange(size) >= negative).long()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.y[index]}


DATASETS.register_module(name="MapPoints", module=Points)


@DATASETS.register_module()
class StreamedPoints(torch.utils.data.IterableDataset):
    """The same as a stream without a length; the first rank reads ``first`` of them, the second the others."""

    def __init__(self, first, **options):
        self.points, self.first = Points(**options), first

    def __iter__(self):
        every, size = range(len(self.points)), dist.world_size()
        own = every if size == 1 else every[: self.first] if dist.rank() == 0 else every[self.first :]
        return (self.points[index] for index in own)


def _metric():
    from mmengine.evaluator import BaseMetric

    class Seen(BaseMetric):
        """The number of results, and their sum in the order in which they are gathered."""

        def process(self, data_batch, data_samples):
            self.results.extend(data_batch["x"].double().sum(1).tolist())

        def compute_metrics(self, results):
            return {"seen": len(results), "sum": sum(sorted(results))}

    METRICS.register_module(name="Seen", module=Seen, force=True)


def validated(work_dir, dataset, batch_size=2, strategy=None, evaluator=True, num_workers=0):
    """The metrics of a validation before and during training."""
    _metric()
    runner = parts.make_runner(
        work_dir,
        model={"type": "Parts"},
        train_dataloader={"dataset": {"type": "MapPoints", "size": 16}, "batch_size": 8 // dist.world_size()},
        val_dataloader={"dataset": dataset, "batch_size": batch_size, "num_workers": num_workers},
        val_evaluator={"type": "Seen"} if evaluator else None,
        train_cfg={"max_iters": 2, "val_interval": 1},
        default_hooks={"checkpoint": None},
        log_level="ERROR",
        **({"strategy": strategy} if strategy is not None else {}),
    )
    runner.train()
    return runner.metrics


class Torn(Exception):
    """Has a constructor that its own pickle does not fit."""

    def __init__(self, metric, reason):
        super().__init__(f"{metric}: {reason}")


def on_main_raises(kind):
    """What each rank sees of an exception, or a result, of rank 0."""

    def compute():
        if kind == "lambda":
            return lambda: None
        if kind == "torn":
            raise Torn("mAP", "no boxes")
        if kind == "local":

            class Local(Exception):
                pass

            raise Local("no boxes")
        if kind == "holds a lock":
            raise ValueError("no boxes", threading.Lock())
        raise ConfigError("no boxes")

    try:
        dist.on_main(compute)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
