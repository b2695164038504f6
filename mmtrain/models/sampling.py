"""Draws tokens from a language model, one after another."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmtrain.modes import evaluation_mode


@torch.no_grad()
def sample_tokens(
    model: nn.Module,
    start: Sequence[int],
    *,
    count: int,
    context: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Return ``count`` tokens that follow ``start``, drawn from ``model(input_ids=...)["logits"]``.

    The model is called in evaluation mode; afterwards every module is in the mode it was in. The draws are those of
    ``generator``, on its device, and without one those of a CPU generator with seed 0; no default generator is touched.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    device = next(model.parameters()).device
    tokens = list(start)
    with evaluation_mode(model):
        for _ in range(count):
            window = torch.tensor([tokens[-context:]], device=device)
            logits = model(input_ids=window)["logits"][0, -1]
            logits = logits.float().to(generator.device)
            tokens.append(draw(logits, temperature=temperature, top_k=top_k, generator=generator))
    return tokens[len(start) :]


def draw(logits: Tensor, *, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """Draw one token from ``logits`` (vocab_size,): the most likely at temperature 0, else one of the ``top_k``."""
    if temperature <= 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        best, places = logits.topk(top_k)
        return int(places[torch.multinomial((best / temperature).softmax(0), 1, generator=generator)])
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))
