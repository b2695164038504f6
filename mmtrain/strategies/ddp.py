"""torch's DistributedDataParallel: every rank holds the whole model, gradients are averaged at a window's end."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmtrain.errors import ConfigError
from mmtrain.optim import OptimWrapper
from mmtrain.registry import STRATEGIES
from mmtrain.strategies.torch_engines import TorchEngine

_SYNC_BN = (None, "torch")


@STRATEGIES.register_module()
class DDPStrategy(TorchEngine):
    """One copy of the model on every rank; the default where there are several processes.

    ``find_unused_parameters``, ``static_graph``, ``gradient_as_bucket_view``, ``broadcast_buffers`` and
    ``bucket_cap_mb`` are those of torch. ``sync_bn='torch'`` makes batch norm layers count the samples of all ranks, as
    one process would. Gradients are exchanged in the backward of a window's last micro-batch alone.

    Raises ConfigError for arguments that cannot be right.
    """

    takes_own_train_step = False  # it calls the model past the wrapper, which then exchanges nothing

    def __init__(
        self,
        *,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = False,
        broadcast_buffers: bool = True,
        bucket_cap_mb: float | None = None,
        sync_bn: str | None = None,
    ) -> None:
        if sync_bn not in _SYNC_BN:
            raise ConfigError(f"strategy.sync_bn is {sync_bn!r}; expected 'torch' or None")
        self._options: dict[str, Any] = {
            "find_unused_parameters": find_unused_parameters, "static_graph": static_graph,
            "gradient_as_bucket_view": gradient_as_bucket_view, "bucket_cap_mb": bucket_cap_mb,
        }  # fmt: skip
        if not broadcast_buffers:  # newer versions of torch have another name for it
            known = inspect.signature(DistributedDataParallel).parameters
            self._options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
        self._sync_bn = sync_bn

    def prepare(
        self,
        model: nn.Module,
        make_optim: Callable[[nn.Module], OptimWrapper] | None,
        compile_options: Mapping[str, Any] | None = None,
    ) -> None:
        if self._sync_bn is not None:
            model = self._with_synchronised_norms(model)
        self.model = self.module = model.to(self.device)
        self.optim = make_optim(model) if make_optim is not None else None
        if self._options["static_graph"] and self.optim is not None and self.optim.accumulative_counts > 1:
            raise ConfigError(
                "strategy.static_graph=True contradicts optim_wrapper.accumulative_counts="
                f"{self.optim.accumulative_counts}: torch's static graph cannot leave out the exchange of gradients "
                "inside a window; drop one of them"
            )
        if compile_options is not None:
            self.model.compile(**compile_options)
        if self.optim is not None:
            devices = [self.device.index] if self.device.type == "cuda" else None
            wrapper = DistributedDataParallel(self.model, device_ids=devices, **self._options)
            wrapper.reducer = _SteadyReducer(wrapper.reducer)  # type: ignore[assignment]
            self.module = wrapper

    def _with_synchronised_norms(self, model: nn.Module) -> nn.Module:
        if self.device.type != "cuda":
            # torch's layer refuses the CPU in training; said here rather than in the first forward.
            raise ConfigError("strategy.sync_bn='torch' needs CUDA: torch's SyncBatchNorm does not run on the CPU")
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    @property
    def evaluation_module(self) -> nn.Module:
        """The model itself: ranks may have unequally many batches, and nothing is exchanged."""
        return self.model

    def forward_context(self) -> AbstractContextManager[Any]:
        assert self.optim is not None
        return self.optim.optim_context(self.module)


class _SteadyReducer:
    """DDP's reducer, which never moves gradients into other buckets after the first iteration.

    A sum over three ranks or more is rounded by where in its bucket a gradient lies. With the buckets of the first
    iteration kept, the first update after a resume has the same bits as in the run that was not interrupted.
    """

    def __init__(self, reducer: Any) -> None:
        object.__setattr__(self, "_reducer", reducer)

    def _rebuild_buckets(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)
