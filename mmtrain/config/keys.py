"""The keys of a config: their names, the values they may have, and which other names look like a typing error."""

import numbers
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from mmtrain.launchers import LAUNCHERS
from mmtrain.suggest import letters_off


class ValueSpec(NamedTuple):
    """Which values a key may have: in words, after "expected", and as a test."""

    text: str
    accepts: Callable[[Any], bool]


def _is(text: str, *types: type, none: bool = False, objects: bool = False) -> ValueSpec:
    """Instances of ``types`` (a bool is not an int); with ``objects``, anything that is not plain Python data too."""
    plain = (str, bytes, bool, int, float, complex, list, tuple, set, dict, type)

    def accepts(value: Any) -> bool:
        if value is None:
            return none
        if isinstance(value, bool):
            return bool in types
        return isinstance(value, types) or (objects and not isinstance(value, plain))

    return ValueSpec(f"{text} or None" if none else text, accepts)


def _integer(text: str, *, least: int, none: bool = False) -> ValueSpec:
    def accepts(value: Any) -> bool:
        if value is None:
            return none
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least

    return ValueSpec(f"{text} or None" if none else text, accepts)


def _one_of(*values: str) -> ValueSpec:
    return ValueSpec(" or ".join(map(repr, values)), lambda value: value in values)


def _is_seconds(value: Any) -> bool:
    if value is None or isinstance(value, timedelta):
        return True
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) < float("inf")


def _is_pairs_of_text(value: Any) -> bool:
    def is_pair(pair: Any) -> bool:
        return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(part, str) for part in pair)

    return isinstance(value, (list, tuple)) and all(map(is_pair, value))


_ANY = ValueSpec("anything", lambda value: True)
_NUMBER = _integer("an integer of 0 or more", least=0)
_BOOL = _is("True or False", bool)
_PART = _is("a dict with `type`", dict, none=True, objects=True)
_PARTS = _is("a dict with `type` or a list of them", dict, list, tuple, none=True, objects=True)
_SECTION = _is("a dict", dict, none=True)
_LOADER = _is("a dict", dict, none=True, objects=True)
_TEXT = _is("a string", str, none=True)
_PATH = _is("a path", str, Path, none=True)
_COUNT = _integer("a positive integer", least=1, none=True)
_NAME = ValueSpec("a name, a class or a function", lambda value: isinstance(value, str) or callable(value))

# The top-level keys of a config. Any other top-level name is a variable.
KEYS: dict[str, ValueSpec] = {
    "model": _is("a dict with `type`", dict, objects=True),
    "train_dataloader": _LOADER,
    "val_dataloader": _LOADER,
    "test_dataloader": _LOADER,
    "train_cfg": _LOADER,
    "val_cfg": _LOADER,
    "test_cfg": _LOADER,
    "val_evaluator": _PARTS,
    "test_evaluator": _PARTS,
    "optim_wrapper": _PART,
    "param_scheduler": _PARTS,
    "default_hooks": _SECTION,
    "custom_hooks": _is("a list of dicts with `type`", list, tuple, none=True),
    "env_cfg": _SECTION,
    "randomness": _SECTION,
    "launcher": _one_of(*LAUNCHERS),
    "log_level": _is("a logging level, by name or number", str, int),
    "log_processor": _SECTION,
    "visualizer": _PART,
    "load_from": _PATH,
    "load_options": _SECTION,
    "resume": _is("True, False, 'auto' or the path of a checkpoint", bool, str),
    "resume_data": ValueSpec(
        "'continue', 'restart' or dict(skip_iters=k) with an integer k of 0 or more",
        lambda value: (
            set(value) == {"skip_iters"} and _NUMBER.accepts(value["skip_iters"])
            if isinstance(value, dict)
            else value in (None, "continue", "restart")
        ),
    ),
    "work_dir": _PATH,
    "experiment_name": _TEXT,
    "default_scope": _TEXT,
    "custom_imports": _SECTION,
    "strategy": _PART,
    "compile": _is("True, False or a dict", bool, dict, none=True),
    "runner_type": _NAME,
    "auto_scale_lr": _SECTION,
}

_EVAL_CFG = {"type": _NAME, "fp16": _BOOL}
DATALOADER_KEYS = {
    "dataset": _is("a dict with `type`", dict, objects=True),
    "batch_size": _COUNT,
    "num_workers": _NUMBER,
    "sampler": _PART,
    "batch_sampler": _PART,
    "shuffle": _is("True or False", bool, none=True),
    "drop_last": _BOOL,
    "collate_fn": ValueSpec(
        "a dict with `type`, a name or a function",
        lambda value: value is None or isinstance(value, (dict, str)) or callable(value),
    ),
    "pin_memory": _is("True or False", bool, none=True),
    "prefetch_factor": _COUNT,
    "persistent_workers": _is("True or False", bool, none=True),
    "worker_init_fn": _ANY,
    "timeout": _ANY,
    "multiprocessing_context": _ANY,
    "num_batch_per_epoch": _COUNT,
}

# The keys of the sections that are not the arguments of a class. `optim_wrapper` has those of its class too.
SECTIONS: dict[str, dict[str, ValueSpec]] = {
    "train_cfg": {
        "type": _NAME,
        "by_epoch": _is("True or False", bool, none=True),
        "max_epochs": _COUNT,
        "max_iters": _COUNT,
        "val_begin": _NUMBER,
        "val_interval": _integer("a positive integer", least=1),
        "dynamic_intervals": _is("a list of (begin, interval) pairs", list, tuple, none=True),
        "flush_at_epoch_end": _BOOL,
        "nonfinite": _one_of("stop", "skip"),
        "ledger": _BOOL,
    },
    "val_cfg": _EVAL_CFG,
    "test_cfg": _EVAL_CFG,
    "randomness": {
        "seed": _integer("an integer of 0 or more", least=0, none=True),
        "deterministic": _BOOL,
        "diff_rank_seed": _BOOL,
        "per_sample": _BOOL,
        "positional": _BOOL,
    },
    "env_cfg": {
        "cudnn_benchmark": _BOOL,
        "mp_cfg": _SECTION,
        "dist_cfg": _SECTION,
        "resource_limit": _integer("a positive integer", least=1, none=True),
        "timeout": ValueSpec("seconds, or 0 or None for no limit", _is_seconds),
    },
    "load_options": {
        "revise_keys": ValueSpec("a list of (pattern, replacement) pairs of strings", _is_pairs_of_text),
        "allow_mismatch": _BOOL,
        "verify": _one_of("full", "size"),
    },
    "auto_scale_lr": {"enable": _BOOL, "base_batch_size": _COUNT, "rule": _TEXT},
    "log_processor": dict.fromkeys(
        ("type", "window_size", "by_epoch", "custom_cfg", "num_digits", "log_with_hierarchy", "mean_pattern"), _ANY
    ),
    "compile": dict.fromkeys(("disable", "fullgraph", "dynamic", "backend", "mode", "options", "target"), _ANY),
    "custom_imports": {
        "imports": _is("a module's name or a list of them", str, list, tuple),
        "allow_failed_imports": _BOOL,
    },
    "train_dataloader": DATALOADER_KEYS,
    "val_dataloader": DATALOADER_KEYS,
    "test_dataloader": DATALOADER_KEYS,
    "optim_wrapper": {"type": _NAME, "optimizer": _PART, "constructor": _NAME, "paramwise_cfg": _SECTION},
}

# Names, in MMEngine and here, of the one loop for each task. Any other `type` is a loop that the user wrote.
LOOP_NAMES = ("EpochBasedTrainLoop", "IterBasedTrainLoop", "TrainLoop", "ValLoop", "TestLoop")

# The hooks of every run, by name in `default_hooks`. An entry without `type` changes the arguments of one of these.
DEFAULT_HOOKS = {
    "runtime_info": "RuntimeInfoHook",
    "timer": "IterTimerHook",
    "sampler_seed": "DistSamplerSeedHook",
    "logger": "LoggerHook",
    "progress": "ProgressBarHook",
    "param_scheduler": "ParamSchedulerHook",
    "checkpoint": "CheckpointHook",
}


def misspelled_key(name: str, value: Any) -> str | None:
    """The key that a top-level name is a typing error of, or None for a variable.

    Strict on purpose, because to refuse a valid variable is worse than to miss a typing error: one letter off (two in
    keys of twelve letters or more), ignoring underscores and case. ``text_cfg``, ``models``, ``my_visualizer`` and
    ``MODEL`` are variables.
    """
    if name in KEYS or name.isupper() or name.startswith("_") or name.endswith("_"):
        return None
    letters = _letters(name)
    for key, kind in KEYS.items():
        if _looks_like(letters, _letters(key)) and (letters != _letters(key) + "s" or kind.accepts(value)):
            return key
    return None


def _letters(name: str) -> str:
    return name.replace("_", "").lower()


def _looks_like(name: str, key: str) -> bool:
    if name == key:
        return True
    distance = letters_off(name, key)
    if len(key) < 6 or key.endswith("cfg"):  # `text_cfg` is one letter from `test_cfg`: only swapped letters count
        return distance == 1 and sorted(name) == sorted(key)
    if key in name and name != key + "s":  # `val_dataloader_2`, `my_visualizer`, `compiled`
        return False
    return distance <= (2 if len(key) >= 12 else 1)


def is_named_sets(loaders: Any) -> bool:
    """Whether a ``val_dataloader`` holds several loaders by name: a dict of dicts that each have a ``dataset``."""
    if not isinstance(loaders, dict) or not loaders or "dataset" in loaders:
        return False
    return all(isinstance(loader, dict) and "dataset" in loader for loader in dict.values(loaders))
