"""The optimizer wrapper: backward, clip, step and clear, with MMEngine's arguments and methods.

Through its strategy the loop calls `forward_context` and `backward` for each micro-batch, and `finish_window` after the
last one of a window. A model with its own ``train_step`` calls `update_params` instead, as under MMEngine. Nothing is
read from the device unless an option of `OptimWrapper` needs it.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmtrain import dist
from mmtrain.dtensor import full_tensor, local_tensor, mesh_of
from mmtrain.errors import RunError
from mmtrain.registry import OPTIM_WRAPPERS
from mmtrain.source_lines import config_error
from mmtrain.suggest import did_you_mean
from mmtrain.types import MicroBatch, StepResult

_APPLIED = StepResult(None)
_NO_CONTEXT = nullcontext()
_CLIP_KEYS = {"norm": ("max_norm", "norm_type", "error_if_nonfinite", "foreach"), "value": ("clip_value", "foreach")}


@OPTIM_WRAPPERS.register_module()
class OptimWrapper:
    """Gradient accumulation and clipping around a torch optimizer.

    * ``accumulative_counts``: the number of micro-batches in a window, which ends with one optimizer step;
    * ``clip_grad``: ``dict(max_norm=1.0)`` (also ``norm_type``, ``error_if_nonfinite``) or
      ``dict(type='value', clip_value=0.5)``.

    Set by the loop:

    * ``want_grad_norm``: measure the gradients' norm in the steps that follow, even if nothing is clipped;
    * ``skip_nonfinite``: skip the step if a loss or a gradient is not finite. This costs the norm and one read from the
      device in each update, and one small all-reduce if there are several ranks.

    Set by the loop for models with their own ``train_step``:

    * ``micro_batch``: where the iteration is in its window. While it is None, micro-batches are counted as in MMEngine;
    * ``loss_weight``: what `scale_loss` multiplies by.

    Set by the loop at the end of a window:

    * ``gradient_scale``: what the step multiplies the gradients by first; None if the losses had the right weights.
    """

    def __init__(
        self, optimizer: Optimizer, accumulative_counts: int = 1, clip_grad: Mapping[str, Any] | None = None
    ) -> None:
        if not isinstance(accumulative_counts, int) or accumulative_counts < 1:
            raise config_error(
                "optim_wrapper.accumulative_counts", f"found {accumulative_counts!r}, expected an integer of 1 or more"
            )
        self.optimizer = optimizer
        self.accumulative_counts = accumulative_counts
        self.clip_grad = _checked_clip(clip_grad)
        self.want_grad_norm = False
        self.skip_nonfinite = False
        self.micro_batch: MicroBatch | None = None
        self.loss_weight = 1.0
        self.gradient_scale: Tensor | float | None = None
        self.notices: list[str] = []
        # With several groups, what a parameter without multipliers would have: the `base_lr` of MMEngine's logs.
        self.base_group = {**optimizer.defaults} if len(optimizer.param_groups) > 1 else None
        # MMEngine's documentation teaches subclasses to override these two.
        self._own_step = type(self).step is not OptimWrapper.step
        self._own_context = type(self).optim_context is not OptimWrapper.optim_context
        self._plain = self.clip_grad is None and not self._own_step
        # torch's zero_grad spends about 6 microseconds on profiling; another class's may do more than clear.
        self._clears_itself = type(optimizer).zero_grad is Optimizer.zero_grad
        self._inner_count = 0
        self._max_counts = -1
        self._result: StepResult | None = None
        self._loss_sum: Tensor | None = None  # of the current window; only with skip_nonfinite

    # ---- what the loop and the strategies call ----
    def forward_context(self, model: nn.Module, mb: MicroBatch) -> AbstractContextManager[Any]:
        """The context of the forward pass: `autocast`, and no exchange of gradients before the window's last one."""
        if self._own_context:
            self.micro_batch = mb
            return self.optim_context(model)
        return self._context(model, synchronise=mb.is_last)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the forward pass: that of the parameters here."""
        return _NO_CONTEXT

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Add the gradients of ``loss``, which is already divided by the window's length.

        Raises:
            RunError: the loss is not a single number, or no trainable parameter took part in it.
        """
        try:
            loss.backward(**kwargs)
        except RuntimeError as error:
            _explain_refusal(loss, error)
            raise
        if self.skip_nonfinite:
            # A sum is not finite as soon as one term is not: one kernel for each loss but the first, and no read.
            value = loss.detach().float()
            self._loss_sum = value if self._loss_sum is None else self._loss_sum + value
        self._inner_count += 1

    def finish_window(self) -> StepResult:
        """Clip, step and clear the gradients; the norm is the one before clipping, left on its device."""
        if self.gradient_scale is not None:
            self.rescale_gradients()
        if self._plain and not self.want_grad_norm and not self.skip_nonfinite:
            self.optimizer.step()
            result = _APPLIED
        elif self._own_step:
            self.step()
            result = self.take_result() or _APPLIED
        else:
            result = self._step({})
        self.clear_gradients()
        return result

    @torch.no_grad()
    def rescale_gradients(self) -> None:
        """Multiply the gradients by ``gradient_scale``, once."""
        scale, self.gradient_scale = self.gradient_scale, None
        gradients = [local_tensor(p.grad) for p in self._with_gradients() if p.grad is not None]
        if scale is None or not gradients:
            return
        if isinstance(scale, Tensor):
            scale = scale.to(gradients[0].device, torch.float32)
        torch._foreach_mul_(gradients, scale)

    def clear_gradients(self) -> None:
        """Set every gradient to None."""
        if self._clears_itself:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        else:
            self.optimizer.zero_grad()

    def take_result(self) -> StepResult | None:
        """The result of the last `update_params` or `step` since the previous call, or None."""
        result, self._result = self._result, None
        return result

    # ---- MMEngine's methods, for models with their own train_step ----
    def update_params(
        self, loss: Tensor, step_kwargs: Mapping[str, Any] | None = None, zero_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Divide ``loss`` by the window's length, add its gradients, and step if it is the window's last."""
        self.backward(self.scale_loss(loss))
        if not self.should_update():
            return
        if not step_kwargs and not zero_kwargs:
            self._result = self.finish_window()
        else:
            self.step(**(step_kwargs or {}))
            self.zero_grad(**(zero_kwargs or {}))

    def scale_loss(self, loss: Tensor) -> Tensor:
        """``loss`` divided by the length of its window, times this rank's weight (`types.Batch.weight`)."""
        length = self.micro_batch.length if self.micro_batch is not None else self._counted_length()
        divided = loss if length == 1 else loss / length
        return divided if self.loss_weight == 1.0 else divided * self.loss_weight

    def step(self, **kwargs: Any) -> None:
        """Clip and step; ``kwargs`` go to the optimizer. The gradients stay."""
        if self.gradient_scale is not None:
            self.rescale_gradients()
        self._result = self._step(kwargs)

    def zero_grad(self, **kwargs: Any) -> None:
        """Clear the gradients; ``kwargs`` as for the optimizer's method."""
        if kwargs:
            self.optimizer.zero_grad(**kwargs)
        else:
            self.clear_gradients()

    def optim_context(self, model: nn.Module) -> AbstractContextManager[Any]:
        """The context of the forward pass: ranks exchange gradients only for a window's last micro-batch."""
        return self._context(model, synchronise=self.should_sync())

    def _context(self, model: nn.Module, *, synchronise: bool) -> AbstractContextManager[Any]:
        if synchronise or not hasattr(model, "no_sync"):
            return self.autocast()
        stack = ExitStack()
        stack.enter_context(model.no_sync())  # type: ignore[operator]
        stack.enter_context(self.autocast())
        return stack

    def should_update(self) -> bool:
        """Whether the micro-batch whose gradients were just added is its window's last."""
        if self.micro_batch is not None:
            return self.micro_batch.is_last
        return self._ends_window(self._inner_count)

    def should_sync(self) -> bool:
        """Whether the micro-batch that comes now is its window's last."""
        if self.micro_batch is not None:
            return self.micro_batch.is_last
        return self._ends_window(self._inner_count + 1)

    def initialize_count_status(self, model: nn.Module, init_counts: int, max_counts: int) -> None:
        """For loops that do not set ``micro_batch``: how many micro-batches were done, and how many there are."""
        self._inner_count = init_counts
        self._max_counts = max_counts

    def _ends_window(self, count: int) -> bool:
        return count % self.accumulative_counts == 0 or count == self._max_counts

    def _counted_length(self) -> int:
        """The window's length by counting: the last window ends at ``max_counts``."""
        rest = self._max_counts % self.accumulative_counts if self._max_counts >= 0 else 0
        return rest if rest and self._inner_count >= self._max_counts - rest else self.accumulative_counts

    @property
    def inner_count(self) -> int:
        """Micro-batches whose gradients were added so far."""
        return self._inner_count

    @property
    def param_groups(self) -> Any:
        """The optimizer's groups."""
        return self.optimizer.param_groups

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """The optimizer under the name "", or several under theirs."""
        return {"": self.optimizer}

    @property
    def defaults(self) -> dict[str, Any]:
        """The optimizer's defaults."""
        return self.optimizer.defaults

    def get_lr(self) -> dict[str, list[float]]:
        """``{'lr': one value for each group}``, with ``base_lr``, the one without multipliers, where groups differ."""
        base = {} if self.base_group is None or "lr" not in self.base_group else {"base_lr": [self.base_group["lr"]]}
        rates = [group["lr"] for group in self.optimizer.param_groups if "lr" in group]  # some optimizers have none
        return base | ({"lr": rates} if rates else {})

    def get_momentum(self) -> dict[str, list[float]]:
        """``{'momentum': one value for each group}``: ``momentum``, else ``betas[0]``, else 0."""
        groups = self.optimizer.param_groups
        return {"momentum": [g["momentum"] if "momentum" in g else g.get("betas", (0,))[0] for g in groups]}

    def state_dict(self) -> dict[str, Any]:
        """The state besides the optimizer's: nothing here, the loss scaler's state in subclasses."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""

    def __repr__(self) -> str:
        counts, clip = self.accumulative_counts, self.clip_grad
        return f"{type(self).__name__}(accumulative_counts={counts}, clip_grad={clip}, optimizer={self.optimizer!r})"

    # ---- one step ----
    def _step(self, kwargs: Mapping[str, Any]) -> StepResult:
        scaled_overflow = self._unscale()
        clips_norm = self.clip_grad is not None and self.clip_grad["type"] == "norm"
        checks = self.skip_nonfinite and scaled_overflow is None
        norm = self._measure() if clips_norm or self.want_grad_norm or checks else None
        applied = not scaled_overflow and not (checks and norm is not None and self._nonfinite(norm))
        if applied:
            self._clip(norm)
            self._apply(kwargs)
        self._after_step()
        self._loss_sum = None
        return StepResult(norm, applied)

    def _unscale(self) -> bool | None:
        """Undo the loss scaling: whether a gradient overflowed, or None if there is no scaler."""
        return None

    def _apply(self, kwargs: Mapping[str, Any]) -> None:
        self.optimizer.step(**kwargs)

    def _after_step(self) -> None:
        """Update the loss scale, whether or not the step was applied."""

    def _with_gradients(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    def _measure(self) -> Tensor:
        """The total norm of the gradients, over all shards where they are sharded."""
        norm_type = self.clip_grad.get("norm_type", 2.0) if self.clip_grad else 2.0
        foreach = self.clip_grad.get("foreach") if self.clip_grad else None
        norms = []
        for group in _by_mesh(self._with_gradients()):
            gradients = [p.grad for p in group if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients, norm_type, foreach=foreach)
            norms.append(full_tensor(norm))
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), norm_type)

    def _nonfinite(self, norm: Tensor) -> bool:
        """Whether this window's losses or gradients are not finite on any rank; reads from the device."""
        flag = ~torch.isfinite(norm)
        if self._loss_sum is not None:
            flag = flag | ~torch.isfinite(self._loss_sum).to(flag.device)
        if dist.world_size() > 1:
            flag = dist.sum_over_ranks(flag.float())
        return bool(flag.item())

    def _clip(self, norm: Tensor | None) -> None:
        clip = self.clip_grad
        if clip is None:
            return
        if clip["type"] == "value":
            torch.nn.utils.clip_grad_value_(self._with_gradients(), clip["clip_value"], clip.get("foreach"))
            return
        assert norm is not None
        if clip.get("error_if_nonfinite") and not math.isfinite(norm.item()):
            raise RunError(f"the gradients' norm is {norm.item()} and clip_grad.error_if_nonfinite is set")
        for group in _by_mesh(self._with_gradients()):
            torch.nn.utils.clip_grads_with_norm_(group, clip["max_norm"], norm, clip.get("foreach"))


@OPTIM_WRAPPERS.register_module()
class DeepSpeedOptimWrapper(OptimWrapper):
    """MMEngine's name for the wrapper of a run under DeepSpeedStrategy, where any `OptimWrapper` will do."""


def _explain_refusal(loss: Tensor, error: RuntimeError) -> None:
    """Raise RunError if torch refused to begin a backward at this loss."""
    if loss.numel() != 1:
        raise RunError(f"the loss has shape {tuple(loss.shape)}; expected a scalar: use .mean() or .sum()") from error
    if not loss.requires_grad:
        raise RunError("the loss does not require grad: no trainable parameter took part in it") from error


def _by_mesh(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Parameters by the mesh of ranks that they are on; under tensor parallelism torch cannot take them together."""
    if dist.model_parallel() == 1:
        return [parameters]
    groups: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault(mesh_of(parameter), []).append(parameter)
    return list(groups.values()) or [[]]


def _checked_clip(clip_grad: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """``clip_grad`` with its ``type`` filled in. Raises ConfigError."""
    if clip_grad is None:
        return None
    where = "optim_wrapper.clip_grad"
    if not isinstance(clip_grad, Mapping) or not clip_grad:
        raise config_error(where, f"found {clip_grad!r}, expected None or a dict such as dict(max_norm=1.0)")
    clip = {"type": "norm", **clip_grad}
    if clip["type"] not in _CLIP_KEYS:
        raise config_error(f"{where}.type", f"found {clip['type']!r}, expected 'norm' or 'value'")
    known = _CLIP_KEYS[clip["type"]]
    for key in clip:
        if key != "type" and key not in known:
            hint = did_you_mean(key, known) or f", expected {', '.join(known)}"
            raise config_error(f"{where}.{key}", f"unknown key for type {clip['type']!r}{hint}")
    bound = known[0]
    try:
        clip[bound] = float(clip[bound])
        clip["norm_type"] = float(clip.get("norm_type", 2.0))
    except (KeyError, TypeError, ValueError):
        raise config_error(where, f"expected {bound} as a number, found {dict(clip_grad)}") from None
    if not clip[bound] > 0:
        raise config_error(f"{where}.{bound}", f"found {clip[bound]}, expected more than 0")
    return clip
