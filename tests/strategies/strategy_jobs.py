"""Jobs for a pair of processes: what a strategy does to a model, seen from inside."""

import parts
import strategy_parts
import torch
from torch import nn

from mmtrain import dist
from mmtrain.registry import MODELS


@MODELS.register_module()
class Initialised(strategy_parts.TinyLanguageModel):
    """Has an init_weights that gives every value; ``forgets`` leaves one out, ``masked`` a boolean buffer."""

    def __init__(self, forgets=False, masked=False, **kwargs):
        super().__init__(**kwargs)
        self.forgets = forgets
        if masked:
            self.register_buffer("mask", torch.ones(4, dtype=torch.bool), persistent=False)

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.1)
                if getattr(module, "bias", None) is not None:
                    nn.init.uniform_(module.bias, -0.1, 0.1)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        if not self.forgets:
            self.scale.fill_(0.5)


def full_tensor_of(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def make(work_dir, world=2, **changes):
    return parts.make_runner(work_dir, **strategy_parts.changes(world, iterations=6, **changes))


def layout(work_dir, **changes):
    """Local and full number of elements of each parameter, and the classes that became a group."""
    runner = make(work_dir, **changes)
    sizes = {
        n: [getattr(p, "to_local", lambda p=p: p)().numel(), p.numel()] for n, p in runner.model.named_parameters()
    }
    groups = [type(module).__mro__[2].__name__ for module in runner.model.modules() if "FSDP" in type(module).__name__]
    runner.release()
    return {"sizes": sizes, "groups": groups}


def refused(work_dir, **changes):
    """The error of an invalid config."""
    try:
        make(work_dir, **changes).train()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def initial_weights(work_dir, meta_init, layers=2):
    """The sum of each weight of a model before training, as exact text."""
    model = {"type": "Initialised", "layers": layers}
    strategy = {"type": "FSDPStrategy", "wrap": "TinyBlock", "meta_init": meta_init}
    if dist.world_size() == 1:
        strategy = {"type": "SingleDeviceStrategy"}
    runner = make(work_dir, dist.world_size(), model=model, strategy=strategy)
    tied = runner.model.head.weight is runner.model.embed.weight
    found = {name: full_tensor_of(value).double().tolist() for name, value in runner.strategy.model_state().items()}
    runner.release()
    return {"weights": found, "tied": tied, "parameters": len(list(runner.model.parameters()))}


def written_weights(work_dir, **changes):
    """Train, and return the sum of each full weight."""
    runner = make(work_dir, **changes)
    runner.train()
    return {name: full_tensor_of(value).double().sum().item() for name, value in runner.strategy.model_state().items()}


def losses(work_dir, **changes):
    """Train, and give the last loss and the type of the moments."""
    runner = make(work_dir, **changes)
    runner.train()
    kinds = {str(value.dtype) for name, value in runner.strategy.optimizer_state().tensors.items() if "exp_avg" in name}
    return {"loss": runner.scalars.latest("loss"), "moments": sorted(kinds), "update": runner.progress.update}


def collectives(work_dir, iterations=12, **changes):
    """The number of collectives in each iteration, by name."""
    counts, current, originals = [], {}, {}
    watched = (
        "all_reduce",
        "broadcast",
        "all_gather",
        "all_gather_object",
        "broadcast_object_list",
        "barrier",
        "reduce",
    )
    for name in watched:
        originals[name] = getattr(torch.distributed, name)

        def counted(*args, _name=name, **kwargs):
            current[_name] = current.get(_name, 0) + 1
            return originals[_name](*args, **kwargs)

        setattr(torch.distributed, name, counted)

    class Count:
        priority = "LOWEST"

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            counts.append(dict(current))
            current.clear()

    try:
        config = strategy_parts.changes(2, iterations=iterations, accumulation=1, **changes)
        config["train_cfg"]["val_interval"] = 1000
        config["default_hooks"] = {"logger": {"type": "LoggerHook", "interval": 5}, "checkpoint": None}
        parts.make_runner(work_dir, custom_hooks=[Count()], **config).train()
    finally:
        for name, original in originals.items():
            setattr(torch.distributed, name, original)
    return counts[1:]


def synchronised(work_dir, strategy):
    """After each backward: whether the ranks hold the same gradients."""
    from mmtrain.optim import OptimWrapper

    seen = []
    original = OptimWrapper.backward

    def watched(self, loss, **kwargs):
        original(self, loss, **kwargs)
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        own = 0.0 if any(g is None for g in gradients) else sum(float(full_tensor_of(g).sum()) for g in gradients)
        others = dist.gather_objects(own)
        seen.append(others[0] == others[1] and own != 0.0)

    OptimWrapper.backward = watched
    try:
        make(work_dir, strategy=strategy, accumulation=3).train()
    finally:
        OptimWrapper.backward = original
    return seen


@MODELS.register_module()
class TrainsItself(strategy_parts.TinyLanguageModel):
    """Runs forward and backward without the wrapper."""

    def train_step(self, data, optim_wrapper):
        losses = self(**data)
        optim_wrapper.update_params(losses["loss"])
        return losses


@MODELS.register_module()
class UnusedLayer(strategy_parts.TinyLanguageModel):
    """Never uses a layer on ``ranks``."""

    def __init__(self, ranks, **kwargs):
        super().__init__(**kwargs)
        self.extra, self.ranks = nn.Linear(3, 3), ranks

    def forward(self, **inputs):
        found = super().forward(**inputs)
        if dist.rank() not in self.ranks:
            found["loss"] = found["loss"] + 0.0 * self.extra(torch.ones(3)).sum()
        return found


@MODELS.register_module()
class Scaled(strategy_parts.TinyLanguageModel):
    """Has a parameter without dimensions, as CLIP's temperature."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.temperature = nn.Parameter(torch.tensor(1.0))


def buckets(work_dir, **changes):
    """The bytes of DDP's buckets, the first to be exchanged first, and whether they were rebuilt in training."""
    runner = make(work_dir, **changes)
    runner.train()
    ddp = runner.strategy.module
    return {"sizes": ddp._get_ddp_logging_data()["rebuilt_bucket_sizes"], "moved": ddp._has_rebuilt_buckets}


def input_types(work_dir, **changes):
    """The types in which the model gets two of its inputs."""
    seen = {}
    runner = make(work_dir, **changes)
    original = runner.model.embed.forward
    runner.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update({name: str(kwargs[name].dtype) for name in ("tokens", "noise")}),
        with_kwargs=True,
    )
    runner.model.embed.forward = original
    runner.train()
    return seen


def train_in_fp16(work_dir, stage, scale_power, **options):
    """A run in float16 of `strategy_parts.train`; DeepSpeed asks the CPU for instructions that torch does without."""
    from mmtrain.strategies.zero import library

    library.load()
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    half = {"enabled": True, "initial_scale_power": scale_power, "hysteresis": 1, "loss_scale_window": 8}
    strategy = {"type": "DeepSpeedStrategy", "zero_optimization": {"stage": stage}, "fp16": half}
    return strategy_parts.train(work_dir, world=2, strategy=strategy, **options)


def changed_by_state_round_trip(work_dir, **changes):
    """Names of tensors that differ after state was taken by name, overwritten, and restored; or are not the model's."""
    runner = make(work_dir, **changes)
    runner.train()
    strategy = runner.strategy
    model, optimizer = strategy.model_state(), strategy.optimizer_state()
    values = optimizer.values
    from mmtrain.checkpoint import CheckpointStore, load_weights
    from mmtrain.strategies.base import OptimizerState

    saved = load_weights(CheckpointStore(work_dir).newest_good()[0].path).tensors
    wrong = [name for name, value in model.items() if not torch.equal(value, saved[name])]
    kept = [{name: value.clone() for name, value in state.items()} for state in (model, optimizer.tensors)]
    put_model_state(strategy, {name: torch.full_like(value, 0.5) for name, value in kept[0].items()})
    spoilt = {n: v.clone() if n.endswith("/step") else torch.full_like(v, 0.5) for n, v in kept[1].items()}
    strategy.load_optimizer_state(OptimizerState(spoilt, values))
    put_model_state(strategy, kept[0])
    strategy.load_optimizer_state(OptimizerState({name: value.clone() for name, value in kept[1].items()}, values))
    for before, after in zip(kept, (strategy.model_state(), strategy.optimizer_state().tensors), strict=True):
        wrong += [name for name in before if not torch.equal(before[name], after[name])]
    return wrong


def put_model_state(strategy, state):
    """Fill the strategy's model state as a resume does."""
    targets = strategy.model_targets({name: (value.shape, value.dtype) for name, value in state.items()})
    with torch.no_grad():
        for name, value in targets.items():
            value.copy_(state[name])
    strategy.load_model_state(targets)


def train_with_a_full_disk(work_dir, fails_on, **options):
    """A run whose first save fails on one rank as a full disk makes it fail."""
    from mmtrain.strategies.zero import native

    original, left = native.writer, [1]

    def writer(engine, **kwargs):
        save = engine.checkpoint_engine.save

        def failing(*args, **kw):
            if dist.rank() == fails_on and left:
                left.clear()
                raise OSError(28, "No space left on device")
            return save(*args, **kw)

        if left:
            engine.checkpoint_engine.save = failing
        return original(engine, **kwargs)

    native.writer = writer
    try:
        return strategy_parts.train(work_dir, world=2, **options)
    finally:
        native.writer = original


def exact_over_a_crash(work_dir, **changes):
    """Train undisturbed, and with a crash and a resume; "" if both leave the same behind, else what is different."""
    import exactness

    undisturbed, broken = f"{work_dir}/undisturbed", f"{work_dir}/broken"
    options = {"world": dist.world_size(), "iterations": 20, **changes}
    try:
        strategy_parts.train(undisturbed, **options)
        strategy_parts.train(broken, crash=("iteration", 17), **options)
        strategy_parts.train(broken, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    try:  # on every rank: a store opens a checkpoint together
        exactness.assert_same(exactness.left_behind(undisturbed), exactness.left_behind(broken))
    except AssertionError as error:
        return f"different: {error}"
    return ""
