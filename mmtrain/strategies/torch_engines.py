"""What strategies on torch share: the optimizer steps here, and state has the names in the model."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from mmtrain import dist, model_state
from mmtrain.errors import ConfigError
from mmtrain.strategies import optimizer_state
from mmtrain.strategies.base import OptimizerState, SavedTensor, Strategy
from mmtrain.types import MicroBatch, StepResult


class OwnOptimizer(Strategy):
    """A strategy whose optimizer is torch's, over the parameters under their names in the model."""

    def forward_context(self, mb: MicroBatch) -> AbstractContextManager[Any]:
        assert self.optim is not None
        return self.optim.forward_context(self.module, mb)

    def backward(self, loss: Tensor, mb: MicroBatch) -> None:
        assert self.optim is not None
        self.optim.backward(loss)  # torch decides in the forward whether this backward exchanges gradients

    def step(self) -> StepResult:
        assert self.optim is not None
        return self.optim.finish_window()

    def model_state(self) -> dict[str, Tensor]:
        return model_state.tensors_of(self.model)

    def optimizer_state(self) -> OptimizerState:
        return OptimizerState({}) if self.optim is None else optimizer_state.capture(self.model, self.optim)

    def check_optimizer_state(self, state: OptimizerState) -> None:
        if self.optim is not None:
            optimizer_state.check(self.model, self.optim, state)

    def follow_memory_format(self) -> None:
        if self.optim is not None:
            optimizer_state.align(self.optim)

    def optimizer_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor]:
        return optimizer_state.optimizer_targets(self.model, saved)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        if self.optim is not None:
            optimizer_state.restore(self.model, self.optim, state)


class TorchEngine(OwnOptimizer):
    """A strategy on torch's wrappers; subclasses say how the model is wrapped and when gradients are exchanged."""

    def setup(self) -> None:
        if not dist.is_distributed():
            name = type(self).__name__
            raise ConfigError(
                f"strategy.type: {name} needs several processes and this one is alone; start them with "
                f"torchrun --nproc-per-node=N, or leave `strategy` out"
            )
        self.device = dist.default_device()

    def share_buffers(self) -> None:
        model_state.broadcast_buffers(self.model)

    def teardown(self) -> None:
        """The process group outlives the strategy: who joined it leaves it."""
