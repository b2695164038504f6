"""Hooks that free cached memory and average buffers."""

from typing import Any

import torch

from mmtrain import dist
from mmtrain.hooks.base import Hook
from mmtrain.registry import HOOKS
from mmtrain.runner.interface import Runner


@HOOKS.register_module()
class EmptyCacheHook(Hook):
    """Frees unused cached memory of the device, at the points that are switched on."""

    priority = "NORMAL"

    def __init__(self, before_epoch: bool = False, after_epoch: bool = True, *, after_iter: bool = False) -> None:
        self._wanted = {"before_epoch": before_epoch, "after_epoch": after_epoch, "after_iter": after_iter}

    def before_train_epoch(self, runner: Runner) -> None:
        self._empty("before_epoch")

    def after_train_epoch(self, runner: Runner, metrics: Any = None) -> None:
        self._empty("after_epoch")

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self._empty("after_iter")

    before_val_epoch = before_test_epoch = before_train_epoch
    after_val_epoch = after_test_epoch = after_train_epoch
    after_val_iter = after_test_iter = after_train_iter

    def _empty(self, point: str) -> None:
        if self._wanted[point] and torch.cuda.is_available():
            torch.cuda.empty_cache()


@HOOKS.register_module()
class SyncBuffersHook(Hook):
    """Averages the model's floating-point buffers (running statistics) over ranks.

    It does so after each epoch, and before a validation inside an epoch. A collective call; nothing happens in a single
    process.
    """

    priority = "NORMAL"

    def __init__(self) -> None:
        self._synced_at = -1

    def after_train_epoch(self, runner: Runner) -> None:
        self._sync(runner)

    def before_val_epoch(self, runner: Runner) -> None:
        self._sync(runner)

    def _sync(self, runner: Runner) -> None:
        if dist.world_size() == 1 or self._synced_at == runner.progress.iteration:
            return
        self._synced_at = runner.progress.iteration
        average_buffers(runner.model)


def average_buffers(model: torch.nn.Module) -> None:
    """Set every floating-point buffer to its mean over ranks, with one all-reduce per device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for buffer in model.buffers():
        if buffer.is_floating_point():
            groups.setdefault((buffer.device, buffer.dtype), []).append(buffer)
    with torch.no_grad():
        for buffers in groups.values():
            mean = dist.mean_over_ranks(torch.cat([buffer.reshape(-1) for buffer in buffers]))
            for buffer, part in zip(buffers, mean.split([buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(part.view_as(buffer))
