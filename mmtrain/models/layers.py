"""The parts of the GPT: positions, attention, feed-forward network, block.

Shapes: B sequences in the batch, T tokens in a sequence, W width, H heads, D = W / H width of a head.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RotaryPositions(nn.Module):
    """Rotary position embedding (Su et al., 2021, eq. 34): pairs of channels turn with the position.

    Queries and keys are rotated in the same way, so attention depends on distances, not on absolute positions. It has
    no parameters; the tables of ``cos`` and ``sin`` (T x D) are buffers that are not saved.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, context: int, head_width: int, base: float = 10_000.0) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("cos", torch.empty(context, head_width), persistent=False)
        self.register_buffer("sin", torch.empty(context, head_width), persistent=False)

    def reset_parameters(self) -> None:
        """Fill the tables; also needed after ``to_empty``, which leaves buffers without values."""
        context, head_width = self.cos.shape
        pairs = torch.arange(0, head_width, 2, device=self.cos.device, dtype=torch.float32)
        places = torch.arange(context, device=self.cos.device, dtype=torch.float32)
        angles = torch.outer(places, self.base ** (-pairs / head_width)).repeat(1, 2)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        """Turn ``x`` (B, H, T, D) by its positions 0..T-1."""
        length = x.shape[-2]
        first, second = x.chunk(2, dim=-1)
        turned = x * self.cos[:length] + torch.cat((-second, first), dim=-1) * self.sin[:length]
        # Under autocast x is bfloat16 and the tables are float32; attention needs q, k and v of one type.
        return turned.type_as(x)


class Attention(nn.Module):
    """Causal self-attention of several heads.

    The output channels of ``qkv`` are ordered (H, 3, D) and not (3, H, D): tensor parallelism divides them into
    contiguous parts, and each part then has complete heads with their queries, keys and values.
    """

    def __init__(self, width: int, heads: int, *, dropout: float, bias: bool) -> None:
        super().__init__()
        self.head_width = width // heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, rotate: nn.Module | None = None) -> Tensor:
        """Mix ``x`` (B, T, W) along T; position t sees positions 0..t."""
        batch, length, _ = x.shape
        # -1 and not H: under tensor parallelism this process has only some of the heads.
        heads = self.qkv(x).view(batch, length, -1, 3, self.head_width).transpose(1, 2)
        query, key, value = heads.unbind(dim=3)
        if rotate is not None:
            query, key = rotate(query), rotate(key)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """Feed-forward network, four times as wide inside, with GELU."""

    def __init__(self, width: int, *, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=bias)
        self.down = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (B, T, W), each position independently."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """One layer of a pre-norm transformer: attention, then the feed-forward network, each added to its input."""

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0, bias: bool = False) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, bias=bias)
        self.attention = Attention(width, heads, dropout=dropout, bias=bias)
        self.norm_2 = nn.LayerNorm(width, bias=bias)
        self.mlp = MLP(width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotate: nn.Module | None = None) -> Tensor:
        """Map ``x`` (B, T, W); ``rotate`` is the rotary position embedding, if the model has one."""
        x = x + self.dropout(self.attention(self.norm_1(x), rotate))
        return x + self.dropout(self.mlp(self.norm_2(x)))
