"""Models whose parameters are laid out in memory in another order than their shape."""

import parts
import strategy_parts
import torch
from torch import nn

from mmtrain.registry import MODELS


@MODELS.register_module()
class LaidOut(strategy_parts.TinyLanguageModel):
    """``layout``: "transposed" has a parameter that is a transposed view, "channels_last" a convolution in that format.

    Its values are those of "plain", whose memory is in the order of its shape. "expanded" has a parameter whose elements
    share memory.
    """

    def __init__(self, layout="plain", **kwargs):
        super().__init__(**kwargs)
        width = self.embed.weight.shape[1]
        weight = torch.randn(width, 5)
        self.mix = nn.Parameter(weight.t() if layout == "transposed" else weight.t().contiguous())
        if layout == "expanded":
            self.mix = nn.Parameter(torch.randn(5, 1).expand(5, width))
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        if layout == "channels_last":
            self.conv.to(memory_format=torch.channels_last)

    def forward(self, tokens, labels, noise):
        found = super().forward(tokens, labels, noise)
        image = self.embed(tokens)[:, :3, None, :].expand(-1, -1, 3, -1)
        extra = self.conv(image).square().mean() + (self.embed(tokens) @ self.mix.t()).square().mean()
        return {**found, "loss": found["loss"] + 0.1 * extra}


ODD = {
    "float64": lambda: torch.ones(3, 2, dtype=torch.float64),
    "complex": lambda: torch.ones(3, 2, dtype=torch.complex64),
    "bfloat16": lambda: torch.ones(3, 2, dtype=torch.bfloat16),
    "empty": lambda: torch.ones(0, 2),
    "one element": lambda: torch.ones(1),
    "frozen int8": lambda: torch.ones(3, 2, dtype=torch.int8),
    "frozen bool": lambda: torch.ones(3, 2, dtype=torch.bool),
    "five dimensions": lambda: torch.ones(1, 2, 1, 3, 1),
    "scalar": lambda: torch.ones(()),
}


@MODELS.register_module()
class Odd(strategy_parts.TinyLanguageModel):
    """Has one more parameter, of an unusual ``kind``."""

    def __init__(self, kind, **kwargs):
        super().__init__(**kwargs)
        self.odd = nn.Parameter(ODD[kind](), requires_grad="frozen" not in kind)

    def forward(self, tokens, labels, noise):
        found = super().forward(tokens, labels, noise)
        extra = self.odd.abs().float().square().sum() if self.odd.dtype != torch.bool else self.odd.float().sum()
        return {**found, "loss": found["loss"] + 0.1 * extra}


def trained(work_dir, layout, strategy, optimizer, **options):
    """How a run ends: what was raised, or its last loss."""
    config = strategy_parts.changes(2, strategy, iterations=12, **options)
    config["model"] = {"type": "Odd", "kind": layout} if layout in ODD else {"type": "LaidOut", "layout": layout}
    config["optim_wrapper"]["optimizer"] = optimizer
    config["optim_wrapper"]["paramwise_cfg"] = None
    try:
        runner = parts.make_runner(work_dir, **config)
        runner.train()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return runner.scalars.latest("loss")


def notices(work_dir, layout, strategy):
    """What a run has to say about its set-up."""
    runner = parts.make_runner(
        work_dir, **{**strategy_parts.changes(2, strategy), "model": {"type": "LaidOut", "layout": layout}}
    )
    runner.release()
    return runner.notices
