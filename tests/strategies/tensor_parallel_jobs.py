"""Jobs for groups of processes that share one copy of a GPT."""

import hashlib
from typing import ClassVar

import exactness
import parts
import strategy_parts
import torch
from mmengine.evaluator import BaseMetric

from mmtrain import dist
from mmtrain.models import GPT
from mmtrain.registry import DATA_SAMPLERS, DATASETS, METRICS, MODELS
from mmtrain.runner.announce import opening_lines


@DATASETS.register_module()
class GPTTokens(strategy_parts.Tokens):
    """Sequences for a GPT."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {"input_ids": sample["tokens"], "labels": sample["labels"]}


@DATASETS.register_module()
class RecordingTokens(GPTTokens):
    """Records which samples this process reads."""

    read: ClassVar[list[int]] = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


@DATASETS.register_module()
class RankDividedTokens(GPTTokens):
    """Divides its samples among all ranks."""

    def __getitem__(self, index):
        return super().__getitem__((index + dist.rank()) % len(self))


@DATA_SAMPLERS.register_module()
class RankDividedSampler:
    """Divides the samples among all ranks."""

    def __init__(self, dataset, seed):
        self.indices = range(dist.rank(), len(dataset), dist.world_size())

    def __len__(self):
        return len(self.indices)

    def __iter__(self):
        return iter(self.indices)


@MODELS.register_module()
class TinyGPT(GPT):
    """Biases, tied weights, frozen layers (one split, one not), and parts that do not divide among two ranks."""

    def __init__(self, **options):
        size = {"layers": 2, "heads": 2, "width": 10, "bias": True}
        super().__init__(strategy_parts.VOCABULARY, strategy_parts.LENGTH, **{**size, **options})
        for block in self.blocks:
            block.attention.qkv.bias = None  # the gradient of the keys' is rounding alone, which Adam makes large
        self.blocks[1].mlp.down.requires_grad_(False)
        self.blocks[1].norm_1.requires_grad_(False)

    def forward(self, input_ids, labels):
        found = super().forward(input_ids, labels, return_logits=True)
        return {"loss": found["loss"], "accuracy": (found["logits"].argmax(-1) == labels).float().mean()}


@MODELS.register_module()
class OddGPT(TinyGPT):
    """Has a layer with seven outputs."""

    def __init__(self):
        super().__init__()
        self.odd = torch.nn.Linear(10, 7)


@MODELS.register_module()
class ScaledGPT(TinyGPT):
    """Has a parameter where tensor parallelism leaves each rank a part of the activations."""

    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block.mlp.scale = torch.nn.Parameter(torch.ones(1))
            block.mlp.down.register_forward_pre_hook(lambda module, args, mlp=block.mlp: (args[0] * mlp.scale,))


@METRICS.register_module()
class TokenCount(BaseMetric):
    """Samples, and the sum of all tokens: both grow where a sample is counted twice."""

    def process(self, data_batch, data_samples):
        self.results += [float(row.sum()) for row in data_batch["input_ids"]]

    def compute_metrics(self, results):
        return {"samples": len(results), "tokens": sum(results)}


@METRICS.register_module()
class GathersItself(TokenCount):
    """Combines results in its own way."""

    def evaluate(self, size):
        return self.compute_metrics(self.results)


def changes(mesh=None, *, dropout=0.0, model=None, size=43, **options):
    """The contract's config, for a GPT; ``mesh`` is that of FSDPStrategy, the global batch is 8."""
    tp = (mesh or {}).get("tp", 1)
    strategy = options.pop("strategy", None)
    if mesh is not None:
        strategy = {"type": "FSDPStrategy", "wrap": ["Block"], "mesh": mesh, **(strategy or {})}
    found = strategy_parts.changes(dist.world_size() // tp, strategy, size=size, **options)
    found["model"] = {"type": "TinyGPT", **({"dropout": dropout} if dropout else {}), **(model or {})}
    for name in ("train_dataloader", "val_dataloader"):
        if found[name] is not None and found[name]["dataset"]["type"] == "Tokens":
            found[name]["dataset"]["type"] = "GPTTokens"
    return found


def train(work_dir, mesh=None, *, crash=None, **options):
    """One run, or one that is interrupted. Returns this rank's parameters that are not split, as a digest."""
    ema = {"type": "EMAHook", "momentum": 0.1}
    runner = exactness.train(work_dir, crash=crash, hooks=[ema], **changes(mesh, **options))
    digest = hashlib.sha256()
    for name, value in sorted(runner.strategy.model_state().items()):
        if "tp" not in value.device_mesh.mesh_dim_names if hasattr(value, "device_mesh") else True:
            digest.update(name.encode() + getattr(value, "to_local", lambda v=value: v)().numpy().tobytes())
    return digest.hexdigest()


def refused(work_dir, mesh=None, *, own_samples=False, **options):
    """The error of an invalid config; with ``own_samples``, of data that differ between ranks."""
    if own_samples:
        options["train_dataloader"] = {"dataset": {"type": "RankDividedTokens", "size": 43}, "batch_size": 8}
    try:
        make(work_dir, mesh, **options).train()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def make(work_dir, mesh=None, **options):
    return parts.make_runner(work_dir, **changes(mesh, **{"iterations": 6, **options}))


def updates(work_dir, mesh):
    """How many of six updates were applied, one of which overflows in a split layer's gradient on rank 1."""
    wrapper = {"type": "AmpOptimWrapper", "dtype": "float16", "accumulative_counts": 1, "clip_grad": {"max_norm": 0.5},
               "optimizer": {"type": "AdamW", "lr": 0.01}}  # fmt: skip
    runner = make(work_dir, mesh, optim_wrapper={**wrapper, "loss_scale": {"init_scale": 2.0**10}})
    scaler, parameter = runner.optim_wrapper.scaler, runner.model.blocks[0].mlp.up.weight
    unscale = scaler.unscale_

    def overflowing(optimizer):
        if runner.iter == 2 and runner.rank == 1:
            parameter.grad.to_local()[0, 0] = float("inf")
        unscale(optimizer)

    scaler.unscale_ = overflowing
    runner.train()
    return runner.progress.update


def validated(work_dir, mesh=None, **options):
    """The metrics of the weights as they were built."""
    runner = make(work_dir, mesh, train_cfg={"max_iters": 1, "val_interval": 1}, **options)
    runner.train()
    return runner.metrics


def read(work_dir, mesh):
    """The samples that this process reads in two epochs, with a ledger."""
    RecordingTokens.read.clear()
    dataset = {"type": "RecordingTokens", "size": 97}
    size = 8 * mesh["tp"] // dist.world_size()
    make(
        work_dir, mesh, train_dataloader={"dataset": dataset, "batch_size": size}, val_dataloader=None,
        train_cfg={"max_iters": 26, "val_interval": 100, "ledger": True},
    ).train()  # fmt: skip
    return RecordingTokens.read


def initial_weights(work_dir, mesh, **options):
    """The full weights before training, as a digest."""
    runner = make(work_dir, mesh, **options)
    digest = hashlib.sha256()
    for name, value in sorted(runner.strategy.model_state().items()):
        digest.update(
            name.encode() + (value.full_tensor() if hasattr(value, "full_tensor") else value).numpy().tobytes()
        )
    runner.release()
    return digest.hexdigest()


def opening(work_dir, mesh):
    """The log lines at the start of a run."""
    runner = make(work_dir, mesh)
    lines = opening_lines(runner)
    runner.release()
    return "\n".join(lines)
