"""Checks the arguments of `CheckpointHook` before anything is run."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from os import PathLike
from typing import Any

from mmtrain.checkpoint.foreign.export import PUBLISHED
from mmtrain.errors import ConfigError

_WHERE = "default_hooks.checkpoint"
_COUNTS = ("keep_every", "weights_interval")
_FLAGS = ("save_optimizer", "save_param_scheduler", "save_last", "save_frozen", "async_save")
_NAMES = ("save_best", "rule", "greater_keys", "less_keys", "published_keys")


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first invalid argument, by name."""
    interval = given["interval"]
    if interval is not None and (not _is_integer(interval) or interval == 0 or interval < -1):
        raise _wrong(given, "interval", "a positive integer, -1 for none, or None for one that fits the run")
    if not _is_integer(given["save_begin"]) or given["save_begin"] < 0:
        raise _wrong(given, "save_begin", "an integer of 0 or more")
    if given["max_keep_ckpts"] is not None and not _is_integer(given["max_keep_ckpts"]):
        raise _wrong(given, "max_keep_ckpts", "an integer, or -1 to keep all")
    for name in _COUNTS:
        if given[name] is not None and not (_is_integer(given[name]) and given[name] > 0):
            raise _wrong(given, name, "a positive integer")
    seconds = given["every_seconds"]
    if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0):
        raise _wrong(given, "every_seconds", "a positive number of seconds")
    for name in _FLAGS:
        if not isinstance(given[name], bool):
            raise _wrong(given, name, "True or False")
    if given["by_epoch"] is not None and not isinstance(given["by_epoch"], bool):
        raise _wrong(given, "by_epoch", "True, False, or None for the unit of the run")
    if given["out_dir"] is not None and not isinstance(given["out_dir"], (str, PathLike)):
        raise _wrong(given, "out_dir", "a directory")
    if given["on_save_error"] not in ("continue", "stop"):
        raise _wrong(given, "on_save_error", "'continue' or 'stop'")
    _check_template(given)
    _check_names(given)


def as_names(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """One name, several or none as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def _check_template(given: Mapping[str, Any]) -> None:
    template = given["filename_tmpl"]
    if template is None:
        return
    try:
        names = [template.format(number) for number in (1, 2, 1000)]
    except (AttributeError, IndexError, KeyError, ValueError):
        names = []
    if len({*names}) < 3:
        raise _wrong(given, "filename_tmpl", "a name with one {} for the number, as in 'iter_{}.pth'")
    if any("/" in name or "\\" in name or name.startswith(".") for name in names):
        raise _wrong(given, "filename_tmpl", "a name without / and without a leading dot (out_dir sets the directory)")


def _check_names(given: Mapping[str, Any]) -> None:
    for name in _NAMES:
        value = given[name]
        several = isinstance(value, Sequence) and all(isinstance(item, str) for item in value)
        if value is not None and not several:
            raise _wrong(given, name, "a name or a list of names")
    metrics, rules, published = (as_names(given[name]) for name in ("save_best", "rule", "published_keys"))
    if not {*published} <= {*PUBLISHED}:
        raise _wrong(given, "published_keys", f"some of {', '.join(PUBLISHED)}")
    if len({*metrics}) < len(metrics) or ("auto" in metrics and len(metrics) > 1):
        raise _wrong(given, "save_best", "each metric once, or 'auto' alone")
    if any(rule not in ("greater", "less") for rule in rules):
        raise _wrong(given, "rule", "'greater' or 'less'")
    if metrics and rules and len(rules) not in (1, len(metrics)):
        raise ConfigError(
            f"{_WHERE}.rule has {len(rules)} entries for {len(metrics)} metrics; expected one for each, or one for all"
        )


def _wrong(given: Mapping[str, Any], name: str, expected: str) -> ConfigError:
    return ConfigError(f"{_WHERE}.{name} is {given[name]!r}; expected {expected}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
