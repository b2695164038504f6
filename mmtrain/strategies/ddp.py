"""torch's DistributedDataParallel: every rank holds the whole model, gradients are averaged at a window's end."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmtrain.errors import ConfigError, RunError
from mmtrain.optim import OptimWrapper
from mmtrain.printable import listed
from mmtrain.registry import STRATEGIES
from mmtrain.strategies.torch_engines import TorchEngine
from mmtrain.types import MicroBatch

_SYNC_BN = (None, "torch")


@STRATEGIES.register_module()
class DDPStrategy(TorchEngine):
    """One copy of the model on every rank; the default if there are several processes.

    ``find_unused_parameters``, ``static_graph``, ``gradient_as_bucket_view``, ``broadcast_buffers`` and
    ``bucket_cap_mb`` are those of torch. ``sync_bn='torch'`` makes batch norm layers count the samples of all ranks, as
    one process would. Gradients are exchanged only in the backward of a window's last micro-batch.

    Raises ConfigError for invalid arguments.
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
            self.module = _SteadyBuckets(self.model, device_ids=devices, **self._options)

    def _with_synchronised_norms(self, model: nn.Module) -> nn.Module:
        if self.device.type != "cuda":
            # torch's layer refuses the CPU in training; said here rather than in the first forward.
            raise ConfigError("strategy.sync_bn='torch' needs CUDA: torch's SyncBatchNorm does not run on the CPU")
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    @property
    def evaluation_module(self) -> nn.Module:
        """The model itself: ranks may have different numbers of batches, and nothing is exchanged."""
        return self.model

    def backward(self, loss: Tensor, mb: MicroBatch) -> None:
        super().backward(loss, mb)
        if mb.is_last:  # torch would check in the next forward; by then other ranks may wait in another exchange
            self.module.check_exchanged()  # type: ignore[operator]


class _SteadyBuckets(DistributedDataParallel):
    """torch's wrapper, which never moves gradients into other buckets.

    torch exchanges all gradients as one in the first iteration, and then cuts them into buckets in the order in which
    they came. How a sum over three ranks or more is rounded depends on where in its bucket a gradient is, so the first
    update after a resume would differ in its bits from the uninterrupted run. The buckets are therefore built before
    the first iteration, the last parameters first, as gradients mostly arrive in that order.
    With ``find_unused_parameters`` torch does that.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, **options)
        if not self.find_unused_parameters:
            self.reducer._push_all_rebuilt_params()
            self.reducer._rebuild_buckets()

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        parameters, sparse = super()._build_params_for_reducer()
        return (parameters, sparse) if self.find_unused_parameters else (parameters[::-1], sparse[::-1])

    def check_exchanged(self) -> None:
        """Raise RunError if the backward that is over left a bucket without all of its gradients."""
        try:
            self._check_reducer_finalized()
        except RuntimeError as error:
            raise RunError(
                f"model: {self._without_gradient(str(error))} got no gradient, so the ranks could not exchange "
                "gradients; set strategy=dict(type='DDPStrategy', find_unused_parameters=True), or freeze what the "
                "loss never uses (requires_grad_(False))"
            ) from error

    def _without_gradient(self, message: str) -> str:
        """The names of the parameters whose numbers are in torch's message."""
        found = re.search(r"did not receive grad for rank \d+: ([\d ]+)", message)
        ours = self._build_params_for_reducer()[0]
        missing = {id(ours[int(number)]) for number in found[1].split()} if found else set()
        names = [name for name, parameter in self.module.named_parameters() if id(parameter) in missing]
        return listed(names) or "a parameter"
