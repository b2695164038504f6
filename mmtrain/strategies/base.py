"""The contract between the train loop and an engine: a strategy holds only what differs between engines."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.optim import OptimWrapper
from mmtrain.types import StepResult


class Strategy(ABC):
    """Runs one model on one kind of engine.

    The order of calls is fixed: `setup`, `prepare`, then per iteration `forward_context` and `backward`, and `step` at
    the end of a window, at last `teardown`. State goes in and out by plain parameter name, so that what one strategy
    saved another can read. The same config means the same mathematics on every strategy; an option that a strategy
    cannot honour is an error at `prepare`, never ignored.

    After `prepare`: ``model`` is the model as the user wrote it, ``module`` the callable that runs it (the wrapper
    where an engine needs one), ``optim`` the optimizer wrapper, or None in a run without training.
    """

    model: nn.Module
    module: nn.Module
    optim: OptimWrapper | None
    device: torch.device

    @abstractmethod
    def setup(self) -> None:
        """Set up processes and choose ``device``; before anything is built."""

    @abstractmethod
    def prepare(
        self,
        model: nn.Module,
        make_optim: Callable[[nn.Module], OptimWrapper] | None,
        compile_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Place and wrap the model, make the optimizer at the moment this engine wants it, compile where asked."""

    @abstractmethod
    def forward_context(self) -> AbstractContextManager[Any]:
        """The context in which the model is called: autocast, and whatever else the engine needs."""

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of ``loss`` (divided by the window's length already); synchronise ranks if ``last``."""

    @abstractmethod
    def step(self) -> StepResult:
        """Clip, step and clear the gradients at the end of a window."""

    @abstractmethod
    def model_state(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name; tensors may be sharded (DTensor) and share the model's memory."""

    @abstractmethod
    def load_model_state(self, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
        """Copy tensors into the model. Raises CheckpointError where names or shapes differ and ``strict`` is set."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors as ``<parameter name>/<slot>`` (``layers.0.weight/exp_avg``)."""

    @abstractmethod
    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `optimizer_state` gave. Raises CheckpointError where it does not belong to this optimizer."""

    @abstractmethod
    def teardown(self) -> None:
        """Leave what `setup` entered; called once, also after an error."""
