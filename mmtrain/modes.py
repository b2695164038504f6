"""Training and evaluation mode of modules, which may be mixed: a frozen norm stays in evaluation mode in training."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from mmtrain.printable import listed


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Afterwards each module is in the mode it was in.

    Modes are set by ``train()``, because modules override it: some merge weights there, or keep a part in evaluation
    mode. ``module.train()`` alone would switch all others, such as a norm that a hook put into evaluation mode.
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:  # parents come first
            if part.training != training:
                part.train(training)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Set ``module`` to evaluation mode; afterwards each of its modules is in the mode it was in."""
    with modes_kept(module):
        module.eval()
        yield


def begin_training(module: nn.Module, model: nn.Module) -> list[str]:
    """Set ``module``, which runs ``model``, to training mode, and return lines about what is not as ``train()`` has it.

    A part that is in evaluation mode inside a model in training mode was put there on purpose, in ``__init__`` or by a
    hook, and stays there. Hugging Face's ``from_pretrained`` returns models in evaluation mode, so those are set to
    training mode, as any loop that calls ``model.train()`` does.
    """
    pretrained = {name for name, part in model.named_modules() if not part.training and _is_pretrained(part)}
    kept = [
        (name, part)
        for name, part in model.named_modules()
        if model.training and not part.training and not any(_is_in(name, other) for other in pretrained)
    ]
    module.train()
    for _, part in kept:
        if part.training:
            part.train(False)
    lines = []
    if kept:
        lines.append(
            f"These modules are in evaluation mode since the model was built and stay in it: {_outermost(kept)}. "
            "Call train() on them in __init__ if they should train."
        )
    if pretrained - {""}:
        lines.append(
            f"Set to training mode: {', '.join(sorted(pretrained)[:5])} (from_pretrained returned it in evaluation "
            "mode). To keep it in evaluation mode, call eval() on it in a hook's before_train."
        )
    return lines


def _is_pretrained(part: nn.Module) -> bool:
    kind = type(part)
    return callable(getattr(kind, "from_pretrained", None)) and not kind.__module__.startswith("torch.")


def _is_in(name: str, other: str) -> bool:
    """Whether a module's name is that of another or of a part of it."""
    return other in (name, "") or name.startswith(f"{other}.")


def _outermost(parts: list[tuple[str, nn.Module]]) -> str:
    names = [name for name, _ in parts]
    outer = [name for name in names if not any(name != other and _is_in(name, other) for other in names)]
    return listed(outer)
