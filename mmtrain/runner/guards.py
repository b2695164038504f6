"""Guards that stop a run which cannot train: a loss of NaN or Inf, and unfrozen parameters that no optimizer has."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmtrain.errors import RunError


class NonfiniteGuard:
    """Watches losses for NaN and Inf.

    Losses stay on their device until `check`, which the loop calls at every log line, before every save and at the end:
    no iteration waits for the device, and no checkpoint contains the effect of a bad loss. On the CPU, where there is
    nothing to wait for, `before_update` checks each window, so that the optimizer does not even step. With
    ``mode="skip"`` nothing is watched here: the optimizer wrapper skips the update.
    """

    def __init__(self, mode: str, device: torch.device) -> None:
        self._stops = mode == "stop"
        self._is_cpu = device.type == "cpu"
        self._pending: list[tuple[int, Any]] = []

    def observe(self, iteration: int, loss: Tensor | float) -> None:
        """Keep the detached loss of one iteration (counted from 1) for the next check."""
        if self._stops:
            self._pending.append((iteration, loss))

    def before_update(self) -> None:
        """Check before the optimizer steps if that costs no wait. Raises RunError."""
        if self._is_cpu and self._pending:
            self.check()

    def check(self) -> None:
        """Check the losses since the last check. Raises RunError that names the first iteration with a bad loss."""
        pending, self._pending = self._pending, []
        if not self._is_cpu and pending:
            losses = torch.stack([torch.as_tensor(loss).float().reshape(()) for _, loss in pending]).tolist()
            pending = [(iteration, loss) for (iteration, _), loss in zip(pending, losses, strict=True)]
        for iteration, loss in pending:
            value = float(loss)
            if not math.isfinite(value):
                raise _nonfinite(iteration, value)


class UntrainedGuard:
    """Watches the parameters that were frozen when the optimizers were made, so that no optimizer has them.

    If a hook unfreezes one later, it is still not trained, and no loss shows it.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        self._optimizers = list(optimizers)
        trained = self._trained()
        self._parameters = [
            (name, parameter)
            for name, parameter in model.named_parameters()
            if not parameter.requires_grad and id(parameter) not in trained
        ]

    def _trained(self) -> set[int]:
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        return {id(parameter) for group in groups for parameter in group["params"]}

    def check(self) -> None:
        """Raise RunError that names the first parameter that has been unfrozen and is in no group."""
        unfrozen = [(name, parameter) for name, parameter in self._parameters if parameter.requires_grad]
        if not unfrozen:
            return
        trained = self._trained()
        for name, parameter in unfrozen:
            if id(parameter) not in trained:
                raise RunError(
                    f"{name} was frozen when the optimizer was made and has been unfrozen since, but the optimizer "
                    "does not have it, so it would never be trained. Add it in the hook (optimizer.add_param_group), "
                    "or leave it trainable when the model is built and freeze it in a hook's before_train until it "
                    "should train"
                )


def _nonfinite(iteration: int, value: float) -> RunError:
    return RunError(
        f"the loss of iteration {iteration} is {value}, so the run stops; existing checkpoints are intact. Lower the "
        "learning rate, clip gradients (optim_wrapper.clip_grad), use bfloat16 instead of float16, or skip such "
        "updates with train_cfg.nonfinite='skip'"
    )
