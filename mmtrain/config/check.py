"""Checks a whole config before anything of it is built."""

from collections.abc import Callable, Mapping
from typing import Any

from mmtrain.config.dump import top_level
from mmtrain.config.keys import DEFAULT_HOOKS, KEYS, LOOP_NAMES, SECTIONS, Kind, misspelt, named_sets
from mmtrain.config.parts import (
    BACKEND,
    COLLATE,
    DATASET,
    HOOK,
    METRIC,
    METRICS_EVALUATOR,
    MODEL,
    OPTIMIZER,
    SAMPLER,
    SCHEDULE,
    STRATEGY,
    VISUALIZER,
    WRAPPER,
    Part,
    check_part,
    check_parts,
    items,
    must_be_part,
)  # fmt: skip
from mmtrain.registry import (
    DATASETS,
    EVALUATOR,
    FUNCTIONS,
    LOOPS,
    METRICS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    TRANSFORMS,
    Registry,
    resolve,
)
from mmtrain.registry.arguments import arguments_of
from mmtrain.registry.names import LAZY, lazy_name
from mmtrain.source_lines import Source, config_error, positions, source_of
from mmtrain.suggest import did_you_mean


def check_config(cfg: Any, *, source: Source | None = None) -> None:
    """Check every key, section, type and argument of a config that can be known before building.

    ``source`` says where its values were written; without it, what `load_config` noted is used.

    Raises ConfigError for the first fault, with dotted path, file and line when they are known, and the nearest valid
    name.
    """
    found = source or source_of(cfg)
    with positions(found):
        members = top_level(cfg)
        _check_names(members, found)
        for name, value in members.items():
            if name in KEYS:
                _check_kind(name, value, KEYS[name])
                if value is not None and name in _CHECKS:
                    _CHECKS[name](name, value)


def _check_names(members: Mapping[str, Any], source: Source | None) -> None:
    read = source.read if source is not None else set()
    for name, value in members.items():
        key = misspelt(str(name), value) if name not in read else None
        if key is not None:
            raise config_error(
                name, f"there is no such key; did you mean {key!r}? If it is a variable of your own, rename it"
            )


def _check_kind(path: str, value: Any, kind: Kind) -> None:
    if not isinstance(value, LAZY) and not kind.accepts(value):
        raise config_error(path, f"expected {kind.text}, found {value!r}")


def _section(path: str, value: Any, *, more: tuple[str, ...] = ()) -> None:
    """A section whose keys are listed in SECTIONS; ``more`` are allowed besides."""
    if not isinstance(value, Mapping):
        return
    section = path.partition(".")[0]
    keys = SECTIONS[section]
    for name, member in items(value).items():
        if name in keys:
            _check_kind(f"{path}.{name}", member, keys[name])
        elif name not in more and name != "_scope_":
            known = (*keys, *(name for name in more if name not in keys))
            hint = did_you_mean(name, known) or "."
            raise config_error(f"{path}.{name}", f"{section} has no key {name!r}{hint} It has: {', '.join(known)}")


# -- the sections


def _model(path: str, value: Any) -> None:
    check_part(path, value, MODEL)
    preprocessor = items(value).get("data_preprocessor") if isinstance(value, Mapping) else None
    if isinstance(preprocessor, Mapping) and "type" in preprocessor:
        check_part(f"{path}.data_preprocessor", preprocessor, MODEL)


def _default_hooks(path: str, value: Any) -> None:
    for name, hook in items(value).items():
        here = f"{path}.{name}"
        if hook is None:
            continue
        must_be_part(here, hook)
        if isinstance(hook, Mapping) and "type" not in hook:
            if name not in DEFAULT_HOOKS:
                hint = did_you_mean(name, DEFAULT_HOOKS)
                raise config_error(here, f"no default hook is named {name!r}, and there is no `type`{hint}")
            check_part(here, {"type": DEFAULT_HOOKS[name], **items(hook)}, HOOK)
        else:
            check_part(here, hook, HOOK)


def _custom_hooks(path: str, value: Any) -> None:
    check_parts(path, value, HOOK)


def _loader(path: str, value: Any) -> None:
    if named_sets(value):
        for name, loader in items(value).items():
            _loader(f"{path}.{name}", loader)
        return
    _section(path, value)
    if not isinstance(value, Mapping):
        return
    members = items(value)
    _dataset(f"{path}.dataset", members.get("dataset"), strict=True)
    check_part(f"{path}.sampler", members.get("sampler"), SAMPLER)
    check_part(f"{path}.batch_sampler", members.get("batch_sampler"), SAMPLER)
    collate = members.get("collate_fn")
    if isinstance(collate, (str, *LAZY)):
        resolve(FUNCTIONS, collate, path=f"{path}.collate_fn")
    check_part(f"{path}.collate_fn", collate, COLLATE)


def _dataset(path: str, value: Any, *, strict: bool = False) -> None:
    """A data set and the data sets and transforms inside it. Inner ones are left to the outer one where their names are
    unknown, because it may look them up elsewhere."""
    if isinstance(value, (list, tuple)):
        for index, member in enumerate(value):
            _dataset(f"{path}[{index}]", member)
        return
    if not isinstance(value, Mapping) or (not strict and not _known(value, DATASETS)):
        return
    check_part(path, value, DATASET if strict else Part(DATASETS, reserved=None))
    members = items(value)
    for name in ("dataset", "datasets"):
        _dataset(f"{path}.{name}", members.get(name))
    pipeline = members.get("pipeline")
    for index, transform in enumerate(pipeline if isinstance(pipeline, (list, tuple)) else ()):
        if _known(transform, TRANSFORMS):
            check_part(f"{path}.pipeline[{index}]", transform, Part(TRANSFORMS, reserved=None))


def _known(value: Any, registry: Registry) -> bool:
    """Whether the type of an inner dict is a class already or a registered name."""
    type_ = items(value).get("type") if isinstance(value, Mapping) else None
    if isinstance(type_, str):
        return registry.own(type_) is not None or type_ in registry.root.module_dict
    return callable(type_)


def _loop(path: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        return
    type_ = items(value).get("type")
    more: tuple[str, ...] = ()
    if type_ is not None:
        _check_kind(f"{path}.type", type_, SECTIONS[path]["type"])
    if type_ is not None and _short_name(type_) not in LOOP_NAMES:
        takes = arguments_of(resolve(LOOPS, type_, path=f"{path}.type"))
        more = takes.names + (tuple(items(value)) if takes.anything else ())
    _section(path, value, more=more)
    if path == "train_cfg" and value.get("max_epochs") is not None and value.get("max_iters") is not None:
        raise config_error(f"{path}.max_iters", "a run ends by max_epochs or by max_iters; drop one of the two")


def _evaluator(path: str, value: Any) -> None:
    if isinstance(value, Mapping) and "type" not in value:
        for name, evaluator in items(value).items():
            if evaluator is not None:
                _must_be_evaluator(f"{path}.{name}", evaluator)
                _evaluator(f"{path}.{name}", evaluator)
        return
    if isinstance(value, Mapping) and _is_evaluator(items(value)):
        check_part(path, value, METRICS_EVALUATOR)
        check_parts(f"{path}.metrics", items(value).get("metrics"), METRIC)
    else:
        check_parts(path, value, METRIC)


def _must_be_evaluator(path: str, value: Any) -> None:
    if not isinstance(value, (list, tuple)):
        must_be_part(path, value)


def _is_evaluator(members: Mapping[str, Any]) -> bool:
    short = _short_name(members["type"])
    return (
        "metrics" in members
        or short == "Evaluator"
        or (METRICS.own(short) is None and EVALUATOR.own(short) is not None)
    )


def _short_name(type_: Any) -> str:
    """The last part of a type's name, whatever it is given as; nothing is imported."""
    name = lazy_name(type_) if isinstance(type_, LAZY) else getattr(type_, "__name__", str(type_))
    return name.rpartition(".")[2]


def _optim_wrapper(path: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        return
    members = items(value)
    constructor = members.get("constructor")
    if constructor is not None:
        resolve(OPTIM_WRAPPER_CONSTRUCTORS, constructor, path=f"{path}.constructor")
        if members.get("optimizer") is None:  # one wrapper per part of the model, under names of the user's own
            return
    keys = SECTIONS["optim_wrapper"]
    for name, member in members.items():
        if name in keys:
            _check_kind(f"{path}.{name}", member, keys[name])
    check_part(path, {"type": "OptimWrapper", **members}, WRAPPER)
    check_part(f"{path}.optimizer", members.get("optimizer"), OPTIMIZER)


def _schedules(path: str, value: Any) -> None:
    """One schedule, a list, or several optimizers' lists by the optimizers' names."""
    members = items(value) if isinstance(value, Mapping) and "type" not in value else {}
    if members and all(isinstance(member, (Mapping, list, tuple)) for member in members.values()):
        for name, member in members.items():
            check_parts(f"{path}.{name}", member, SCHEDULE)
    else:
        check_parts(path, value, SCHEDULE)


def _visualizer(path: str, value: Any) -> None:
    check_part(path, value, VISUALIZER)
    if isinstance(value, Mapping):
        check_parts(f"{path}.vis_backends", items(value).get("vis_backends"), BACKEND)


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
    "env_cfg": _section,
    "randomness": _section,
    "log_processor": _section,
    "visualizer": _visualizer,
    "custom_imports": _section,
    "strategy": lambda path, value: check_part(path, value, STRATEGY),
    "compile": _section,
    "auto_scale_lr": _section,
    "load_options": _section,
}
