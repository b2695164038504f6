"""From a config to the parts of a run: one function a section, one fixed order.

The order matters: the seed and the checkpoint to resume are known before the first object that draws random numbers is
built, and the data before the schedules, whose length it decides.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from mmtrain import dist, launch
from mmtrain.checkpoint import Disks
from mmtrain.config import check_config, import_custom_modules
from mmtrain.config.keys import DEFAULT_HOOKS, LOOP_NAMES, named_sets
from mmtrain.data import build_eval_loader, build_ledger, build_train_stream
from mmtrain.errors import ConfigError
from mmtrain.evaluation import build_evaluator
from mmtrain.logging import ConsoleWriter, JsonLinesWriter, Scalars, VisualizerWriter, build_visualizer
from mmtrain.optim import OptimWrapper, build_optim_wrapper, build_schedules, scale_lr
from mmtrain.randomness import STREAM_BUILD, draw_seed, mix, seed_generators, set_deterministic
from mmtrain.registry import HOOKS, LOOPS, STRATEGIES, build, resolve
from mmtrain.runner.build_model import build_model
from mmtrain.runner.compare import data_fingerprint
from mmtrain.runner.flexible_runner import Parts, Randomness
from mmtrain.runner.hook_points import HookList
from mmtrain.runner.loops import TrainLoop, TrainPlan
from mmtrain.runner.resume import Resume, checkpoint_root
from mmtrain.runner.run_directory import Place, apply_env, make_place, occupy, watch_seconds, work_dir_of
from mmtrain.runner.saving import SaveService
from mmtrain.source_lines import positions
from mmtrain.strategies import Strategy


def assemble(cfg: Any, *, task: str = "train") -> Parts:
    """Build every part of a run. Raises ConfigError for whatever in the config cannot be right."""
    with positions(cfg):  # errors in building name file and line
        return _assemble_checked(cfg, task)


def _assemble_checked(cfg: Any, task: str) -> Parts:
    import_custom_modules(cfg)
    check_config(cfg)
    try:
        join_processes(cfg)
        return _assemble_joined(cfg, task)
    except BaseException:
        launch.end_watch()
        raise


def _assemble_joined(cfg: Any, task: str) -> Parts:
    default = {"type": "SingleDeviceStrategy" if dist.world_size() == 1 else "DDPStrategy"}
    strategy: Strategy = build(STRATEGIES, cfg.get("strategy") or default, path="strategy")
    strategy.setup()
    dist.set_model_parallel(strategy.model_parallel)
    if task == "train":
        strategy.check_config(cfg)
    locks = ExitStack()
    try:
        return _assemble(cfg, task, strategy, locks)
    except BaseException:
        locks.close()
        strategy.teardown()
        raise


def join_processes(cfg: Any) -> None:
    """Join the processes that a launcher started, once it is known that their config can be right, and watch them."""
    env = cfg.get("env_cfg") or {}
    launch.join(cfg.get("launcher") or "none", backend=(env.get("dist_cfg") or {}).get("backend"))
    if dist.world_size() > 1:
        launch.watch(watch_seconds(cfg))
    launch.refuse_disagreement(cfg)


def _assemble(cfg: Any, task: str, strategy: Strategy, locks: ExitStack) -> Parts:
    writes = task == "train"
    disks = occupy(work_dir_of(cfg), locks) if writes else Disks.shared(dist.world_size())
    place = make_place(cfg)
    launch.write_errors_to(place.log_dir / "errors")
    hooks = build_hooks(cfg)
    root = checkpoint_root(place.work_dir, hooks)
    if writes and dist.on_main(lambda: root.resolve() != place.work_dir.resolve()):
        disks = occupy(root, locks, named="out_dir")  # perhaps on another disk, or another run's with its own work_dir
    resume = Resume.choose(cfg, place.work_dir, hooks, logger=place.logger, task=task, disks=disks)
    randomness = build_randomness(cfg, resume.seed)
    apply_env(cfg.get("env_cfg") or {}, deterministic=randomness.deterministic)
    trains = task == "train" and cfg.get("train_dataloader") is not None
    stream = _train_stream(cfg, randomness) if trains else None
    val_sets = build_sets(cfg, "val", randomness) if task in ("train", "val") else {}
    test_sets = build_sets(cfg, "test", randomness) if task == "test" else {}
    refuse_other_data(stream, val=val_sets, test=test_sets)
    notices: list[str] = [*getattr(stream, "notices", [])]
    plan = build_plan(cfg.get("train_cfg"), stream) if trains else None
    prepare_model(cfg, strategy, randomness, _optim_factory(cfg, stream, notices) if trains else None)
    schedules = _schedules(cfg, strategy, plan, stream, notices) if plan is not None else None
    ledger = None
    if plan is not None and plan.ledger and strategy.optim is not None:
        ledger = build_ledger(stream, accumulative_counts=strategy.optim.accumulative_counts)
    visualizer = build_visualizer(cfg.get("visualizer"), save_dir=place.log_dir, name=place.experiment_name)
    return Parts(
        cfg=cfg, work_dir=place.work_dir, log_dir=place.log_dir, timestamp=place.timestamp,
        experiment_name=place.experiment_name, logger=place.logger, randomness=randomness, strategy=strategy,
        hooks=hooks, scalars=Scalars(), writers=build_writers(place, visualizer),
        saving=SaveService(resume.store, logger=place.logger), train_dataloader=stream, train_plan=plan,
        train_loop_class=loop_class(cfg.get("train_cfg")) if plan is not None else TrainLoop,
        schedules=schedules, val_sets=val_sets, test_sets=test_sets, visualizer=visualizer, resume=resume,
        eval_fp16={kind: bool((cfg.get(f"{kind}_cfg") or {}).get("fp16")) for kind in ("val", "test")},
        notices=notices, ledger=ledger, config_text=place.config_text, locks=locks,
    )  # fmt: skip


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
    """Build one hook; ``priority`` beside its arguments overrides its class's, as in MMEngine."""
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


def _train_stream(cfg: Any, randomness: Randomness) -> Any:
    seed_generators(mix(STREAM_BUILD, randomness.seed))
    return build_train_stream(
        cfg["train_dataloader"], seed=randomness.seed, rank=dist.data_rank(), world_size=dist.data_size(),
        per_sample=randomness.per_sample, path="train_dataloader",
    )  # fmt: skip


def build_sets(cfg: Any, kind: str, randomness: Randomness) -> dict[str, tuple[Any, Any]]:
    """The validation or test sets by name (one set has the name ""), each with its loader and evaluator.

    Several sets are written ``val_dataloader=dict(name=dict(dataset=...), ...)``; ``val_evaluator`` is then one config
    for all, or a dict of the same names.
    """
    loaders, evaluators = cfg.get(f"{kind}_dataloader"), cfg.get(f"{kind}_evaluator")
    if loaders is None:
        if evaluators is not None:
            raise ConfigError(f"{kind}_evaluator is given without {kind}_dataloader: give both or none")
        return {}
    named = {"": loaders}
    if named_sets(loaders):
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
        sets[name] = (built, evaluator)
    return sets


def refuse_other_data(stream: Any, **sets: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise ConfigError, on every rank, where one of them has another data set than rank 0; a collective."""
    if dist.world_size() == 1:
        return
    found = {"train_dataloader": stream} if stream is not None else {}
    for kind, named in sets.items():
        found |= {f"{kind}_dataloader.{name}".rstrip("."): loader for name, (loader, _) in named.items()}
    facts = {f"data set in {path} (fingerprint)": data_fingerprint(loader.dataset) for path, loader in found.items()}
    launch.refuse_difference(facts, "give all nodes the same data")


def build_plan(train_cfg: Any, stream: Any) -> TrainPlan:
    """``train_cfg`` as a plan. Raises ConfigError where it has no end, or one this data cannot know."""
    options = dict(train_cfg or {})
    options.pop("type", None)
    by_epoch = options.pop("by_epoch", None)
    if by_epoch is not None:
        needed, other = ("max_epochs", "max_iters") if by_epoch else ("max_iters", "max_epochs")
        if options.get(needed) is None:
            raise ConfigError(f"train_cfg.by_epoch={by_epoch} needs train_cfg.{needed}")
        if options.get(other) is not None:
            raise ConfigError(f"train_cfg.by_epoch={by_epoch} and train_cfg.{other} contradict one another: drop one")
    if "val_interval" not in options and options.get("max_iters") is not None:
        options["val_interval"] = 1000  # MMEngine's default in iteration-based runs
    options["dynamic_intervals"] = tuple(tuple(pair) for pair in options.get("dynamic_intervals") or ())
    plan = TrainPlan(**options)
    if plan.by_epoch and stream.iterations_per_epoch is None:
        raise ConfigError(
            "train_cfg.max_epochs: the training data does not know its length, so epochs cannot be counted beforehand; "
            "use train_cfg=dict(by_epoch=False, max_iters=...)"
        )
    return plan


def loop_class(train_cfg: Any) -> type[TrainLoop]:
    """The class of the train loop: MMEngine's names are names of the one there is; a user's own derives from it."""
    type_ = (train_cfg or {}).get("type")
    name = type_ if isinstance(type_, str) else getattr(type_, "__name__", "TrainLoop")
    if type_ is None or name.rsplit(".", maxsplit=1)[-1] in LOOP_NAMES:
        return TrainLoop
    found = resolve(LOOPS, type_, path="train_cfg.type")
    if not (isinstance(found, type) and issubclass(found, TrainLoop)):
        raise ConfigError(
            f"train_cfg.type: {found.__name__} is no loop of mmtrain; derive it from mmtrain.runner.TrainLoop, whose "
            "position makes a run resumable"
        )
    return found


def prepare_model(
    cfg: Any, strategy: Strategy, randomness: Randomness, make_optim: Callable[[nn.Module], OptimWrapper] | None
) -> None:
    """Build the model and hand it to the strategy."""
    model = build_model(cfg, seed=randomness.seed, context=strategy.build_context())
    strategy.prepare(model, make_optim, _compile_options(cfg.get("compile")))


def _compile_options(value: Any) -> dict[str, Any] | None:
    if not value:
        return None
    options = {} if value is True else dict(value)
    if options.pop("target", "forward") != "forward":
        raise ConfigError("compile.target: only 'forward' is compiled; the step's own code stays outside the graph")
    return None if options.pop("disable", False) else options


def _optim_factory(cfg: Any, stream: Any, notices: list[str]) -> Callable[[nn.Module], OptimWrapper]:
    if cfg.get("optim_wrapper") is None:
        raise ConfigError("the config has no 'optim_wrapper'; expected optim_wrapper=dict(optimizer=dict(type=...))")

    def make(model: nn.Module) -> OptimWrapper:
        optim = build_optim_wrapper(model, cfg["optim_wrapper"], path="optim_wrapper")
        scaling = cfg.get("auto_scale_lr") or {}
        if scaling.get("enable"):
            effective = stream.batch_size * dist.data_size() * optim.accumulative_counts
            notice = scale_lr(scaling, optim, effective_batch=effective)
            notices.extend([notice] if notice else [])
        return optim

    return make


def _schedules(cfg: Any, strategy: Strategy, plan: TrainPlan, stream: Any, notices: list[str]) -> Any:
    assert strategy.optim is not None
    per_epoch = stream.iterations_per_epoch
    max_iters = plan.max_iters
    if plan.max_epochs is not None and per_epoch is not None:
        max_iters = plan.max_epochs * per_epoch
    schedules = build_schedules(
        cfg.get("param_scheduler"), strategy.optim, max_iters=max_iters, max_epochs=plan.max_epochs,
        iterations_per_epoch=per_epoch, path="param_scheduler",
    )  # fmt: skip
    notices.extend(schedules.notices)
    return schedules


def build_writers(place: Place, visualizer: Any) -> list[Any]:
    """Where scalars go: the console, the JSON lines, and the visualizer's backends. Rank 0 writes."""
    if not dist.is_main():
        return []
    writers: list[Any] = [ConsoleWriter(place.logger), JsonLinesWriter(place.log_dir / "vis_data" / "scalars.json")]
    if visualizer is not None:
        writers.append(VisualizerWriter(visualizer))
    return writers
