"""Notices the first NaN or Inf loss without making the device wait, and parameters that wait in vain to be trained."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmtrain.errors import RunError


class NonfiniteGuard:
    """Watches losses for NaN and Inf.

    On the CPU a loss is looked at as it comes. On an accelerator it stays there until `check`, which the loop calls at
    every log line, before every save and at the end, so that no iteration waits for the device and no checkpoint holds
    what a bad loss left. With ``mode="skip"`` the optimizer leaves out the update and nothing is raised here.
    """

    def __init__(self, mode: str, device: torch.device) -> None:
        self._stops = mode == "stop"
        self._now = device.type == "cpu"
        self._pending: list[tuple[int, Tensor]] = []

    def observe(self, iteration: int, loss: Tensor) -> None:
        """Note the loss of one iteration (counted from 1). Raises RunError on the CPU when it is not finite."""
        if not self._stops:
            return
        if self._now:
            value = loss.item()
            if not math.isfinite(value):
                raise _nonfinite(iteration, value)
        else:
            self._pending.append((iteration, loss.detach()))

    def check(self) -> None:
        """Look at what is pending. Raises RunError that names the first iteration whose loss was not finite."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        values = torch.stack([loss.float() for _, loss in pending]).tolist()
        for (iteration, _), value in zip(pending, values, strict=True):
            if not math.isfinite(value):
                raise _nonfinite(iteration, value)


class UntrainedGuard:
    """Watches the parameters that were frozen when the optimizers were made, and so are in none of them.

    A hook that unfreezes one later would train nothing, and no loss would tell.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        trained = {id(value) for one in optimizers for group in one.param_groups for value in group["params"]}
        self._parameters = [
            (name, parameter)
            for name, parameter in model.named_parameters()
            if not parameter.requires_grad and id(parameter) not in trained
        ]

    def check(self) -> None:
        """Raise RunError that names the first one that has been unfrozen."""
        for name, parameter in self._parameters:
            if parameter.requires_grad:
                raise RunError(
                    f"the model's {name} was frozen when the optimizer was made, which does not include it, and was "
                    "unfrozen later, so it would never be trained. Leave it trainable when the model is built, and "
                    "let a hook freeze it in before_train until it should train"
                )


def _nonfinite(iteration: int, value: float) -> RunError:
    return RunError(
        f"the loss of iteration {iteration} is {value}; the run stops here and older checkpoints are intact. Lower the "
        "learning rate, clip gradients (optim_wrapper.clip_grad), use bfloat16 instead of float16, or let such updates "
        "be skipped with train_cfg.nonfinite='skip'"
    )
