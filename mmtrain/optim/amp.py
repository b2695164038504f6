"""Mixed precision: autocast on any device that supports it, and a loss scaler only for float16."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from mmtrain import dist
from mmtrain.optim.wrappers import OptimWrapper
from mmtrain.registry import OPTIM_WRAPPERS
from mmtrain.source_lines import config_error

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class _HalfGradScaler(GradScaler):
    """A scaler for models whose own parameters are float16, which torch's refuses to unscale."""

    def _unscale_grads_(self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> Any:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


@OPTIM_WRAPPERS.register_module()
class AmpOptimWrapper(OptimWrapper):
    """`OptimWrapper` under autocast. Further arguments:

    * ``dtype``: 'float16', 'bfloat16' or the torch dtype. None is the device's default, which is float16 on CUDA (as in
      MMEngine) and bfloat16 on the CPU; ``notices`` says which one it became;
    * ``loss_scale``, for float16: 'dynamic', a fixed number, or a dict of arguments of `torch.amp.GradScaler`. bfloat16
      has float32's range: there is no scaler, whatever this says;
    * ``use_fp16_params``: the model's own parameters are float16, and their gradients may be unscaled;
    * ``use_fsdp``: MMEngine's argument, accepted: the scaler understands sharded gradients without it.

    With a scaler each update reads one number from the device, because a step that the scaler skips must not count:
    neither schedules nor anything else may advance.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        accumulative_counts: int = 1,
        clip_grad: Mapping[str, Any] | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        loss_scale: str | float | Mapping[str, Any] = "dynamic",
        use_fp16_params: bool = False,
        use_fsdp: bool = False,
    ) -> None:
        super().__init__(optimizer, accumulative_counts, clip_grad)
        self.device_type = optimizer.param_groups[0]["params"][0].device.type
        self.dtype = self._checked_dtype(dtype)
        self.scaler: GradScaler | None = None
        self._fixed_scale: float | None = None
        if self.dtype is torch.float16:
            self.scaler = self._make_scaler(loss_scale, _HalfGradScaler if use_fp16_params else GradScaler)
            self._plain = False

    def _checked_dtype(self, dtype: str | torch.dtype | None) -> torch.dtype:
        if dtype is None:
            default = torch.get_autocast_dtype(self.device_type)
            name = str(default).removeprefix("torch.")
            self.notices.append(
                f"optim_wrapper.dtype is not given: {name}, the default of autocast on {self.device_type}"
            )
            return default
        chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
        if chosen is None or chosen not in _DTYPES.values():
            raise config_error(
                "optim_wrapper.dtype",
                f"found {str(dtype)!r}, expected 'bfloat16' or 'float16' (for float32: type='OptimWrapper')",
            )
        return chosen

    def _make_scaler(self, loss_scale: str | float | Mapping[str, Any], scaler: type[GradScaler]) -> GradScaler:
        if loss_scale == "dynamic":
            return scaler(self.device_type)
        if isinstance(loss_scale, Mapping):
            try:
                return scaler(self.device_type, **loss_scale)
            except (TypeError, AssertionError) as error:
                raise config_error("optim_wrapper.loss_scale", str(error)) from None
        if isinstance(loss_scale, int | float) and not isinstance(loss_scale, bool) and loss_scale > 0:
            self._fixed_scale = float(loss_scale)
            return scaler(self.device_type, init_scale=self._fixed_scale)
        raise config_error(
            "optim_wrapper.loss_scale", f"found {loss_scale!r}, expected 'dynamic', a number above 0 or a dict"
        )

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Add the gradients of ``loss``, multiplied by the loss scale if there is a scaler. Raises RunError."""
        super().backward(loss if self.scaler is None else self.scaler.scale(loss), **kwargs)

    def autocast(self) -> AbstractContextManager[Any]:
        """torch.autocast in ``dtype``."""
        # A new object each time: one that is entered twice, nested, would not restore what was outside.
        return torch.autocast(self.device_type, dtype=self.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state, or nothing without one."""
        return {} if self.scaler is None else {"loss_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; a scale fixed in today's config stays."""
        if self.scaler is None or "loss_scaler" not in state_dict:
            return
        state = dict(state_dict["loss_scaler"])
        if self._fixed_scale is not None:
            state["scale"] = self._fixed_scale
        self.scaler.load_state_dict(state)

    def _unscale(self) -> bool | None:
        if self.scaler is None:
            return None
        self.scaler.unscale_(self.optimizer)
        found = self.scaler._found_inf_per_device(self.optimizer)
        if dist.model_parallel() > 1:  # torch informs only the ranks of the first gradient's mesh
            for flag in found.values():
                flag.copy_(dist.sum_over_ranks(flag))
        return any(flag.item() for flag in found.values())

    def _apply(self, kwargs: Mapping[str, Any]) -> None:
        if self.scaler is None:
            super()._apply(kwargs)
        else:
            self.scaler.step(self.optimizer, **kwargs)

    def _after_step(self) -> None:
        if self.scaler is not None and self.scaler._found_inf_per_device(self.optimizer):
            self.scaler.update(self._fixed_scale)
