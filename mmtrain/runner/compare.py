"""Compares this run with the one that saved a checkpoint: what changed, and what that means.

Each difference has one class. *No effect*: intervals, workers, logging. *Honoured*: today's value is used from the
current position on (learning rate, weight decay, schedules, the run's length). *Rescaled*: iterations are recounted
from samples (batch size, number of processes, accumulation; see `geometry`). *Refused*: the run could not continue as
the same run (optimizer type, another dataset; a changed model is found when its weights do not fit).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mmtrain.errors import CheckpointError
from mmtrain.printable import printable

# The longest matching prefix of a dotted config path decides. Other paths are the user's own variables.
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


def flat_config(cfg: Any) -> dict[str, str]:
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
            lines.append(printable(f"{path}: {_shown(before)} -> {_shown(after)} ({kind})"))
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


def check_same_optimizer(saved: str, today: str) -> None:
    """Raise CheckpointError when the optimizer's type differs from the checkpoint's."""
    if saved and saved != today:
        raise CheckpointError(
            f"optim_wrapper.optimizer is {today}, but this checkpoint was saved with {saved}, whose state {today} "
            "cannot use. Use the same optimizer, or start from the weights alone: resume=False, load_from=<checkpoint>"
        )


def seed_warnings(saved: int | None, today: int) -> list[str]:
    """The warning for a run that continues with another seed than the checkpoint's."""
    if saved is None or saved == today:
        return []
    return [
        f"THE SEED CHANGED from {saved} to {today}: the data order changes from here on, so samples of this epoch may "
        f"be repeated or skipped. To continue the original run, set randomness=dict(seed={saved})."
    ]
