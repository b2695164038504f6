"""Models whose ranks take different branches, from an iteration on."""

from pathlib import Path

import parts
import strategy_parts
import torch
from torch import nn

from mmtrain import dist
from mmtrain.registry import MODELS


class Expert(nn.Module):
    """One of several alike."""

    def __init__(self, width):
        super().__init__()
        self.line = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.line(x))


@MODELS.register_module()
class Branching(strategy_parts.TinyLanguageModel):
    """In the forwards from ``start`` on, rank 1 does as ``kind`` says.

    * ``expert``: runs the other of two equal modules;
    * ``head``: its loss uses the other of two equal layers of the root;
    * ``unused``: its loss leaves out a layer of the root;
    * ``skip``: it leaves out the last block;
    * ``order``: it runs the two experts in the other order;
    * ``no loss``: it runs the second expert and leaves it out of the loss.

    All ranks do the same where ``kind`` is "none" or ``alike``; where it is "drawn", each draws whether to skip a block.
    """

    def __init__(self, kind="none", start=0, alike=False, **kwargs):
        super().__init__(**kwargs)
        width = self.embed.weight.shape[1]
        self.kind, self.start, self.alike, self.calls = kind, start, alike, 0
        self.experts = nn.ModuleList(Expert(width) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(2))

    def forward(self, tokens, labels, noise):
        self.calls += 1
        other = self.calls > self.start and (dist.rank() == 1 or self.alike)
        kind = self.kind if other else "none"
        if self.kind == "drawn" and self.training and torch.rand(()) < 0.5:
            kind = "skip"
        x = self.embed(tokens) * self.scale.to(self.embed.weight.dtype) + 0.1 * torch.tanh(
            self.frozen(self.embed(tokens))
        )
        blocks = list(self.blocks)[:-1] if kind == "skip" else self.blocks
        for block in blocks:
            x = block(x)
        first, second = self.experts
        if self.kind == "expert":
            x = (second if other else first)(x)
        elif self.kind == "no loss":
            y = second(first(x))
            x = first(x) + 0.0 * y.detach() if other else y
        else:
            for expert in (second, first) if kind == "order" else (first, second):
                x = expert(x)
        heads = [self.heads[0]] if kind == "unused" else self.heads
        if self.kind == "head":
            heads = [self.heads[1] if other else self.heads[0]]
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())
        return {"loss": loss + 0.1 * sum(head(x).square().mean() for head in heads)}


def trained(work_dir, kind, strategy, start=0, alike=False, iterations=8, accumulation=1, saves=1000, **options):
    """How a run ends on this rank: what was raised, or the last loss; and which checkpoints it has saved."""
    options = {"iterations": iterations, "accumulation": accumulation, **options}
    config = strategy_parts.changes(dist.world_size(), strategy, **options)
    config["model"] = {"type": "Branching", "kind": kind, "start": start, "alike": alike}
    config["train_cfg"]["val_interval"] = 1000
    config["default_hooks"]["checkpoint"]["interval"] = saves
    try:
        runner = parts.make_runner(work_dir, **config)
        runner.train()
        said = f"loss {float(runner.scalars.latest('loss')):.6f}"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return said, sorted(path.name for path in Path(work_dir).glob("iter_*"))
