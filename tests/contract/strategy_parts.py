"""What the strategies are compared on: a model with the cases that sharding may get wrong, and one run of it."""

import random

import exactness
import numpy as np
import torch
from torch import nn

from mmtrain.registry import DATASETS, MODELS

VOCABULARY, LENGTH = 17, 6


@DATASETS.register_module()
class Tokens(torch.utils.data.Dataset):
    """Token sequences with noise that depends only on the sample."""

    def __init__(self, size=43):
        generator = torch.Generator().manual_seed(4)
        self.tokens = torch.randint(VOCABULARY, (size, LENGTH + 1), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        noise = 0.1 * torch.randn(()) + 0.1 * float(np.random.rand()) + 0.1 * random.random()
        return {"tokens": self.tokens[index, :-1], "labels": self.tokens[index, 1:], "noise": noise}


class TinyBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        return x + self.drop(self.down(torch.tanh(self.up(self.norm(x)))))


@MODELS.register_module()
class TinyLanguageModel(nn.Module):
    """Tied embedding and head, a frozen layer, a buffer, sizes that do not divide among two ranks."""

    def __init__(self, width=7, layers=2, dropout=0.0):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(False)
        self.blocks = nn.ModuleList(TinyBlock(width) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor([0.5]))
        for block in self.blocks:
            block.drop.p = dropout

    def forward(self, tokens, labels, noise):
        x = self.embed(tokens)
        x = x * self.scale.to(x.dtype)
        x = x + 0.1 * torch.tanh(self.frozen(x)) + noise[:, None, None].to(x.dtype)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "accuracy": (logits.argmax(-1) == labels).float().mean()}


def changes(world, strategy=None, *, size=43, iterations=100, dropout=0.0, accumulation=2, **others):
    """A config whose global batch is 8 for any number of processes."""
    found = {
        "model": {"type": "TinyLanguageModel", "dropout": dropout},
        "train_dataloader": {"dataset": {"type": "Tokens", "size": size}, "batch_size": 8 // world},
        "val_dataloader": {"dataset": {"type": "Tokens", "size": 21}, "batch_size": 8 // world},
        "train_cfg": {"max_iters": iterations, "val_interval": 20},
        "optim_wrapper": {
            "accumulative_counts": accumulation,
            "clip_grad": {"max_norm": 0.5},
            "optimizer": {"type": "AdamW", "lr": 0.01},
            "paramwise_cfg": {"custom_keys": {"up": {"lr_mult": 0.3}}, "norm_decay_mult": 0.0},
        },
        "default_hooks": {
            "logger": {"type": "LoggerHook", "interval": 1},
            "checkpoint": {"type": "CheckpointHook", "interval": 14},
        },
        **others,
    }
    if strategy is not None:
        found["strategy"] = strategy
    return found


def train(work_dir, *, world, crash=None, hooks=(), **options):
    """One run, or one that is interrupted; a job of a group. Returns the weights' checksum on this rank."""
    hooks = [{"type": "EMAHook", "momentum": 0.1}, *hooks]
    runner = exactness.train(work_dir, crash=crash, hooks=hooks, **changes(world, **options))
    state = runner.strategy.model_state()
    return float(sum(_full(value).double().abs().sum() for value in state.values()))


def _full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
