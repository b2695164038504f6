"""What ZeRO exchanges, announced to a `Lockstep` before it communicates.

Stages 2 and 3 put gradients into buckets in the order in which they arrive, stage 1 at a window's end in the order of
parameters; stage 3 also gathers the parameters of each module. Stage 0 exchanges all gradients, zeros for missing ones,
and needs none of this.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.strategies.lockstep import WITH, Lockstep


def announce_exchanges(model: nn.Module, lockstep: Lockstep, stage: int) -> None:
    """Let what an engine of this stage exchanges be a step of ``lockstep``; after ``deepspeed.initialize``."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            step = lockstep.step if stage > 1 else lockstep.collect
            parameter.register_hook(partial(_then, step, lockstep.declare(WITH, name)))
    if stage == 3:
        lockstep.watch_forwards(model)
        for name, module in model.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                _announce_module(module, name or "the model", lockstep)


def announce_end(loss: Tensor, lockstep: Lockstep, stage: int, *, is_last: bool) -> None:
    """Begin a backward, and let its end be a step, before the engine exchanges what is left in its buckets.

    ``is_last``: this is the last backward of its window, after which stage 1 exchanges gradients.
    """

    lockstep.begin()

    def end() -> None:
        if stage > 1:
            lockstep.end_backward()
        elif is_last:
            lockstep.compare_collected()

    # The engine of autograd runs this when all gradients are there, as FSDP2 does it.
    loss.register_hook(lambda _: torch.autograd.Variable._execution_engine.queue_callback(end))  # type: ignore[attr-defined]


def _then(step: Any, number: int, *_: Any) -> None:
    step(number)


def _announce_module(module: nn.Module, name: str, lockstep: Lockstep) -> None:
    """The engine gathers a module's parameters before its forward and before its backward, by hooks of its own."""
    entered = lockstep.declare("entered", name)
    backward = lockstep.declare("came to the backward of", name)

    def announce_backward(_: nn.Module, args: Any, output: Any) -> None:
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(_then, lockstep.step, backward))

    module.register_forward_pre_hook(partial(_then, lockstep.step, entered), prepend=True)
    module.register_forward_hook(announce_backward)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from (tensor for value in output.values() for tensor in _tensors(value))
    elif isinstance(output, (list, tuple)):
        yield from (tensor for value in output for tensor in _tensors(value))
