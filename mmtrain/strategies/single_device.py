"""One process, one device: the readable reference of the strategy contract."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mmtrain import dist
from mmtrain.errors import ConfigError
from mmtrain.optim import OptimWrapper
from mmtrain.registry import STRATEGIES
from mmtrain.strategies.torch_engines import OwnOptimizer


@STRATEGIES.register_module()
class SingleDeviceStrategy(OwnOptimizer):
    """Trains on one device: the first accelerator if there is one, else the CPU, or the one that is named.

    ``device`` is a torch device string such as ``"cpu"`` or ``"cuda:1"``.
    """

    def __init__(self, device: str | None = None) -> None:
        self._device_name = device

    def setup(self) -> None:
        if dist.world_size() > 1:
            raise ConfigError(
                f"strategy.type: SingleDeviceStrategy runs in one process and {dist.world_size()} were started; "
                "leave `strategy` out or name 'DDPStrategy'"
            )
        self.device = torch.device(self._device_name) if self._device_name else dist.default_device()

    def prepare(
        self,
        model: nn.Module,
        make_optim: Callable[[nn.Module], OptimWrapper] | None,
        compile_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = self.module = model.to(self.device)
        self.optim = make_optim(model) if make_optim is not None else None
        if compile_options is not None:
            # In place: state-dict keys stay as they are, and the step's own code stays outside the graph.
            self.model.compile(**compile_options)

    def teardown(self) -> None:
        """Nothing to leave."""
