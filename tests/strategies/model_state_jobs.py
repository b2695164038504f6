"""Jobs of a group: runs of a model whose modules keep their state in their own way."""

import exactness
import strategy_parts
import torch
from torch import nn

from mmtrain import dist
from mmtrain.registry import MODELS


class Tally(nn.Module):
    """Keeps plain values, a tensor that it computes for the state, a growing buffer and an extra state."""

    def __init__(self):
        super().__init__()
        self.count, self.total = 0, torch.zeros(())
        self.register_buffer("history", torch.empty(0))
        self.register_buffer("late", None)

    def forward(self, x):
        if self.training:
            self.count += 1
            self.total = self.total + (1 + dist.rank()) * x.detach().float().mean()  # another one on each rank
            self.history = torch.cat([self.history, torch.full((1,), 1.0 / self.count)])
            self.late = torch.ones(2) * self.count
        x = x * (1 + 0.01 * torch.tanh(self.total))
        late = 0.0 if self.late is None else self.late.sum()
        return x * (1 + 0.01 * (torch.tanh(self.history.sum() + late) + self.count % 3))

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "total"] = self.total.clone()
        destination[prefix + "note"] = f"seen {self.count}"

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.total = state_dict.pop(prefix + "total")
        assert state_dict.pop(prefix + "note").startswith("seen")
        super()._load_from_state_dict(state_dict, prefix, *args)


@MODELS.register_module(force=True)
class TallyingLanguageModel(strategy_parts.TinyLanguageModel):
    def __init__(self, **options):
        super().__init__(**options)
        self.tally = Tally()

    def forward(self, tokens, labels, noise):
        outputs = super().forward(tokens, labels, noise)
        return {**outputs, "loss": self.tally(outputs["loss"])}


def train(work_dir, **options):
    """A run of it; returns what its parts end with on this rank."""
    model = {"type": "TallyingLanguageModel"}
    runner = exactness.train(
        work_dir, crash=options.pop("crash", None), **strategy_parts.changes(2, iterations=30, model=model, **options)
    )
    tally = runner.model.tally
    return tally.count, tally.history.tolist(), tally.late.tolist(), float(tally.total)
