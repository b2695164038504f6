"""Models that come with mmtrain; importing this registers them."""

from mmtrain.models.gpt import GPT
from mmtrain.models.layers import MLP, Attention, Block, RotaryPositions

__all__ = ["GPT", "MLP", "Attention", "Block", "RotaryPositions"]
