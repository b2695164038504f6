"""From sections of a config to the parts of a run: one function for each section."""

from collections.abc import Mapping
from typing import Any

from mmtrain import dist
from mmtrain.config.keys import DEFAULT_HOOKS, LOOP_NAMES, is_named_sets
from mmtrain.data import Stream, build_eval_loader
from mmtrain.errors import ConfigError
from mmtrain.evaluation import build_evaluator
from mmtrain.logging import ConsoleWriter, JsonLinesWriter, ScalarWriter, VisualizerWriter
from mmtrain.randomness import draw_seed, set_deterministic
from mmtrain.registry import HOOKS, LOOPS, build, resolve
from mmtrain.runner.hook_points import HookList
from mmtrain.runner.loops import TrainLoop
from mmtrain.runner.run import EvaluationSet, Randomness
from mmtrain.runner.run_directory import RunDirectory
from mmtrain.runner.train_schedule import TrainSchedule


def build_hooks(cfg: Any) -> HookList:
    """The default hooks as ``default_hooks`` changes them, then ``custom_hooks``."""
    wanted: dict[str, Any] = {name: {"type": kind} for name, kind in DEFAULT_HOOKS.items()}
    for name, hook in (cfg.get("default_hooks") or {}).items():
        if hook is None:
            wanted.pop(name, None)
        elif isinstance(hook, Mapping) and "type" not in hook and name in wanted:
            wanted[name] = {**wanted[name], **hook}
        else:
            wanted[name] = hook
    named = [(name, _build_hook(hook, f"default_hooks.{name}")) for name, hook in wanted.items()]
    for index, hook in enumerate(cfg.get("custom_hooks") or []):
        built = _build_hook(hook, f"custom_hooks[{index}]")
        named.append((type(built).__name__, built))
    return HookList(named)


def _build_hook(hook: Any, path: str) -> Any:
    """Build one hook; ``priority`` next to its arguments overrides its class's, as in MMEngine."""
    if not isinstance(hook, Mapping) or "priority" not in hook:
        return build(HOOKS, hook, path=path)
    options = dict(hook)
    priority = options.pop("priority")
    built = build(HOOKS, options, path=path)
    built.priority = priority
    return built


def build_randomness(cfg: Any, resumed_seed: int | None) -> Randomness:
    """The config's ``randomness`` with a seed: the config's, else the checkpoint's, else a drawn one."""
    options = dict(cfg.get("randomness") or {})
    seed = options.pop("seed", None)
    if seed is None:
        seed = dist.broadcast_object(draw_seed()) if resumed_seed is None else resumed_seed
    randomness = Randomness(seed=int(seed), **options)
    set_deterministic(randomness.deterministic)
    return randomness


def build_sets(cfg: Any, kind: str, randomness: Randomness) -> dict[str, EvaluationSet]:
    """The validation or test sets by name (one set has the name ""), each with its loader and evaluator.

    Several sets are written ``val_dataloader=dict(name=dict(dataset=...), ...)``; ``val_evaluator`` is then one config
    for all, or a dict of the same names.
    """
    loaders, evaluators = cfg.get(f"{kind}_dataloader"), cfg.get(f"{kind}_evaluator")
    if loaders is None:
        if evaluators is not None:
            raise ConfigError(f"{kind}_evaluator is set without {kind}_dataloader; set both or neither")
        return {}
    named = {"": loaders}
    if is_named_sets(loaders):
        named = dict(loaders)
    sets = {}
    for name, loader in named.items():
        path = f"{kind}_dataloader.{name}" if name else f"{kind}_dataloader"
        own = evaluators
        if name and isinstance(evaluators, Mapping) and "type" not in evaluators:
            own = evaluators.get(name)
        built = build_eval_loader(
            loader, seed=randomness.seed, rank=dist.data_rank(), world_size=dist.data_size(), path=path
        )
        evaluator = build_evaluator(own, path=f"{kind}_evaluator.{name}" if name else f"{kind}_evaluator")
        if evaluator is not None and hasattr(built.dataset, "metainfo"):
            evaluator.dataset_meta = built.dataset.metainfo
        sets[name] = EvaluationSet(built, evaluator)
    return sets


def build_train_schedule(train_cfg: Any, stream: Stream) -> TrainSchedule:
    """``train_cfg`` as a schedule. Raises ConfigError if it has no end, or one that needs an unknown length."""
    options = dict(train_cfg or {})
    options.pop("type", None)
    by_epoch = options.pop("by_epoch", None)
    if by_epoch is not None:
        needed, other = ("max_epochs", "max_iters") if by_epoch else ("max_iters", "max_epochs")
        if options.get(needed) is None:
            raise ConfigError(f"train_cfg.by_epoch={by_epoch} needs train_cfg.{needed}")
        if options.get(other) is not None:
            raise ConfigError(f"train_cfg.by_epoch={by_epoch} and train_cfg.{other} contradict each other; drop one")
    if "val_interval" not in options and options.get("max_iters") is not None:
        options["val_interval"] = 1000  # MMEngine's default in iteration-based runs
    options["dynamic_intervals"] = tuple(tuple(pair) for pair in options.get("dynamic_intervals") or ())
    schedule = TrainSchedule(**options)
    if schedule.by_epoch and stream.iterations_per_epoch is None:
        raise ConfigError(
            "train_cfg.max_epochs: the length of the training data is unknown, so the end of the run is unknown too; "
            "use train_cfg=dict(by_epoch=False, max_iters=...)"
        )
    return schedule


def loop_class(train_cfg: Any) -> type[TrainLoop]:
    """The class of the train loop: MMEngine's names all mean `TrainLoop`; a user's class must derive from it."""
    type_ = (train_cfg or {}).get("type")
    name = type_ if isinstance(type_, str) else getattr(type_, "__name__", "TrainLoop")
    if type_ is None or name.rsplit(".", maxsplit=1)[-1] in LOOP_NAMES:
        return TrainLoop
    found = resolve(LOOPS, type_, path="train_cfg.type")
    if not (isinstance(found, type) and issubclass(found, TrainLoop)):
        raise ConfigError(
            f"train_cfg.type: {found.__name__} is not an mmtrain train loop; subclass mmtrain.runner.TrainLoop, which "
            "tracks the resume position"
        )
    return found


def build_writers(directory: RunDirectory, visualizer: Any) -> list[ScalarWriter]:
    """Where scalars go: the console, the JSON lines, and the visualizer's backends. Rank 0 writes."""
    if not dist.is_main():
        return []
    writers: list[ScalarWriter] = [
        ConsoleWriter(directory.logger),
        JsonLinesWriter(directory.log_dir / "vis_data" / "scalars.json"),
    ]
    if visualizer is not None:
        writers.append(VisualizerWriter(visualizer))
    return writers
