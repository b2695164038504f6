"""Builds a config's model the same way for a run and for an export."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from mmtrain.errors import ConfigError
from mmtrain.randomness import STREAM_BUILD, mix, seed_generators
from mmtrain.registry import MODELS, build


def build_model(cfg: Any, *, seed: int, context: AbstractContextManager[Any] | None = None) -> nn.Module:
    """Build ``cfg['model']`` from the run's ``seed`` and initialise it; a strategy builds it within its ``context``.

    ``init_weights`` is not called on a model with parameters on the meta device: its values come later.
    Raises ConfigError if the config has no model, or the model is not a `torch.nn.Module`.
    """
    if cfg.get("model") is None:
        raise ConfigError("the config has no 'model'; expected model=dict(type=..., ...)")
    seed_generators(mix(STREAM_BUILD, seed))
    with context or nullcontext():
        model = build(MODELS, cfg["model"], path="model")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    init_weights = getattr(model, "init_weights", None)
    if callable(init_weights) and not any(parameter.is_meta for parameter in model.parameters()):
        init_weights()
    return model
