"""Running averages of the weights, used for validation and test."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.dtensor import copy_from_full, full_tensor, is_dtensor, local_tensor
from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.hooks.base import Hook
from mmtrain.registry import HOOKS
from mmtrain.runner.interface import Runner

_TYPES = ("ExponentialMovingAverage", "MomentumAnnealingEMA", "StochasticWeightAverage")


@HOOKS.register_module()
class EMAHook(Hook):
    """Keeps a running average of the model's weights, and validates and tests with it.

    It advances with every update that was applied: not inside an accumulation window, and not for a step that a loss
    scaler skipped. With the newest parameters ``x`` and ``n`` updates averaged before (formulas of
    ``mmengine.model.averaged_model``), ``average += weight * (x - average)``, where weight is

    * ExponentialMovingAverage: ``momentum``;
    * MomentumAnnealingEMA: ``max(momentum, gamma / (gamma + n))``;
    * StochasticWeightAverage: ``1 / (n // interval + 1)``;

    every ``interval`` updates; the first one copies. Averaging begins at iteration ``begin_iter`` or epoch
    ``begin_epoch`` (from 1). Parameters that do not train are left out: their average is themselves.
    ``update_buffers`` averages floating-point buffers too. Averages of half-precision parameters are kept in float32,
    where small steps are not rounded away.

    Raises ConfigError for invalid arguments, CheckpointError for the state of another model.
    """

    priority = "NORMAL"

    def __init__(
        self,
        ema_type: str = "ExponentialMovingAverage",
        strict_load: bool = False,
        *,
        begin_iter: int = 0,
        begin_epoch: int = 0,
        momentum: float = 0.0002,
        gamma: int = 100,
        interval: int = 1,
        update_buffers: bool = False,
    ) -> None:
        self.ema_type = ema_type
        self.strict_load = strict_load
        self.begin_iter = begin_iter
        self.begin_epoch = begin_epoch
        self.momentum = momentum
        self.gamma = gamma
        self.interval = interval
        self.update_buffers = update_buffers
        self.steps = 0
        self.averages: dict[str, Tensor] = {}
        self._parameters: dict[str, Tensor] | None = None
        self._shapes: dict[str, torch.Size] = {}  # of the full parameters: an engine may have sharded flat ones
        self._matched = False
        self._trained: dict[str, Tensor] | None = None
        self._check()

    def _check(self) -> None:
        if self.ema_type not in _TYPES:
            raise ConfigError(f"EMAHook: ema_type is {self.ema_type!r}; expected one of {', '.join(_TYPES)}")
        if not 0.0 < self.momentum < 1.0:
            raise ConfigError(
                f"EMAHook: momentum is {self.momentum}; expected a number between 0 and 1, the weight of the newest "
                "parameters (0.0002, not 0.9998)"
            )
        if self.begin_iter and self.begin_epoch:
            raise ConfigError("EMAHook: begin_iter and begin_epoch are both set; expected one of them")
        for name, least in (("begin_iter", 0), ("begin_epoch", 0), ("gamma", 1), ("interval", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"EMAHook: {name} is {getattr(self, name)}; expected {least} or more")

    # ---- training -----------------------------------------------------------------------------------------------
    def before_train(self, runner: Runner) -> None:
        """Note which parameters train, and refuse a beginning after the end of the run."""
        for name, end in (("begin_iter", runner.max_iters), ("begin_epoch", runner.max_epochs)):
            if end is not None and getattr(self, name) > end:
                raise ConfigError(f"EMAHook: {name} is {getattr(self, name)}, but the run ends at {end}")
        # Now, not at the first update: some models switch requires_grad on and off while they train.
        trained = runner.strategy.trained_tensors()
        self._parameters = {name: found.tensor for name, found in trained.items()}
        self._shapes = {name: found.shape for name, found in trained.items()}

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        result = runner.update_result
        if result is not None and result.applied:
            begun = runner.epoch + 1 >= self.begin_epoch if self.begin_epoch else runner.iter + 1 >= self.begin_iter
            if begun:
                self._tick(runner.model)

    @torch.no_grad()
    def _tick(self, model: nn.Module) -> None:
        sources = self._sources(model)
        if self.steps == 0:
            self.averages = {name: _copy(source) for name, source in sources.items()}
        elif self.steps % self.interval == 0:
            averages, values = [], []
            for name, source in sources.items():
                average = self.averages[name]
                averages.append(local_tensor(average))
                values.append(local_tensor(source).to(average.dtype))
            if averages:
                torch._foreach_lerp_(averages, values, self._weight())
        self.steps += 1

    def _weight(self) -> float:
        if self.ema_type == "StochasticWeightAverage":
            return 1.0 / (self.steps // self.interval + 1)
        if self.ema_type == "MomentumAnnealingEMA":
            return max(self.momentum, self.gamma / (self.gamma + self.steps))
        return self.momentum

    def _sources(self, model: nn.Module) -> dict[str, Tensor]:
        """What is averaged, by name. The first call moves averages that were loaded to its devices and shards."""
        if self._parameters is None:  # a run that only evaluates: what was averaged when it trained
            self._parameters = {name: value for name, value in model.named_parameters() if name in self.averages}
        sources = self._parameters
        if self.update_buffers:  # looked up each time: a module may replace the tensor of a buffer
            kept = model.state_dict(keep_vars=True)
            buffers = ((name, value) for name, value in model.named_buffers() if name in kept)
            sources = {**sources, **{name: value for name, value in buffers if value.is_floating_point()}}
        if self.steps and not self._matched:
            self.averages = self._match(sources)
        self._matched = True
        return sources

    def _match(self, sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The averages of exactly these sources, on their devices; a missing one starts as a copy."""
        missing = [name for name in sources if name not in self.averages]
        unexpected = [name for name in self.averages if name not in sources]
        if self.strict_load and (missing or unexpected):
            raise CheckpointError(
                f"EMAHook: the saved averages belong to another model: missing {missing[:3]}, unexpected "
                f"{unexpected[:3]}; set strict_load=False to start missing ones from the weights"
            )
        matched = {}
        for name, source in sources.items():
            average = self.averages.get(name)
            if average is None:
                matched[name] = _copy(source)
                continue
            shape = self._shapes.get(name, source.shape)
            if average.shape != shape:
                raise CheckpointError(
                    f"EMAHook: the saved average of {name!r} has shape {tuple(average.shape)}, "
                    f"the model's has {tuple(shape)}"
                )
            matched[name] = _placed_like(average.reshape(source.shape), source)
        return matched

    # ---- validation and test ------------------------------------------------------------------------------------
    def before_val_epoch(self, runner: Runner) -> None:
        self._swap_in(runner.model)

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        self._swap_out(runner.model)
        runner.strategy.forget_gathered()  # copies of the averages

    def before_test_epoch(self, runner: Runner) -> None:
        self._swap_in(runner.model)

    def after_test_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        self._swap_out(runner.model)
        runner.strategy.forget_gathered()

    def on_exception(self, runner: Runner, error: BaseException) -> None:
        """Put the trained weights back after an error inside a validation."""
        self._swap_out(runner.model)

    @torch.no_grad()
    def _swap_in(self, model: nn.Module) -> None:
        if self.steps == 0 or self._trained is not None:
            return
        sources = self._sources(model)
        # A copy of the trained weights, not an exchange: a float32 average does not survive in a bfloat16 weight.
        self._trained = {name: source.detach().clone() for name, source in sources.items()}
        for name, source in sources.items():
            local_tensor(source).copy_(local_tensor(self.averages[name]))

    @torch.no_grad()
    def _swap_out(self, model: nn.Module) -> None:
        trained, self._trained = self._trained, None
        if trained is not None:
            for name, source in self._sources(model).items():
                local_tensor(source).copy_(local_tensor(trained[name]))

    # ---- state --------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """The number of updates averaged, and the averages by parameter name (none before the first).

        A collective where an engine keeps parameters in another shape than the model's.
        """
        return {"steps": self.steps, "averages": {name: self._in_shape(name) for name in self.averages}}

    def _in_shape(self, name: str) -> Tensor:
        average = self.averages[name]
        shape = self._shapes.get(name, average.shape)
        if average.shape == shape:
            return average
        return full_tensor(average).reshape(shape)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.steps = int(state_dict["steps"])
        self.averages = {name: value.detach().clone() for name, value in state_dict["averages"].items()}
        self._matched, self._trained = False, None


def _copy(source: Tensor) -> Tensor:
    half = source.dtype in (torch.float16, torch.bfloat16)
    return source.detach().clone().to(torch.float32) if half else source.detach().clone()


def _placed_like(average: Tensor, source: Any) -> Tensor:
    """A loaded average on the device, in the shards and with the strides of the tensor it belongs to."""
    placed = torch.empty_like(source, dtype=average.dtype, requires_grad=False)
    if is_dtensor(source) and not is_dtensor(average):
        copy_from_full(placed, average)
    else:
        placed.copy_(average)
    return placed
