"""Compares today's run with the one a checkpoint was saved by: what changed, and what that means.

Each difference has one class. *No effect*: intervals, workers, logging. *Honoured*: today's value rules, from today's
position on (learning rate, weight decay, schedules, the run's length). *Rescaled*: iterations are counted anew from
samples (batch size, number of processes, accumulation). *Refused*: the run could not go on as the same run (optimizer
type, another data set; a changed model is found when its weights do not fit).
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from mmtrain.errors import CheckpointError
from mmtrain.progress import Progress

# The longest prefix of a dotted config path decides. Paths under no prefix are the user's own variables.
_CLASSES = {
    "train_dataloader": "honoured",
    "train_dataloader.num_workers": "no effect",
    "train_dataloader.prefetch_factor": "no effect",
    "train_dataloader.pin_memory": "no effect",
    "train_dataloader.persistent_workers": "no effect",
    "train_dataloader.timeout": "no effect",
    "train_dataloader.batch_size": "rescaled",
    "optim_wrapper": "honoured",
    "optim_wrapper.accumulative_counts": "rescaled",
    "param_scheduler": "honoured",
    "auto_scale_lr": "honoured",
    "train_cfg": "honoured",
    "train_cfg.val_interval": "no effect",
    "train_cfg.val_begin": "no effect",
    "randomness": "honoured",
    "model": "honoured",
    "custom_hooks": "honoured",
    "compile": "honoured",
    "strategy": "honoured",
    "default_hooks": "honoured",
    "default_hooks.runtime_info": "no effect",
    "default_hooks.timer": "no effect",
    "default_hooks.sampler_seed": "no effect",
    "default_hooks.logger": "no effect",
    "default_hooks.progress": "no effect",
    "default_hooks.checkpoint": "no effect",
    "val_dataloader": "no effect",
    "val_evaluator": "no effect",
    "val_cfg": "no effect",
    "visualizer": "no effect",
    "log_level": "no effect",
    "env_cfg": "no effect",
}


@dataclass(frozen=True, slots=True)
class Scale:
    """How a run counts: samples of one iteration over all ranks, micro-batches of one update, length of a pass."""

    global_batch: int | None
    accumulative_counts: int = 1
    iterations_per_epoch: int | None = None

    @property
    def effective_batch(self) -> int | None:
        return None if self.global_batch is None else self.global_batch * self.accumulative_counts


def flatten(cfg: Any) -> dict[str, str]:
    """Dotted path to printed value, for every leaf of a config."""
    return dict(_leaves(cfg, ""))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) or hasattr(value, "items"):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    elif isinstance(value, type) or callable(value):
        yield path, getattr(value, "__qualname__", type(value).__qualname__).rsplit(".", maxsplit=1)[-1]
    else:
        text = str(value)
        yield path, text.rsplit(".", maxsplit=1)[-1] if path.endswith("type") else text


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """One line for each config value that differs and that the framework reads, with the class of the difference."""
    lines = []
    for path in sorted({*old, *new}):
        before, after = old.get(path), new.get(path)
        kind = _class_of(path)
        if before != after and kind is not None:
            lines.append(f"{path}: {_shown(before)} -> {_shown(after)} ({kind})")
    return lines


def _shown(value: str | None) -> str:
    if value is None:
        return "not set"
    return value if len(value) <= 60 else value[:57] + "..."


def _class_of(path: str) -> str | None:
    parts = path.replace("[", ".").split(".")
    for length in range(len(parts), 0, -1):
        found = _CLASSES.get(".".join(parts[:length]))
        if found is not None:
            return found
    return None


def rescale(progress: Progress, old: Scale, new: Scale, *, same_data: bool = True) -> Progress:
    """The same position counted at another global batch: samples stay, iterations are counted anew from them.

    ``iter_1500`` at 128 samples an iteration is iteration 3000 at 64: the same share of the pass and of the run.
    ``same_data`` is False where the passes of ``new`` are over another data set.
    """
    if old.global_batch == new.global_batch or not old.global_batch or not new.global_batch:
        return progress
    in_epoch = math.ceil(progress.offset / new.global_batch)
    before, after = old.iterations_per_epoch, new.iterations_per_epoch
    if before is None or after is None:
        iteration = round(progress.samples / new.global_batch)
    elif same_data and progress.iteration == progress.epoch * before + progress.epoch_iteration:
        iteration = progress.epoch * after + in_epoch
    else:  # passes of other data, or of another batch, are among them
        iteration = round(progress.iteration * old.global_batch / new.global_batch)
    skipped = round(progress.skipped * old.global_batch / new.global_batch)
    return replace(progress, iteration=iteration, epoch_iteration=in_epoch, skipped=skipped)


def scale_lines(old: Scale, new: Scale, *, lr: float | None) -> tuple[list[str], list[str]]:
    """What to say of a changed batch: (lines to log, warnings)."""
    if old == new or old.effective_batch is None or new.effective_batch is None:
        return [], []
    told = (
        f"global batch {old.global_batch} x accumulation {old.accumulative_counts} -> "
        f"{new.global_batch} x {new.accumulative_counts}"
    )
    if old.effective_batch == new.effective_batch:
        if old.global_batch == new.global_batch:
            return [], []
        return [f"{told}: the effective batch stays {new.effective_batch}, so the two are equivalent (rescaled)."], []
    ratio = new.effective_batch / old.effective_batch
    advice = ""
    if lr is not None:
        advice = (
            f" The config's lr {lr:g} is used as it is; the linear rule would make it {lr * ratio:g}, "
            f"the square-root rule {lr * math.sqrt(ratio):g}."
        )
    return [], [
        f"THE EFFECTIVE BATCH CHANGED from {old.effective_batch} to {new.effective_batch} samples an update ({told}, "
        f"rescaled).{advice}"
    ]


def refuse_other_optimizer(saved: str, own: str) -> None:
    """Raise CheckpointError when the optimizer's type differs from the checkpoint's."""
    if saved and saved != own:
        raise CheckpointError(
            f"optim_wrapper.optimizer is {own}, the checkpoint's run used {saved}, whose state {own} cannot continue "
            "(refused). Use the same optimizer, or begin anew from the weights: resume=False, load_from=<checkpoint>"
        )


def refuse_other_data(saved: str, own: str) -> None:
    """Raise CheckpointError when the data differ from the checkpoint's."""
    if saved and not same_data(saved, own):
        raise CheckpointError(
            f"the training data differ from the checkpoint's (fingerprint {saved} -> {own}): its position says nothing "
            "of them (refused). Give the same data, or say what to do: resume_data='restart' begins the new data "
            "from the start, resume_data=dict(skip_iters=k) skips k iterations of them"
        )


def seed_lines(saved: int | None, own: int) -> list[str]:
    """The warning of a run that goes on with another seed than the checkpoint's."""
    if saved is None or saved == own:
        return []
    return [
        f"THE SEED CHANGED from {saved} to {own}: from here on the data come in another order, so that samples of this "
        f"epoch may come twice or not at all. To go on as the run that was stopped: randomness=dict(seed={saved})."
    ]


def switched_before(saved: Mapping[str, str], today: Mapping[str, str]) -> bool:
    """Whether the run that saved a checkpoint was asked by ``resume_data`` for the same, of the same data set.

    It has done it, then, and its position counts: the same command goes on after a stop. Both are from `flatten`.
    """
    kept = ("resume_data", "train_dataloader.dataset")
    asked = [{path: value for path, value in values.items() if path.startswith(kept)} for values in (saved, today)]
    return asked[0] == asked[1]


def switch_data(progress: Progress, choice: Any, scale: Scale) -> Progress:
    """The position after ``resume_data``: "continue", "restart", or ``dict(skip_iters=k)``.

    The data are entered at the beginning of the pass that the run is in, or k iterations behind it.
    """
    if choice in (None, "continue"):
        return progress
    if choice == "restart":
        return replace(progress, offset=0, epoch_iteration=0)
    if isinstance(choice, Mapping) and set(choice) == {"skip_iters"}:
        skip = int(choice["skip_iters"])
        per_epoch = scale.iterations_per_epoch
        passes, rest = divmod(skip, per_epoch) if per_epoch else (0, skip)
        epoch = progress.epoch + passes
        return replace(progress, epoch=epoch, offset=rest * (scale.global_batch or 0), epoch_iteration=rest)
    raise CheckpointError(f"resume_data is {choice!r}; expected 'continue', 'restart' or dict(skip_iters=k)")


def same_data(saved: str, own: str) -> bool:
    """Whether two fingerprints are of the same data. One that says only a wrapper's class and length is believed."""
    plain = own.rpartition("/")[0]
    return saved == own or (saved == plain and re.fullmatch(r".+:(\d+|unknown)/[0-9a-f]{32}", own) is not None)


def data_fingerprint(dataset: Any) -> str:
    """What identifies a data set: its own ``fingerprint()`` where it has one, else its class and length.

    To these a data set that wraps others (``datasets`` or ``dataset``, as ConcatDataset and Subset call them) adds a
    hash of what it holds, where that has a ``fingerprint()``.
    """
    own = getattr(dataset, "fingerprint", None)
    if callable(own):
        return str(own())
    parts = _wrapped(dataset)
    inside = [data_fingerprint(part) for part in parts]
    if inside == [_class_and_length(part) for part in parts]:
        return _class_and_length(dataset)
    return f"{_class_and_length(dataset)}/{xxhash.xxh3_128_hexdigest(repr(inside).encode())}"


def _wrapped(dataset: Any) -> list[Any]:
    several = getattr(dataset, "datasets", None)
    if isinstance(several, (list, tuple)):
        return list(several)
    one = getattr(dataset, "dataset", None)
    return [] if one is None else [one]


def _class_and_length(dataset: Any) -> str:
    try:
        length: int | str = len(dataset)
    except (TypeError, NotImplementedError):
        length = "unknown"
    return f"{type(dataset).__qualname__}:{length}"
