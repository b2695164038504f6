"""Jobs for a pair of processes: what a strategy does to a model, looked at from inside."""

import parts
import strategy_parts
import torch
from torch import nn

from mmtrain import dist
from mmtrain.registry import MODELS


@MODELS.register_module()
class Initialised(strategy_parts.TinyLanguageModel):
    """Has an init_weights that gives every value; ``forgets`` leaves one out."""

    def __init__(self, forgets=False, **kwargs):
        super().__init__(**kwargs)
        self.forgets = forgets

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


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def make(work_dir, world=2, **changes):
    return parts.make_runner(work_dir, **strategy_parts.changes(world, iterations=6, **changes))


def layout(work_dir, **changes):
    """Local and whole number of elements of each parameter, and the classes that became a group."""
    runner = make(work_dir, **changes)
    sizes = {
        n: [getattr(p, "to_local", lambda p=p: p)().numel(), p.numel()] for n, p in runner.model.named_parameters()
    }
    groups = [type(module).__mro__[2].__name__ for module in runner.model.modules() if "FSDP" in type(module).__name__]
    runner.release()
    return {"sizes": sizes, "groups": groups}


def refused(work_dir, **changes):
    """What is said of a config that cannot be."""
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
    found = {name: whole(value).double().tolist() for name, value in runner.strategy.model_state().items()}
    runner.release()
    return {"weights": found, "tied": tied, "parameters": len(list(runner.model.parameters()))}


def losses(work_dir, **changes):
    """Train, and give the last loss and the type of the moments."""
    runner = make(work_dir, **changes)
    runner.train()
    kinds = {str(value.dtype) for name, value in runner.strategy.optimizer_state().items() if "exp_avg" in name}
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
        own = 0.0 if any(g is None for g in gradients) else sum(float(whole(g).sum()) for g in gradients)
        others = dist.gather_objects(own)
        seen.append(others[0] == others[1] and own != 0.0)

    OptimWrapper.backward = watched
    try:
        make(work_dir, strategy=strategy, accumulation=3).train()
    finally:
        OptimWrapper.backward = original
    return seen
