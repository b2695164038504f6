"""From the config of a data loader to the objects."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from mmtrain.data.eval_loader import EvalLoader, IterableEvalLoader
from mmtrain.data.iterable.stream import ForeignStream, IterableStream
from mmtrain.data.options import WorkerOptions, unknown_key
from mmtrain.data.stream import Stream, TrainStream, is_iterable_style
from mmtrain.errors import ConfigError
from mmtrain.registry import DATASETS, FUNCTIONS, build, resolve

# What a data loader's config may say; everything else is an error.
LOADER_KEYS = frozenset(
    {"dataset", "batch_size", "sampler", "batch_sampler", "shuffle", "drop_last", "collate_fn", "num_batch_per_epoch"}
    | {field.name for field in fields(WorkerOptions)}
)


class SlicedDataset:
    """The first ``size`` samples of a data set: ``num_batch_per_epoch``, MMEngine's way to make a pass short."""

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


def build_train_stream(
    cfg: Any,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    per_sample: bool = True,
    path: str = "train_dataloader",
) -> Stream:
    """Make the stream that a config's data loader means.

    A dict gives a `TrainStream`, or an `IterableStream` when its data set can only be iterated over; its ``dataset`` is
    an object or a dict for ``DATASETS``. Any other iterable object gives a `ForeignStream`; a stream is returned as
    it is.

    Raises:
        ConfigError: an unknown or contradicting key, an empty data set, a batch that the data set cannot fill.
    """
    if isinstance(cfg, Stream):
        return cfg
    place = {"seed": seed, "rank": rank, "world_size": world_size, "per_sample": per_sample, "path": path}
    if not isinstance(cfg, Mapping):
        return ForeignStream(_iterable(cfg, path), **place)
    options = _arguments(cfg, place)
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
    """Make the loader of a validation or test: an `EvalLoader`, or an `IterableEvalLoader`.

    An object that is no dict is returned as it is, if it can be iterated over.

    Raises:
        ConfigError: see `build_train_stream`.
    """
    if not isinstance(cfg, Mapping):
        return _iterable(cfg, path)
    place = {"seed": seed, "rank": rank, "world_size": world_size, "per_sample": per_sample, "path": path}
    options = _arguments(cfg, place)
    if not is_iterable_style(options["dataset"]):
        return EvalLoader(**options)
    return IterableEvalLoader(**_without_order(options))


def _arguments(cfg: Mapping[str, Any], place: dict[str, Any]) -> dict[str, Any]:
    """Check a loader's dict and return the arguments with the data set built."""
    path = place["path"]
    for name in cfg:
        if name not in LOADER_KEYS:
            raise unknown_key(name, set(LOADER_KEYS), path=path)
    for name in ("dataset", "batch_size"):
        if cfg.get(name) is None:
            raise ConfigError(f"{path}.{name}: missing; {path} needs at least dataset=... and batch_size=...")
    if cfg.get("batch_sampler") is not None:
        raise ConfigError(
            f"{path}.batch_sampler: a batch sampler has no position to resume from; give sampler=... and "
            f"batch_size=..., or make {path} a ready torch DataLoader, which is read again from its beginning on resume"
        )
    options = {name: cfg[name] for name in cfg if name not in ("batch_sampler", "num_batch_per_epoch")} | place
    dataset = build(DATASETS, options["dataset"], path=f"{path}.dataset")
    if hasattr(dataset, "full_init"):
        dataset.full_init()  # an MMEngine data set with lazy_init: read once here and not in every worker
    limit = cfg.get("num_batch_per_epoch")
    if limit is not None and not is_iterable_style(dataset):
        dataset = SlicedDataset(dataset, limit * options["batch_size"] * place["world_size"])
    options["dataset"] = dataset
    if options.get("worker_init_fn") is not None:
        options["worker_init_fn"] = _worker_init_fn(options["worker_init_fn"], options, path=f"{path}.worker_init_fn")
    return options


def _worker_init_fn(cfg: Any, options: Mapping[str, Any], *, path: str) -> Callable[[int], Any]:
    """Return the function, given what MMEngine gives it: the number of workers, the rank and the seed."""
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
    """Return the options of an iterable data set, which alone decides its order.

    Raises:
        ConfigError: a sampler or ``shuffle=True``.
    """
    for name in ("sampler", "shuffle"):
        if options.get(name):
            kind = type(options["dataset"]).__name__
            raise ConfigError(
                f"{options['path']}.{name}: found beside {kind}, which can only be iterated over and decides its order "
                "itself; leave it out"
            )
    return {name: value for name, value in options.items() if name not in ("sampler", "shuffle")}


def _iterable(source: Any, path: str) -> Any:
    if not hasattr(source, "__iter__") or isinstance(source, str):
        raise ConfigError(f"{path}: found {source!r}, expected a dict with dataset=..., or an iterable of batches")
    return source
