"""Checks a whole config before anything in it is built.

`_CHECKS` has one function for each section. The dicts with ``type`` in the sections (here: parts) are all checked by
`_check_part`; what differs from kind to kind is in their `PartSpec`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mmtrain.config.dump import top_level
from mmtrain.config.keys import DEFAULT_HOOKS, KEYS, LOOP_NAMES, SECTIONS, ValueSpec, is_named_sets, misspelled_key
from mmtrain.registry import (
    DATA_SAMPLERS,
    DATASETS,
    EVALUATOR,
    FUNCTIONS,
    HOOKS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    STRATEGIES,
    TRANSFORMS,
    VISBACKENDS,
    VISUALIZERS,
    Registry,
    resolve,
)
from mmtrain.registry.arguments import arguments_of, check_arguments
from mmtrain.registry.names import LAZY, lazy_name
from mmtrain.source_lines import ConfigSource, config_error, positions, source_of
from mmtrain.suggest import did_you_mean


class PartSpec(NamedTuple):
    """How a kind of part, a dict with ``type``, is checked.

    Attributes:
        registry: Where its type is looked up.
        reserved: The arguments that the run fills in; None if these are unknown, so that none is reported as missing.
        extra: The keys that the run reads and the class does not take.
    """

    registry: Registry
    reserved: tuple[str, ...] | None = ()
    extra: tuple[str, ...] = ()


_HOOK = PartSpec(HOOKS, extra=("priority",))
_MODEL = PartSpec(MODELS)
_DATASET = PartSpec(DATASETS)
_INNER_DATASET = PartSpec(DATASETS, reserved=None)
_TRANSFORM = PartSpec(TRANSFORMS, reserved=None)
_SAMPLER = PartSpec(DATA_SAMPLERS, reserved=None)
_COLLATE = PartSpec(FUNCTIONS, reserved=None)
_SCHEDULE = PartSpec(PARAM_SCHEDULERS, reserved=("optimizer", "param_name"), extra=("convert_to_iter_based",))
_OPTIMIZER = PartSpec(OPTIMIZERS, reserved=("params",))
_OPTIM_WRAPPER = PartSpec(OPTIM_WRAPPERS, reserved=("optimizer",), extra=tuple(SECTIONS["optim_wrapper"]))
_STRATEGY = PartSpec(STRATEGIES, reserved=None)
_VISUALIZER = PartSpec(VISUALIZERS, extra=("name", "save_dir"))
_BACKEND = PartSpec(VISBACKENDS, reserved=("save_dir",))
_METRIC = PartSpec(METRICS)
_EVALUATOR = PartSpec(EVALUATOR)


def check_config(cfg: Any, *, source: ConfigSource | None = None) -> None:
    """Check the keys, sections, types and arguments of a config, as far as they are known before building.

    ``source`` says where the values were written; by default it is what `load_config` read.

    Raises ConfigError for the first mistake: its dotted path, file and line if they are known, and the nearest valid
    name.
    """
    found = source or source_of(cfg)
    with positions(found):
        members = top_level(cfg)
        _check_names(members, found)
        for name, value in members.items():
            if name in KEYS:
                _check_value(name, value, KEYS[name])
                if value is not None and name in _CHECKS:
                    _CHECKS[name](name, value)


def _check_names(members: Mapping[str, Any], source: ConfigSource | None) -> None:
    read = source.read if source is not None else set()
    for name, value in members.items():
        key = misspelled_key(str(name), value) if name not in read else None
        if key is not None:
            raise config_error(name, f"unknown key; did you mean {key!r}? If this is a variable, give it another name")


def _check_value(path: str, value: Any, spec: ValueSpec) -> None:
    if not isinstance(value, LAZY) and not spec.accepts(value):
        raise config_error(path, f"expected {spec.text}, found {value!r}")


def _section(path: str, value: Any, *, more: tuple[str, ...] = ()) -> None:
    """A section whose keys are in SECTIONS; those in ``more`` are allowed too."""
    if not isinstance(value, Mapping):
        return
    section = path.partition(".")[0]
    keys = SECTIONS[section]
    for name, member in _items(value).items():
        if name in keys:
            _check_value(f"{path}.{name}", member, keys[name])
        elif name not in more and name != "_scope_":
            known = (*keys, *(name for name in more if name not in keys))
            hint = did_you_mean(name, known) or "."
            raise config_error(f"{path}.{name}", f"{section} has no key {name!r}{hint} Its keys: {', '.join(known)}")


# -- parts


def _items(value: Any) -> dict[str, Any]:
    """The members of a mapping; MMEngine's lazy objects are not imported."""
    return dict(dict.items(value)) if isinstance(value, dict) else dict(value)


def _check_part(path: str, value: Any, spec: PartSpec) -> None:
    """Look up the type of a dict and check its arguments. Anything but a dict passes."""
    if not isinstance(value, Mapping):
        return
    args = _items(value)
    type_ = args.pop("type", None)
    scope = args.pop("_scope_", None)
    if type_ is None:
        raise config_error(path, "expected a dict with `type`; `type` is missing")
    target = resolve(spec.registry, type_, path=f"{path}.type", scope=scope)
    check_arguments(target, args, path=path, reserved=spec.reserved, extra=spec.extra)


def _check_parts(path: str, value: Any, spec: PartSpec) -> None:
    """Check one part, or a list of them."""
    if isinstance(value, (list, tuple)):
        for index, member in enumerate(value):
            _refuse_plain_value(f"{path}[{index}]", member)
            _check_part(f"{path}[{index}]", member, spec)
    else:
        _check_part(path, value, spec)


def _refuse_plain_value(path: str, value: Any) -> None:
    """Refuse a string, a number or a list where a dict with ``type``, or an object, is expected."""
    if value is None or isinstance(value, (str, bool, int, float, type, list, tuple)):
        raise config_error(path, f"expected a dict with `type`, found {value!r}")


# -- sections


def _model(path: str, value: Any) -> None:
    _check_part(path, value, _MODEL)
    preprocessor = _items(value).get("data_preprocessor") if isinstance(value, Mapping) else None
    if isinstance(preprocessor, Mapping) and "type" in preprocessor:
        _check_part(f"{path}.data_preprocessor", preprocessor, _MODEL)


def _default_hooks(path: str, value: Any) -> None:
    for name, hook in _items(value).items():
        here = f"{path}.{name}"
        if hook is None:
            continue
        _refuse_plain_value(here, hook)
        if isinstance(hook, Mapping) and "type" not in hook:
            if name not in DEFAULT_HOOKS:
                hint = did_you_mean(name, DEFAULT_HOOKS) or "."
                raise config_error(here, f"{name!r} is not a default hook{hint} A hook of your own needs `type`")
            _check_part(here, {"type": DEFAULT_HOOKS[name], **_items(hook)}, _HOOK)
        else:
            _check_part(here, hook, _HOOK)


def _custom_hooks(path: str, value: Any) -> None:
    _check_parts(path, value, _HOOK)


def _loader(path: str, value: Any) -> None:
    if is_named_sets(value):
        for name, loader in _items(value).items():
            _loader(f"{path}.{name}", loader)
        return
    _section(path, value)
    if not isinstance(value, Mapping):
        return
    members = _items(value)
    _dataset(f"{path}.dataset", members.get("dataset"), strict=True)
    _check_part(f"{path}.sampler", members.get("sampler"), _SAMPLER)
    _check_part(f"{path}.batch_sampler", members.get("batch_sampler"), _SAMPLER)
    collate = members.get("collate_fn")
    if isinstance(collate, (str, *LAZY)):
        resolve(FUNCTIONS, collate, path=f"{path}.collate_fn")
    _check_part(f"{path}.collate_fn", collate, _COLLATE)


def _dataset(path: str, value: Any, *, strict: bool = False) -> None:
    """A dataset, and the datasets and transforms inside it.

    Inner ones with an unknown name are left to the outer dataset, which may look them up in its own registry.
    """
    if isinstance(value, (list, tuple)):
        for index, member in enumerate(value):
            _dataset(f"{path}[{index}]", member)
        return
    if not isinstance(value, Mapping) or (not strict and not _known(value, DATASETS)):
        return
    _check_part(path, value, _DATASET if strict else _INNER_DATASET)
    members = _items(value)
    for name in ("dataset", "datasets"):
        _dataset(f"{path}.{name}", members.get(name))
    pipeline = members.get("pipeline")
    for index, transform in enumerate(pipeline if isinstance(pipeline, (list, tuple)) else ()):
        if _known(transform, TRANSFORMS):
            _check_part(f"{path}.pipeline[{index}]", transform, _TRANSFORM)


def _known(value: Any, registry: Registry) -> bool:
    """Whether the type of an inner dict is a class already or a registered name."""
    type_ = _items(value).get("type") if isinstance(value, Mapping) else None
    if isinstance(type_, str):
        return registry.registered(type_) is not None or type_ in registry.root.module_dict
    return callable(type_)


def _loop(path: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        return
    type_ = _items(value).get("type")
    more: tuple[str, ...] = ()
    if type_ is not None:
        _check_value(f"{path}.type", type_, SECTIONS[path]["type"])
    if type_ is not None and _short_name(type_) not in LOOP_NAMES:
        takes = arguments_of(resolve(LOOPS, type_, path=f"{path}.type"))
        more = takes.names + (tuple(_items(value)) if takes.anything else ())
    _section(path, value, more=more)
    if path == "train_cfg" and value.get("max_epochs") is not None and value.get("max_iters") is not None:
        raise config_error(f"{path}.max_iters", "train_cfg has both max_epochs and max_iters; remove one of them")


def _evaluator(path: str, value: Any) -> None:
    if isinstance(value, Mapping) and "type" not in value:
        for name, evaluator in _items(value).items():
            if evaluator is not None:
                _must_be_evaluator(f"{path}.{name}", evaluator)
                _evaluator(f"{path}.{name}", evaluator)
        return
    if isinstance(value, Mapping) and _is_evaluator(_items(value)):
        _check_part(path, value, _EVALUATOR)
        _check_parts(f"{path}.metrics", _items(value).get("metrics"), _METRIC)
    else:
        _check_parts(path, value, _METRIC)


def _must_be_evaluator(path: str, value: Any) -> None:
    if not isinstance(value, (list, tuple)):
        _refuse_plain_value(path, value)


def _is_evaluator(members: Mapping[str, Any]) -> bool:
    short = _short_name(members["type"])
    return (
        "metrics" in members
        or short == "Evaluator"
        or (METRICS.registered(short) is None and EVALUATOR.registered(short) is not None)
    )


def _short_name(type_: Any) -> str:
    """The last part of the name of a type, which may be a string, a class or lazy; nothing is imported."""
    name = lazy_name(type_) if isinstance(type_, LAZY) else getattr(type_, "__name__", str(type_))
    return name.rpartition(".")[2]


def _optim_wrapper(path: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        return
    members = _items(value)
    constructor = members.get("constructor")
    if constructor is not None:
        resolve(OPTIM_WRAPPER_CONSTRUCTORS, constructor, path=f"{path}.constructor")
        if members.get("optimizer") is None:  # one wrapper for each part of the model, by name
            return
    keys = SECTIONS["optim_wrapper"]
    for name, member in members.items():
        if name in keys:
            _check_value(f"{path}.{name}", member, keys[name])
    _check_part(path, {"type": "OptimWrapper", **members}, _OPTIM_WRAPPER)
    _check_part(f"{path}.optimizer", members.get("optimizer"), _OPTIMIZER)


def _schedules(path: str, value: Any) -> None:
    """A schedule, a list of them, or a dict of lists by the name of the optimizer."""
    members = _items(value) if isinstance(value, Mapping) and "type" not in value else {}
    if members and all(isinstance(member, (Mapping, list, tuple)) for member in members.values()):
        for name, member in members.items():
            _check_parts(f"{path}.{name}", member, _SCHEDULE)
    else:
        _check_parts(path, value, _SCHEDULE)


def _env_cfg(path: str, value: Any) -> None:
    _section(path, value)
    options = _items(value).get("dist_cfg") or {}
    if isinstance(options, Mapping) and "timeout" in options:
        if "timeout" in value:
            raise config_error(f"{path}.dist_cfg.timeout", "is the same setting as env_cfg.timeout; remove one of them")
        _check_value(f"{path}.dist_cfg.timeout", options["timeout"], SECTIONS["env_cfg"]["timeout"])


def _visualizer(path: str, value: Any) -> None:
    _check_part(path, value, _VISUALIZER)
    if isinstance(value, Mapping):
        _check_parts(f"{path}.vis_backends", _items(value).get("vis_backends"), _BACKEND)


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "model": _model,
    "train_dataloader": _loader,
    "val_dataloader": _loader,
    "test_dataloader": _loader,
    "train_cfg": _loop,
    "val_cfg": _loop,
    "test_cfg": _loop,
    "val_evaluator": _evaluator,
    "test_evaluator": _evaluator,
    "optim_wrapper": _optim_wrapper,
    "param_scheduler": _schedules,
    "default_hooks": _default_hooks,
    "custom_hooks": _custom_hooks,
    "env_cfg": _env_cfg,
    "randomness": _section,
    "log_processor": _section,
    "visualizer": _visualizer,
    "custom_imports": _section,
    "strategy": lambda path, value: _check_part(path, value, _STRATEGY),
    "compile": _section,
    "auto_scale_lr": _section,
    "load_options": _section,
}
