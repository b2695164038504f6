"""The parts of a config, its dicts with ``type``: where each kind's type is looked up, and how one is checked."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mmtrain.config.keys import SECTIONS
from mmtrain.registry import (
    DATA_SAMPLERS,
    DATASETS,
    EVALUATOR,
    FUNCTIONS,
    HOOKS,
    METRICS,
    MODELS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    STRATEGIES,
    VISBACKENDS,
    VISUALIZERS,
    Registry,
    resolve,
)
from mmtrain.registry.arguments import check_arguments
from mmtrain.source_lines import config_error


class Part(NamedTuple):
    """How a dict with ``type`` is checked: where its type is looked up, which arguments the run fills in (None: which
    is unknown, so that none is missing), and which keys are for the run and not for the class."""

    registry: Registry
    reserved: tuple[str, ...] | None = ()
    extra: tuple[str, ...] = ()


HOOK = Part(HOOKS, extra=("priority",))
MODEL = Part(MODELS)
DATASET = Part(DATASETS)
SAMPLER = Part(DATA_SAMPLERS, reserved=None)
COLLATE = Part(FUNCTIONS, reserved=None)
SCHEDULE = Part(PARAM_SCHEDULERS, reserved=("optimizer", "param_name"), extra=("convert_to_iter_based",))
OPTIMIZER = Part(OPTIMIZERS, reserved=("params",))
WRAPPER = Part(OPTIM_WRAPPERS, reserved=("optimizer",), extra=tuple(SECTIONS["optim_wrapper"]))
STRATEGY = Part(STRATEGIES, reserved=None)
VISUALIZER = Part(VISUALIZERS, extra=("name", "save_dir"))
BACKEND = Part(VISBACKENDS, reserved=("save_dir",))
METRIC = Part(METRICS)
METRICS_EVALUATOR = Part(EVALUATOR)


def items(value: Any) -> dict[str, Any]:
    """The members of a mapping, placeholders as they are."""
    return dict(dict.items(value)) if isinstance(value, dict) else dict(value)


def check_part(path: str, value: Any, part: Part) -> None:
    """Find the type of a dict and check its arguments; anything but a dict passes. Raises ConfigError."""
    if not isinstance(value, Mapping):
        return
    args = items(value)
    type_ = args.pop("type", None)
    scope = args.pop("_scope_", None)
    if type_ is None:
        raise config_error(path, "a dict that is to be built needs `type`")
    target = resolve(part.registry, type_, path=f"{path}.type", scope=scope)
    check_arguments(target, args, path=path, reserved=part.reserved, extra=part.extra)


def check_parts(path: str, value: Any, part: Part) -> None:
    """Check one dict with ``type``, or a list of them."""
    if isinstance(value, (list, tuple)):
        for index, member in enumerate(value):
            must_be_part(f"{path}[{index}]", member)
            check_part(f"{path}[{index}]", member, part)
    else:
        check_part(path, value, part)


def must_be_part(path: str, value: Any) -> None:
    """Raise ConfigError for a plain value where a dict with ``type`` or an object belongs."""
    if value is None or isinstance(value, (str, bool, int, float, type, list, tuple)):
        raise config_error(path, f"expected a dict with `type`, found {value!r}")
