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
                    f"{here}: {type(built).__name__} gathers its results over all ranks in its own evaluate(), which "
                    "counts samples several times under tensor parallelism; subclass MMEngine's BaseMetric and "
                    "override compute_metrics() only"
                )
            self.metrics.append(built)
        self._dataset_meta: Any = None

    @property
    def dataset_meta(self) -> Any:
        """What the dataset says about itself (``dataset.metainfo``); setting it sets it for every metric."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, value: Any) -> None:
        self._dataset_meta = value
        for metric in self.metrics:
            metric.dataset_meta = value

    def process(self, data_samples: Any, data_batch: Any = None) -> None:
        """Give every metric one batch: the model's outputs and its inputs. Data elements become dicts."""
        samples = data_samples
        if isinstance(data_samples, (list, tuple)):
            samples = [_as_dict(sample) for sample in data_samples]
        for metric in self.metrics:
            metric.process(data_batch, samples)

    def evaluate(self, size: int) -> dict[str, Any]:
        """Return the metrics over ``size`` samples and reset. Collective; all ranks get the same values.

        Raises RunError when two metrics return the same name.
        """
        found: dict[str, Any] = {}
        for metric in self.metrics:
            results = _gathered(metric, size) if dist.world_size() > 1 else metric.evaluate(size)
            twice = sorted(found.keys() & results.keys())
            if twice:
                raise RunError(f"two metrics return the name {twice[0]!r}; set a different prefix=... in one of them")
            found.update(results)
        return found


def build_evaluator(cfg: Any, *, path: str = "val_evaluator") -> Any:
    """An evaluator from a config: a metric, a list of metrics, or ``dict(type='Evaluator', metrics=...)``.

    None returns None, and an evaluator is returned as it is. Raises ConfigError with the dotted path of what is wrong.
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
    """MMEngine's data elements as the dicts that its metrics expect; ``to_dict`` identifies them without an import."""
    convert = None if isinstance(sample, Mapping) else getattr(sample, "to_dict", None)
    return convert() if callable(convert) else sample


def _gathers_itself(metric: Any) -> bool:
    """Whether a metric gathers the results of ranks itself."""
    from mmengine.evaluator import BaseMetric

    return not isinstance(metric, BaseMetric) or type(metric).evaluate is not BaseMetric.evaluate


def _gathered(metric: Any, size: int) -> dict[str, Any]:
    """`evaluate` over several ranks.

    MMEngine drops samples when ranks have different numbers of them, as it expects padded datasets; here every sample
    counts once. A metric that overrides `evaluate` gathers itself.
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
