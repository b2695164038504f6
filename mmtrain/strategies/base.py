"""The contract between the train loop and an engine: a strategy holds only what differs between engines."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmtrain import model_state
from mmtrain.optim import OptimWrapper
from mmtrain.types import MicroBatch, StepResult


class SavedTensor(NamedTuple):
    """What is known of a saved tensor before it is read: its full shape and its type."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class OptimizerState(NamedTuple):
    """An optimizer's state by name.

    ``tensors`` are named ``<parameter name>/<slot>`` (``layers.0.weight/exp_avg``). ``values`` are plain values by the
    optimizer's name in the wrapper: what the optimizer keeps beside such tensors. None in checkpoints of earlier
    versions and of engines that keep nothing else; numbers are then 0-d float64 tensors.
    """

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any] | None = None


class TrainedTensor(NamedTuple):
    """A parameter that trains: its memory here (a DTensor where the engine shards it), and its full shape."""

    tensor: Tensor
    shape: torch.Size


class Native(NamedTuple):
    """How an engine saves in a format of its own.

    ``description`` (JSON values) goes into the manifest and is what `Strategy.takes_native` judges later; ``write``
    puts files into the open directory of a checkpoint, on every rank. They hold the model and the optimizer.
    """

    description: dict[str, Any]
    write: Callable[[Path], None]


class Strategy(ABC):
    """Runs one model on one kind of engine.

    The order of calls is fixed: `setup`, `prepare`, then per iteration `forward_context` and `backward`, and `step` at
    the end of a window, finally `teardown`. State goes in and out by plain parameter name, so that what one strategy
    saved another can read. The same config means the same mathematics on every strategy; an option that a strategy
    cannot honour is an error at `prepare`, never ignored.

    After `prepare`: ``model`` is the model as the user wrote it, ``module`` the callable that runs it (the wrapper
    where an engine needs one), ``optim`` the optimizer wrapper, or None in a run without training.
    """

    model: nn.Module
    module: nn.Module
    optim: OptimWrapper | None
    device: torch.device

    #: Sentences for the log about what `prepare` changed.
    notices: Sequence[str] = ()
    #: Whether a model whose own ``train_step`` runs forward and backward trains correctly under this engine.
    takes_own_train_step = True
    #: Whether the gradients of a window can be multiplied at its end.
    rescales_gradients = True
    #: Whether every rank must run forward when one does (parameters are gathered there).
    forward_is_collective = False
    #: How many ranks with consecutive numbers hold one copy of the model and work on the same samples; after `setup`.
    model_parallel = 1

    def build_context(self) -> AbstractContextManager[Any]:
        """The context in which the model is built; `prepare` initialises a model that it leaves without values."""
        return nullcontext()

    @property
    def evaluation_module(self) -> nn.Module:
        """What evaluation calls; ranks may call it differently often unless ``forward_is_collective``."""
        return self.module

    def share_buffers(self) -> None:  # noqa: B027 (one process has nothing to share)
        """Give every rank rank 0's persistent buffers (running statistics); before evaluation and before a save."""

    def check_in_step(self) -> None:  # noqa: B027 (few engines go wrong without an error)
        """Raise RunError if ranks ran different parts of the model since the last check; before a save and around an
        evaluation. A collective.
        """

    @abstractmethod
    def setup(self) -> None:
        """Set up processes and choose ``device``; before anything is built."""

    def check_config(self, cfg: Any) -> None:  # noqa: B027 (most strategies contradict nothing)
        """Raise ConfigError if the run's config contradicts this strategy's options; after `setup`."""

    @abstractmethod
    def prepare(
        self,
        model: nn.Module,
        make_optim: Callable[[nn.Module], OptimWrapper] | None,
        compile_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Place and wrap the model, create the optimizer when this engine needs it, and compile if requested."""

    @abstractmethod
    def forward_context(self, mb: MicroBatch) -> AbstractContextManager[Any]:
        """The context in which the model is called: autocast, and no exchange of gradients before ``mb.is_last``."""

    @abstractmethod
    def backward(self, loss: Tensor, mb: MicroBatch) -> None:
        """Add the gradients of ``loss``, which has its weight in the window; exchange them if ``mb.is_last``."""

    @abstractmethod
    def step(self) -> StepResult:
        """Clip, step and clear the gradients at the end of a window."""

    @abstractmethod
    def model_state(self) -> dict[str, Tensor]:
        """The tensors of the model's state by name; they may be sharded (DTensor) and share the model's memory."""

    def model_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor]:
        """Memory for saved tensors of the model, to be filled and given to `load_model_state`.

        It is the model's own where possible. What the model has and ``saved`` lacks is among them, what the model does
        not know is not.
        """
        return model_state.targets(self.model, saved)

    def load_model_state(self, state: Mapping[str, Any]) -> None:
        """Put back filled `model_targets`, and what `mmtrain.model_state.others_of` gave. Raises CheckpointError."""
        model_state.load(self.model, state)

    def trained_tensors(self) -> dict[str, TrainedTensor]:
        """The parameters that train by name, for whoever averages them."""
        named = self.model.named_parameters()
        return {name: TrainedTensor(value, value.shape) for name, value in named if value.requires_grad}

    def full_size(self, parameter: Tensor) -> int:
        """How many elements a parameter of the model has over all ranks."""
        return parameter.numel()

    @abstractmethod
    def optimizer_state(self) -> OptimizerState:
        """The optimizer's state by name, sharing its memory. Raises ConfigError for what no name can be given to."""

    def check_optimizer_state(self, state: OptimizerState) -> None:  # noqa: B027 (some hold any)
        """Raise ConfigError for state that cannot be saved or restored; after the first update. A collective."""

    def follow_memory_format(self) -> None:  # noqa: B027 (an engine may hold the moments in memory of its own)
        """Lay moments out as their parameters are, which a hook may have changed (``channels_last``)."""

    def forget_gathered(self) -> None:  # noqa: B027 (most engines gather nothing)
        """Drop copies of parameters that were gathered for a forward, because the parameters may change behind them."""

    def optimizer_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor]:
        """Memory for the saved optimizer tensors, to be filled and given to `load_optimizer_state`.

        Sharded if the strategy shards its moments, so that each process reads only what it needs.
        """
        return {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in saved.items()}

    @abstractmethod
    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Restore what `optimizer_state` gave; the optimizer keeps the tensors.

        Raises CheckpointError if the state does not belong to this optimizer.
        """

    def native(self, *, frozen: bool = True) -> Native | None:
        """How this engine saves its own files; None if the tensors by name are saved. ``frozen``: these too."""
        return None

    def takes_native(self, description: Mapping[str, Any]) -> bool:
        """Whether `load_native` can read files of that description as they are."""
        return False

    def load_native(self, directory: Path, description: Mapping[str, Any]) -> None:
        """Read what `native` wrote; a collective. Raises CheckpointError."""
        raise NotImplementedError

    def check_separate_disks(self, root: Path) -> None:  # noqa: B027 (the tensors by name can be on several disks)
        """Raise ConfigError if this engine cannot save and restore when the ranks do not share ``root``."""

    @abstractmethod
    def teardown(self) -> None:
        """Leave what `setup` entered; called once, also after an error."""
