"""A GPT-style language model, small enough to read in one sitting."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtrain.errors import ConfigError, RunError
from mmtrain.models.layers import Block, RotaryPositions
from mmtrain.models.sampling import sample_tokens
from mmtrain.registry import MODELS, TRANSFORMS, build

IGNORED = -100  # a label of this value counts for nothing, as everywhere in PyTorch
RESIDUAL = ("attention.out", "mlp.down")  # the layers that write to the residual stream


@MODELS.register_module()
class GPT(nn.Module):
    """Decoder-only transformer (Radford et al., 2019): pre-norm blocks, embedding and output head share one weight.

    * ``vocab_size``: number of different tokens; ``context``: maximum number of tokens it sees at once;
    * ``layers``, ``heads``, ``width``: number of blocks, heads in each, channels of the residual stream;
    * ``positions``: "learned" is GPT-2's table, "rotary" turns queries and keys and learns faster when small;
    * ``bias``: whether linear layers and norms have one (GPT-2 does);
    * ``tokenizer``: what `generate` needs to read and write text: an object with ``encode`` and ``decode``, or the
      config of one; training does without.

    Raises ConfigError for a shape that cannot be built.
    """

    def __init__(  # noqa: PLR0913 - the hyperparameters of a model are its config
        self,
        vocab_size: int,
        context: int,
        *,
        layers: int,
        heads: int,
        width: int,
        dropout: float = 0.0,
        bias: bool = False,
        positions: str = "learned",
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        _check_shape(width, heads, positions)
        self.context, self.heads, self.width = context, heads, width
        self.tokenizer = build(TRANSFORMS, tokenizer, path="model.tokenizer") if _is_config(tokenizer) else tokenizer
        self.embed = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(context, width) if positions == "learned" else None
        self.rotary = RotaryPositions(context, width // heads) if positions == "rotary" else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout=dropout, bias=bias) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw all weights from torch's generator; also fills a model that ``to_empty`` left uninitialized.

        GPT-2's scheme: normal with deviation 0.02, divided by sqrt(2 x layers) where a layer writes to the residual
        stream, so that the stream's variance at the start does not grow with depth. The 0.02 belongs to a width of
        768; other widths take 0.02 x sqrt(768 / width), so that a layer's output is as large whatever the width.
        """
        self.head.weight = self.embed.weight  # ``to_empty`` makes two parameters of the shared one
        std = 0.02 * math.sqrt(768 / self.width)
        residual_std = std / math.sqrt(2 * max(1, len(self.blocks)))
        for name, module in self.named_modules():
            if isinstance(module, nn.LayerNorm | RotaryPositions):
                module.reset_parameters()
            elif isinstance(module, nn.Linear | nn.Embedding) and module is not self.head:
                nn.init.normal_(module.weight, std=residual_std if name.endswith(RESIDUAL) else std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def tensor_parallel_plan(self, size: int) -> dict[str, str]:
        """Which layers ``size`` processes divide among them, by name: attention heads, and channels inside the MLP.

        Embedding and head, which share one weight, are not divided. Raises ConfigError if the heads cannot be.
        """
        if self.heads % size:
            raise ConfigError(
                f"strategy.mesh.tp: the {self.heads} heads of the model cannot be divided among {size} processes; "
                "use a size that divides model.heads"
            )
        return {
            "blocks.*.attention.qkv": "colwise",
            "blocks.*.attention.out": "rowwise",
            "blocks.*.mlp.up": "colwise",
            "blocks.*.mlp.down": "rowwise",
        }

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, *, return_logits: bool = False
    ) -> dict[str, Tensor]:
        """Predict the next token at every position.

        ``input_ids`` (B, T) holds token numbers. ``labels`` (B, T) holds at [b, t] the token that follows
        ``input_ids[b, t]``: the dataset shifts them, the model does not. Labels of -100 are left out.

        Returns ``loss``, the mean cross-entropy in nats per token, if there are labels, and ``logits``
        (B, T, vocab_size) when there are none or with ``return_logits``: training does not use them, and with a
        large vocabulary they are the largest tensor. Raises RunError when T exceeds the context.
        """
        length = input_ids.shape[1]
        if length > self.context:
            raise RunError(
                f"model: a sequence of {length} tokens does not fit a context of {self.context}; "
                "raise model.context or shorten the data set's"
            )
        x = self.embed(input_ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(length, device=x.device))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, self.rotary)
        logits = self.head(self.norm(x))
        output = {}
        if labels is not None:
            output["loss"] = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        if labels is None or return_logits:
            output["logits"] = logits
        return output

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 200,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> str:
        """Continue ``prompt`` and return prompt and continuation.

        Without a ``generator`` the draws start from seed 0; the default generators, on which training depends, are
        never touched. ``temperature`` 0 takes the most likely token every time. The model sees the
        last ``context`` tokens. Raises ConfigError for a model without tokenizer.
        """
        if self.tokenizer is None:
            raise ConfigError("model.tokenizer: is not set, and text cannot be sampled without; give the model one")
        start = list(self.tokenizer.encode(prompt)) or [0]
        tokens = sample_tokens(
            self,
            start,
            count=max_new_tokens,
            context=self.context,
            temperature=temperature,
            top_k=top_k,
            generator=generator,
        )
        return prompt + self.tokenizer.decode(tokens)

    def num_parameters(self, *, trainable_only: bool = False) -> int:
        """Return the number of parameters, the shared weight counted once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    def flops_per_token(self) -> int:
        """Return the floating-point operations of one training token, forward and backward.

        6 N + 12 L W T (Chowdhery et al., 2022, appendix B): N parameters that multiply (the position table is only
        looked up; the shared embedding multiplies as the head), L layers, width W, T tokens of context.
        """
        table = self.positions.weight.numel() if self.positions is not None else 0
        attention = 12 * len(self.blocks) * self.width * self.context
        return 6 * (self.num_parameters() - table) + attention


def _is_config(tokenizer: Any) -> bool:
    return isinstance(tokenizer, Mapping) and "type" in tokenizer


def _check_shape(width: int, heads: int, positions: str) -> None:
    if positions not in ("learned", "rotary"):
        raise ConfigError(f"model.positions: {positions!r} is neither 'learned' nor 'rotary'")
    if heads < 1 or width % heads:
        raise ConfigError(f"model.width: {width} cannot be divided among model.heads={heads}")
    if positions == "rotary" and (width // heads) % 2:
        raise ConfigError(f"model.width: {width} gives {heads} heads an odd width; rotary positions need an even one")
