"""The arguments of a data loader in two groups, checked once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from mmtrain.errors import ConfigError
from mmtrain.suggest import did_you_mean


@dataclass(frozen=True)
class LoaderContext:
    """What a loader knows of its run: the seed, and this rank among those that divide the data.

    ``path`` is the config key that errors name. ``per_sample`` seeds before each sample instead of before each batch.
    """

    seed: int
    rank: int = 0
    world_size: int = 1
    per_sample: bool = True
    path: str = "train_dataloader"


@dataclass(frozen=True)
class WorkerOptions:
    """The worker options of ``torch.utils.data.DataLoader``, with the same meanings.

    ``pin_memory=None`` pins if CUDA is available. Without any accelerator it is ignored.

    As in torch and MMEngine, each epoch (or validation) starts new workers, which get the dataset as it then is in the
    main process. With ``persistent_workers=True`` they are kept, and read ahead past the end of an epoch, as long as
    the main process has not changed the dataset or ``collate_fn`` (`workers.snapshot`).
    """

    num_workers: int = 0
    pin_memory: bool | None = None
    prefetch_factor: int | None = None
    persistent_workers: bool | None = None
    worker_init_fn: Callable[[int], Any] | None = None
    timeout: float = 0
    multiprocessing_context: Any = None

    def check(self, path: str) -> None:
        """Raise ConfigError for a value that is out of range or of the wrong type."""
        _check_integer(self.num_workers, f"{path}.num_workers", least=0)
        if self.prefetch_factor is not None:
            _check_integer(self.prefetch_factor, f"{path}.prefetch_factor", least=1)
        if self.timeout is None or self.timeout < 0:
            raise ConfigError(f"{path}.timeout: found {self.timeout!r}, expected seconds, or 0 for no limit")
        if self.worker_init_fn is not None and not callable(self.worker_init_fn):
            raise ConfigError(f"{path}.worker_init_fn: found {self.worker_init_fn!r}, expected a function")


def split_options(options: Mapping[str, Any], *, path: str) -> tuple[LoaderContext, WorkerOptions]:
    """Sort keyword arguments into the two groups.

    Raises:
        ConfigError: an unknown name, or an invalid value.
    """
    context_names = {field.name for field in fields(LoaderContext)}
    worker_names = {field.name for field in fields(WorkerOptions)}
    for name in options:
        if name not in context_names | worker_names:
            raise unknown_key(name, context_names | worker_names, path=path)
    workers = WorkerOptions(**{name: options[name] for name in worker_names & set(options)})
    context = LoaderContext(**{"path": path} | {name: options[name] for name in context_names & set(options)})
    workers.check(context.path)
    return context, workers


def unknown_key(name: str, known: set[str], *, path: str) -> ConfigError:
    """Return the error for a key that a loader does not take."""
    hint = did_you_mean(name, known) or f"; expected one of {', '.join(sorted(known))}"
    return ConfigError(f"{path}.{name}: unknown key{hint}")


def _check_integer(value: Any, path: str, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{path}: found {value!r}, expected an integer of at least {least}")
