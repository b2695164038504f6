"""How much each micro-batch of a window counts: in proportion to its samples, or to its tokens.

The loss of a micro-batch is a mean, and a mean of means is the mean of all only if all have the same size. So losses
are weighted: an update has the gradient of the mean over all samples of its window on all ranks, or over all tokens if
the model's output says how many its loss is the mean of (``num_tokens``).

If sizes are known when the window opens, weights are right from the start. Otherwise they are relative to the first
micro-batch, and the gradients are multiplied once, at the window's end. In a window of equal sizes every weight is
exactly 1 and nothing changes.
"""

from typing import Any

import torch
from torch import Tensor

from mmtrain import dist
from mmtrain.data import Stream
from mmtrain.errors import ConfigError, RunError
from mmtrain.optim import OptimWrapper
from mmtrain.progress import Progress
from mmtrain.runner.run import Run
from mmtrain.types import MicroBatch


class WindowWeights:
    """The weights of one window after the other; sets ``gradient_scale`` of the optimizer wrapper at their ends.

    ``counts_tokens`` says whether the window in progress is weighted by tokens. Raises ConfigError if the engine could
    not weight this data set's batches.
    """

    def __init__(self, run: Run, optim: OptimWrapper) -> None:
        assert run.train_dataloader is not None
        self.counts_tokens = False
        self._strategy = run.strategy
        self._model = type(run.model).__name__
        self._optim = optim
        self._device = run.device
        self._samples = _SampleWeights(run.train_dataloader)
        self._tokens = _TokenWeights(run.device)
        if optim.accumulative_counts > 1:
            self._check_sizes_are_known(run.train_dataloader)

    def open(self, position: Progress, length: int) -> None:
        """Begin a window of ``length`` micro-batches, more than one, at a position."""
        self._samples.open(position, length)

    def by_samples(self, mb: MicroBatch, samples: int) -> float:
        """What the loss of a micro-batch of ``samples`` (of all ranks) counts in its window."""
        weight = self._samples.take(samples)
        if mb.is_last:
            self._optim.gradient_scale = self._samples.gradient_scale
            if not self.counts_tokens:
                self._check_scale()
        return weight

    def by_tokens(self, mb: MicroBatch, tokens: Any, *, is_stand_in: bool) -> tuple[Any, Any]:
        """What a loss that is the mean of ``tokens`` on this rank counts among the ranks, and in its window.

        A number or a 0-d tensor is given, and two are returned: on a device nothing is read. A collective. Raises
        RunError if ``tokens`` is None while other micro-batches of the window have a number.
        """
        if tokens is None or (mb.index > 0 and not self.counts_tokens):
            raise RunError(
                f"{self._model} returned num_tokens for some micro-batches of an update and not for others, so they "
                "cannot be weighted; return it always or never"
            )
        self.counts_tokens = not mb.is_last
        if mb.length == 1 and dist.world_size() == 1:
            return 1.0, 1.0
        weights = self._tokens.take(tokens, opens=mb.index == 0, is_stand_in=is_stand_in)
        if mb.is_last and mb.length > 1:
            may_read = self._device.type == "cpu" or not self._strategy.rescales_gradients
            self._optim.gradient_scale = self._tokens.gradient_scale(mb.length, read=may_read)
            self._check_scale()
        return weights

    def _check_scale(self) -> None:
        if self._optim.gradient_scale is not None and not self._strategy.rescales_gradients:
            engine = type(self._strategy).__name__
            raise RunError(
                f"the micro-batches of an update have unequal sizes that are known too late for {engine}, which cannot "
                "multiply gradients that it has divided among the ranks; use optim_wrapper.accumulative_counts=1, or "
                "FSDPStrategy"
            )

    def _check_sizes_are_known(self, stream: Stream) -> None:
        if self._strategy.rescales_gradients or stream.has_equal_batches or stream.sizes_ahead(0, 0, 1) is not None:
            return
        raise ConfigError(
            f"optim_wrapper.accumulative_counts={self._optim.accumulative_counts}: the last batch of "
            f"{type(stream.dataset).__name__} may be smaller, which {type(self._strategy).__name__} learns too late to "
            "weight it; set train_dataloader.drop_last=True, or accumulative_counts=1, or use FSDPStrategy"
        )


class _SampleWeights:
    """Weights by samples of all ranks; a rank's part of a micro-batch is `types.Batch.weight`."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._basis: float | None = None  # samples of a micro-batch of weight 1
        self._length, self._sum = 1, 0.0

    def open(self, position: Progress, length: int) -> None:
        sizes = self._stream.sizes_ahead(position.epoch, position.offset, length)
        self._basis = None if sizes is None else sum(sizes) / length
        self._length, self._sum = length, 0.0

    def take(self, samples: int) -> float:
        if self._basis is None:
            self._basis = samples
        weight = samples / self._basis
        self._sum += weight
        return weight

    @property
    def gradient_scale(self) -> float | None:
        """What to multiply the gradients by after the last micro-batch; None for 1."""
        is_one = abs(self._sum - self._length) <= 1e-9 * self._length
        return None if is_one else self._length / self._sum


class _TokenWeights:
    """Weights by tokens, which are counted on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._dtype = torch.float32 if device.type == "mps" else torch.float64  # exact for counts up to 2^53
        self._basis = self._sum = torch.zeros(())

    def take(self, count: Tensor | float, *, opens: bool, is_stand_in: bool) -> tuple[Tensor, Tensor]:
        own = self._on_device(count)
        if is_stand_in:  # its samples are another rank's
            own = torch.zeros_like(own)
        total = dist.sum_over_ranks(own)
        if opens:
            self._basis, self._sum = total.clamp_min(1), torch.zeros_like(total)
        self._sum = self._sum + total
        rank = own * dist.world_size() / total.clamp_min(1)
        return rank.float(), (rank * (total / self._basis)).float()

    def gradient_scale(self, length: int, *, read: bool) -> Tensor | None:
        """What to multiply the gradients by after the last of ``length`` micro-batches; with ``read`` None for 1."""
        scale = length * self._basis / self._sum.clamp_min(1)
        return None if read and scale.item() == 1 else scale

    def _on_device(self, count: Any) -> Tensor:
        if isinstance(count, Tensor):
            return count.detach().to(self._device, self._dtype, non_blocking=True).reshape(())
        return torch.full((), float(count), dtype=self._dtype, device=self._device)
