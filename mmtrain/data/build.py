"""Builds data loaders from their configs."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from mmtrain.config.keys import DATALOADER_KEYS
from mmtrain.data.eval_loader import EvalLoader, IterableEvalLoader
from mmtrain.data.iterable.stream import ForeignStream, IterableStream
from mmtrain.data.options import unknown_key
from mmtrain.data.stream import Stream, TrainStream, is_iterable_style
from mmtrain.errors import ConfigError
from mmtrain.registry import DATASETS, FUNCTIONS, build, resolve


class SlicedDataset:
    """The first ``size`` samples of a dataset: ``num_batch_per_epoch``, MMEngine's option for short epochs."""

    def __init__(self, dataset: Any, size: int) -> None:
        self.dataset = dataset
        self._size = size

    def __len__(self) -> int:
        return min(self._size, len(self.dataset))

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "dataset" not in self.__dict__:  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set attributes of the dataset itself: a hook that replaces its pipeline finds this object instead."""
        if name in ("dataset", "_size"):
            super().__setattr__(name, value)
        else:
            setattr(self.dataset, name, value)


def build_train_stream(
    cfg: Any,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    per_sample: bool = True,
    path: str = "train_dataloader",
) -> Stream:
    """Build the training stream of a config's data loader.

    A dict gives a `TrainStream`, or an `IterableStream` if its dataset is iterable-style. Its ``dataset`` is an object
    or a dict for ``DATASETS``. Any other iterable object gives a `ForeignStream`. A stream is returned as it is.

    Raises:
        ConfigError: an unknown or contradicting key, an empty dataset, a batch that the dataset cannot fill.
    """
    if isinstance(cfg, Stream):
        return cfg
    context = {"seed": seed, "rank": rank, "world_size": world_size, "per_sample": per_sample, "path": path}
    if not isinstance(cfg, Mapping):
        return ForeignStream(_iterable(cfg, path), **context)
    options = _arguments(cfg, context)
    if not is_iterable_style(options["dataset"]):
        return TrainStream(**options)
    return IterableStream(**_without_order(options))


def build_eval_loader(
    cfg: Any,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    per_sample: bool = True,
    path: str = "val_dataloader",
) -> Any:
    """Build the loader of a validation or test: an `EvalLoader`, or an `IterableEvalLoader`.

    An iterable object that is not a dict is returned as it is.

    Raises:
        ConfigError: see `build_train_stream`.
    """
    if not isinstance(cfg, Mapping):
        return _iterable(cfg, path)
    context = {"seed": seed, "rank": rank, "world_size": world_size, "per_sample": per_sample, "path": path}
    options = _arguments(cfg, context)
    if not is_iterable_style(options["dataset"]):
        return EvalLoader(**options)
    return IterableEvalLoader(**_without_order(options))


def _arguments(cfg: Mapping[str, Any], context: dict[str, Any]) -> dict[str, Any]:
    """Check a loader's dict and return the arguments with the dataset built."""
    path = context["path"]
    for name in cfg:
        if name not in DATALOADER_KEYS:
            raise unknown_key(name, set(DATALOADER_KEYS), path=path)
    for name in ("dataset", "batch_size"):
        if cfg.get(name) is None:
            raise ConfigError(f"{path}.{name}: missing; {path} needs at least dataset=... and batch_size=...")
    if cfg.get("batch_sampler") is not None:
        raise ConfigError(
            f"{path}.batch_sampler: a batch sampler has no position to resume from; use sampler=... and "
            f"batch_size=..., or set {path} to a torch DataLoader object, whose epoch a resume reads from the start"
        )
    options = {name: cfg[name] for name in cfg if name not in ("batch_sampler", "num_batch_per_epoch")} | context
    dataset = build(DATASETS, options["dataset"], path=f"{path}.dataset")
    if hasattr(dataset, "full_init"):
        dataset.full_init()  # an MMEngine dataset with lazy_init: read once here instead of in every worker
    limit = cfg.get("num_batch_per_epoch")
    if limit is not None and not is_iterable_style(dataset):
        dataset = SlicedDataset(dataset, limit * options["batch_size"] * context["world_size"])
    options["dataset"] = dataset
    if options.get("worker_init_fn") is not None:
        options["worker_init_fn"] = _worker_init_fn(options["worker_init_fn"], options, path=f"{path}.worker_init_fn")
    return options


def _worker_init_fn(cfg: Any, options: Mapping[str, Any], *, path: str) -> Callable[[int], Any]:
    """Return the function, with the arguments that MMEngine gives it: the number of workers, the rank and the seed."""
    if isinstance(cfg, str):
        cfg = {"type": cfg}
    if not isinstance(cfg, Mapping):
        return cfg  # type: ignore[no-any-return]
    function = resolve(FUNCTIONS, cfg.get("type"), path=path)
    offered = {"num_workers": options.get("num_workers", 0), "rank": options["rank"], "seed": options["seed"]}
    known = inspect.signature(function).parameters
    given = {name: value for name, value in cfg.items() if name != "type"}
    return partial(function, **{name: value for name, value in offered.items() if name in known} | given)


def _without_order(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of an iterable dataset, without those that would decide its order.

    Raises:
        ConfigError: a sampler or ``shuffle=True``.
    """
    for name in ("sampler", "shuffle"):
        if options.get(name):
            kind = type(options["dataset"]).__name__
            raise ConfigError(
                f"{options['path']}.{name}: {kind} is iterable-style and decides its order itself; leave {name} out"
            )
    return {name: value for name, value in options.items() if name not in ("sampler", "shuffle")}


def _iterable(source: Any, path: str) -> Any:
    if not hasattr(source, "__iter__") or isinstance(source, str):
        raise ConfigError(f"{path}: found {source!r}, expected a dict with dataset=..., or an iterable of batches")
    return source
