"""Runs metrics over a validation or test set. Metrics are MMEngine's: subclasses of its BaseMetric, or look-alikes."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from mmtrain import dist
from mmtrain.errors import ConfigError, RunError
from mmtrain.registry import EVALUATOR, METRICS, build, resolve

_NOTHING = object()


@EVALUATOR.register_module()
class Evaluator:
    """Several metrics as one, with the methods of MMEngine's Evaluator.

    A metric has ``process(data_batch, data_samples)`` and ``evaluate(size) -> dict``. Raises ConfigError for an object
    without these.
    """

    def __init__(self, metrics: Any, path: str = "evaluator") -> None:
        several = list(metrics) if isinstance(metrics, Sequence) and not isinstance(metrics, str) else [metrics]
        single = len(several) == 1 and not isinstance(metrics, Sequence)
        self.metrics: list[Any] = []
        for index, metric in enumerate(several):
            here = path if single else f"{path}[{index}]"
            built = build(METRICS, metric, path=here)
            for method in ("process", "evaluate"):
                if not callable(getattr(built, method, None)):
                    raise ConfigError(
                        f"{here} is a {type(built).__name__} without a method {method!r}, so it is not a metric"
                    )
            if dist.model_parallel() > 1 and _gathers_itself(built):
                raise ConfigError(
                    f"{here}: {type(built).__name__} gathers its results in an evaluate() of its own, over all ranks, "
                    "which would count samples several times under tensor parallelism; derive it from MMEngine's "
                    "BaseMetric and give it compute_metrics() alone"
                )
            self.metrics.append(built)
        self._dataset_meta: Any = None

    @property
    def dataset_meta(self) -> Any:
        """What the data set says of itself (``dataset.metainfo``); setting it tells every metric."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, value: Any) -> None:
        self._dataset_meta = value
        for metric in self.metrics:
            metric.dataset_meta = value

    def process(self, data_samples: Any, data_batch: Any = None) -> None:
        """Give every metric one batch: the model's outputs and what it was given. Data elements become dicts."""
        samples = data_samples
        if isinstance(data_samples, (list, tuple)):
            samples = [_as_dict(sample) for sample in data_samples]
        for metric in self.metrics:
            metric.process(data_batch, samples)

    def evaluate(self, size: int) -> dict[str, Any]:
        """Return the metrics over ``size`` samples, and begin anew. Collective; everyone gets the same values.

        Raises RunError when two metrics give one name.
        """
        found: dict[str, Any] = {}
        for metric in self.metrics:
            results = _gathered(metric, size) if dist.world_size() > 1 else metric.evaluate(size)
            twice = sorted(found.keys() & results.keys())
            if twice:
                raise RunError(f"two metrics give the name {twice[0]!r}; set a different prefix=... in one of them")
            found.update(results)
        return found


def build_evaluator(cfg: Any, *, path: str = "val_evaluator") -> Any:
    """An evaluator from a config: a metric, a list of metrics, or ``dict(type='Evaluator', metrics=...)``.

    None gives None; an object that is an evaluator already is returned as it is. Raises ConfigError with the dotted
    path of what is wrong.
    """
    if cfg is None or (not isinstance(cfg, (Mapping, Sequence)) and hasattr(cfg, "metrics")):
        return cfg
    if isinstance(cfg, Mapping) and "metrics" in cfg:
        options = {"type": "Evaluator", **cfg}
        if resolve(EVALUATOR, options["type"], path=f"{path}.type") is Evaluator:
            return Evaluator(options["metrics"], path=f"{path}.metrics")
        return build(EVALUATOR, options, path=path)
    return Evaluator(cfg, path=path)


def _as_dict(sample: Any) -> Any:
    """MMEngine's data elements as the dicts that its metrics expect, told by their method, without importing them."""
    convert = None if isinstance(sample, Mapping) else getattr(sample, "to_dict", None)
    return convert() if callable(convert) else sample


def _gathers_itself(metric: Any) -> bool:
    """Whether a metric puts the results of ranks together in its own way."""
    from mmengine.evaluator import BaseMetric

    return not isinstance(metric, BaseMetric) or type(metric).evaluate is not BaseMetric.evaluate


def _gathered(metric: Any, size: int) -> dict[str, Any]:
    """`evaluate` over several ranks.

    MMEngine's own way drops samples when ranks have different numbers of them, as it expects padded data sets; here
    every sample counts once. A metric with an `evaluate` of its own gathers in its own way.
    """
    if _gathers_itself(metric):
        return metric.evaluate(size)
    # Ranks that share a copy of the model have the same results.
    ranks = dist.gather_objects(list(metric.results))[:: dist.model_parallel()]
    metric.results.clear()
    rows = zip_longest(*ranks, fillvalue=_NOTHING)
    results = [item for row in rows for item in row if item is not _NOTHING][:size]

    def compute() -> dict[str, Any]:
        values = metric.compute_metrics(results)
        return {f"{metric.prefix}/{name}": value for name, value in values.items()} if metric.prefix else values

    return dist.on_main(compute)
