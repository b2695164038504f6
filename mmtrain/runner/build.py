"""From a config to a run: every part in one fixed order.

The order matters: the seed and the checkpoint to resume are known before the first object that draws random numbers is
built, and the data before the schedules, whose length it decides. `sections` has one function for each section.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from mmtrain import dist, launch
from mmtrain.checkpoint import CheckpointStore, SharedDisk
from mmtrain.config import check_config, import_custom_modules
from mmtrain.data import Stream, build_ledger, build_train_stream
from mmtrain.errors import ConfigError
from mmtrain.logging import build_visualizer
from mmtrain.optim import GroupValues, OptimWrapper, ScheduleSet, build_optim_wrapper, build_schedules, scale_lr
from mmtrain.randomness import STREAM_BUILD, mix, seed_generators
from mmtrain.registry import HOOKS, STRATEGIES, build
from mmtrain.runner.build_model import build_model
from mmtrain.runner.check_model import check_savable
from mmtrain.runner.checkpointer import Checkpointer
from mmtrain.runner.choose import choose_start
from mmtrain.runner.data_identity import data_fingerprint
from mmtrain.runner.hook_points import HookList
from mmtrain.runner.requests import StepRequests
from mmtrain.runner.run import EvaluationSet, Randomness, Run
from mmtrain.runner.run_directory import (
    Place,
    RunDirectory,
    apply_env,
    make_run_directory,
    occupy,
    watch_seconds,
    work_dir_of,
)
from mmtrain.runner.save_policy import SavePolicy, find_save_policy
from mmtrain.runner.sections import (
    build_hooks,
    build_randomness,
    build_sets,
    build_train_schedule,
    build_writers,
    loop_class,
)
from mmtrain.runner.start_facts import start_facts
from mmtrain.runner.train_schedule import TrainSchedule
from mmtrain.source_lines import positions
from mmtrain.strategies import Strategy, native

R = TypeVar("R", bound=Run)


def assemble(cfg: Any, make: Callable[..., R], *, task: str = "train") -> R:
    """Build every part of a run and hand them to ``make`` by name: those of `Run`, and ``start``, ``checkpointer``,
    ``train_loop_class`` and ``locks`` (what to close when the run is over).

    Raises ConfigError for anything invalid in the config.
    """
    with positions(cfg):  # errors in building name file and line
        import_custom_modules(cfg)
        check_config(cfg)
        try:
            _join_processes(cfg)
            return _with_strategy(cfg, make, task)
        except BaseException:
            launch.end_watch()
            raise


def _join_processes(cfg: Any) -> None:
    """Join the processes that a launcher started, once it is known that their config can be right, and watch them."""
    env = cfg.get("env_cfg") or {}
    launch.join(cfg.get("launcher") or "none", backend=(env.get("dist_cfg") or {}).get("backend"))
    if dist.world_size() > 1:
        launch.watch(watch_seconds(cfg))
        launch.refuse_difference(start_facts(cfg), "start all ranks with the same files, in the same environment")


def _with_strategy(cfg: Any, make: Callable[..., R], task: str) -> R:
    default = {"type": "SingleDeviceStrategy" if dist.world_size() == 1 else "DDPStrategy"}
    strategy: Strategy = build(STRATEGIES, cfg.get("strategy") or default, path="strategy")
    strategy.setup()
    dist.set_model_parallel(strategy.model_parallel)
    if task == "train":
        strategy.check_config(cfg)
    locks = ExitStack()
    try:
        return _build_run(cfg, make, task, strategy, locks)
    except BaseException:
        locks.close()
        strategy.teardown()
        raise


def _build_run(cfg: Any, make: Callable[..., R], task: str, strategy: Strategy, locks: ExitStack) -> R:
    place = occupy(work_dir_of(cfg), locks) if task == "train" else Place(SharedDisk())
    directory = make_run_directory(cfg)
    launch.write_errors_to(directory.log_dir / "errors")
    hooks = build_hooks(cfg)
    policy = find_save_policy(hooks, by_epoch=(cfg.get("train_cfg") or {}).get("max_epochs") is not None)
    store = _open_store(policy, directory, place, locks, task)
    start = choose_start(cfg, store, task=task, logger=directory.logger)
    randomness = build_randomness(cfg, start.seed)
    apply_env(cfg.get("env_cfg") or {}, deterministic=randomness.deterministic)
    trains = task == "train" and cfg.get("train_dataloader") is not None
    parts: dict[str, Any] = {
        "cfg": cfg,
        "directory": directory,
        "randomness": randomness,
        "strategy": strategy,
        "hooks": hooks,
        "requests": StepRequests(directory.logger),
        "start": start,
        "checkpointer": Checkpointer(store, policy, logger=directory.logger),
        "locks": locks,
        "train_dataloader": _train_stream(cfg, randomness) if trains else None,
        "val_sets": build_sets(cfg, "val", randomness) if task in ("train", "val") else {},
        "test_sets": build_sets(cfg, "test", randomness) if task == "test" else {},
    }
    check_same_data_on_all_ranks(parts["train_dataloader"], val=parts["val_sets"], test=parts["test_sets"])
    if trains:
        parts |= _training_parts(cfg, strategy, randomness, parts["train_dataloader"], hooks)
    else:
        prepare_model(cfg, strategy, randomness, None)
    visualizer = build_visualizer(cfg.get("visualizer"), save_dir=directory.log_dir, name=directory.experiment_name)
    return make(**parts, visualizer=visualizer, writers=build_writers(directory, visualizer))


def _open_store(
    policy: SavePolicy, directory: RunDirectory, place: Place, locks: ExitStack, task: str
) -> CheckpointStore:
    """The store of the work dir, or of ``<out_dir>/<name of the work dir>`` where CheckpointHook says so."""
    root = directory.work_dir if policy.out_dir is None else Path(policy.out_dir).absolute() / directory.work_dir.name
    trains = task == "train"
    if trains and dist.on_main(lambda: root.resolve() != directory.work_dir.resolve()):
        place.topology.close()
        place = occupy(root, locks, named="out_dir")  # perhaps on another disk, or of another run
    if trains:
        native.remove_leftovers(root)
    return CheckpointStore(root, lock=place.lock, topology=place.topology)


def _training_parts(
    cfg: Any, strategy: Strategy, randomness: Randomness, stream: Stream, hooks: HookList
) -> dict[str, Any]:
    """What only training needs: its schedule, the model with its optimizer, the parameter schedules, the ledger."""
    notices = list(stream.notices)
    train_schedule = build_train_schedule(cfg.get("train_cfg"), stream)
    prepare_model(cfg, strategy, randomness, _optim_factory(cfg, stream, notices))
    notices.extend(strategy.notices)
    schedules = _schedules(cfg, strategy, train_schedule, stream, notices)
    assert strategy.optim is not None
    if train_schedule.ledger:
        ledger = build_ledger(stream, accumulative_counts=strategy.optim.accumulative_counts)
        ledger_hook = build(HOOKS, {"type": "LedgerHook", "ledger": ledger}, path="train_cfg.ledger")
        hooks = HookList([*hooks.named.items(), ("ledger", ledger_hook)])
    return {
        "train_schedule": train_schedule,
        "train_loop_class": loop_class(cfg.get("train_cfg")),
        "schedules": schedules,
        "group_values": GroupValues(strategy.model, strategy.optim, schedules),
        "hooks": hooks,
        "notices": notices,
    }


def _train_stream(cfg: Any, randomness: Randomness) -> Stream:
    seed_generators(mix(STREAM_BUILD, randomness.seed))
    return build_train_stream(
        cfg["train_dataloader"], seed=randomness.seed, rank=dist.data_rank(), world_size=dist.data_size(),
        per_sample=randomness.per_sample, path="train_dataloader",
    )  # fmt: skip


def check_same_data_on_all_ranks(stream: Stream | None, **sets: Mapping[str, EvaluationSet]) -> None:
    """Raise ConfigError, on every rank, if one rank has other data than rank 0; a collective."""
    if dist.world_size() == 1:
        return
    found: dict[str, Any] = {"train_dataloader": stream} if stream is not None else {}
    for kind, named in sets.items():
        found |= {f"{kind}_dataloader.{name}".rstrip("."): loader for name, (loader, _) in named.items()}
    facts = {f"dataset of {path} (fingerprint)": data_fingerprint(loader.dataset) for path, loader in found.items()}
    launch.refuse_difference(facts, "give all nodes the same data")


def prepare_model(
    cfg: Any, strategy: Strategy, randomness: Randomness, make_optim: Callable[[nn.Module], OptimWrapper] | None
) -> None:
    """Build the model and hand it to the strategy."""
    model = build_model(cfg, seed=randomness.seed, context=strategy.build_context())
    if make_optim is not None:
        check_savable(model)
    strategy.prepare(model, make_optim, _compile_options(cfg.get("compile")))


def _compile_options(value: Any) -> dict[str, Any] | None:
    if not value:
        return None
    options = {} if value is True else dict(value)
    if options.pop("target", "forward") != "forward":
        raise ConfigError(
            "compile.target: only 'forward' can be compiled; the code of the step stays outside the graph"
        )
    return None if options.pop("disable", False) else options


def _optim_factory(cfg: Any, stream: Stream, notices: list[str]) -> Callable[[nn.Module], OptimWrapper]:
    if cfg.get("optim_wrapper") is None:
        raise ConfigError("the config has no 'optim_wrapper'; expected optim_wrapper=dict(optimizer=dict(type=...))")

    def make(model: nn.Module) -> OptimWrapper:
        optim = build_optim_wrapper(model, cfg["optim_wrapper"], path="optim_wrapper")
        scaling = cfg.get("auto_scale_lr") or {}
        if scaling.get("enable"):
            if stream.batch_size is None:
                raise ConfigError("auto_scale_lr.enable: the batch size is unknown, so the lr cannot be scaled")
            effective = stream.batch_size * dist.data_size() * optim.accumulative_counts
            notice = scale_lr(scaling, optim, effective_batch=effective)
            notices.extend([notice] if notice else [])
        notices.extend(optim.notices)
        return optim

    return make


def _schedules(
    cfg: Any, strategy: Strategy, train_schedule: TrainSchedule, stream: Stream, notices: list[str]
) -> ScheduleSet:
    assert strategy.optim is not None
    per_epoch = stream.iterations_per_epoch
    max_iters = train_schedule.max_iters
    if train_schedule.max_epochs is not None and per_epoch is not None:
        max_iters = train_schedule.max_epochs * per_epoch
    schedules = build_schedules(
        cfg.get("param_scheduler"), strategy.optim, max_iters=max_iters, max_epochs=train_schedule.max_epochs,
        iterations_per_epoch=per_epoch, path="param_scheduler",
    )  # fmt: skip
    notices.extend(schedules.notices)
    return schedules
