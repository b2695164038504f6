"""torch's FSDP2 (``fully_shard``): parameters, gradients and moments are sharded over the ranks."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain import dist
from mmtrain.errors import ConfigError
from mmtrain.optim import OptimWrapper
from mmtrain.registry import STRATEGIES
from mmtrain.strategies.divisible import refuse_shards
from mmtrain.strategies.fsdp_exchange import announce_exchanges
from mmtrain.strategies.lockstep import Lockstep
from mmtrain.strategies.mesh import mesh_shape
from mmtrain.strategies.meta_init import initialise_blank
from mmtrain.strategies.tensor_parallel import check_replicas_once, parallelise, plan_for
from mmtrain.strategies.torch_engines import TorchEngine
from mmtrain.strategies.wrapping import (
    checkpoint_activations,
    lay_out_contiguously,
    modules_of_class,
    modules_of_size,
    refuse_empty,
    shared_parameters,
)
from mmtrain.types import MicroBatch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PRECISION_KEYS = ("param_dtype", "reduce_dtype", "output_dtype", "cast_forward_inputs")


@STRATEGIES.register_module()
class FSDPStrategy(TorchEngine):
    """Shards the model over the ranks, one group of parameters at a time.

    * ``wrap``: class names of the modules that become a group each (``['Block']``); a group's parameters are gathered
      before its forward and backward and freed after. Without it, modules of ``min_params`` parameters or more, inner
      ones first; what is left belongs to the root;
    * ``mixed_precision``: ``dict(param_dtype='bfloat16', reduce_dtype='float32')``, also ``output_dtype`` and
      ``cast_forward_inputs``: parameters are gathered in ``param_dtype``, the sharded ones stay in their own type;
    * ``reshard_after_forward``: free gathered parameters after forward (less memory) or keep them until backward; the
      default is FSDP2's: free all but the root's, which the backward needs at once;
    * ``cpu_offload``: keep shards and optimizer in host memory (CUDA only; on the CPU they are there anyway);
    * ``mesh``: ``dict(replicate=R, shard=S)`` for hybrid sharding: sharded over S ranks, repeated R times;
      ``dict(dp=D, tp=T)`` for tensor parallelism: T neighbouring ranks hold one copy of the model and work on the same
      samples, and each of their parts is sharded over D. What is left out is computed;
    * ``tensor_parallel``: which layers are split over those T, if not as the model's ``tensor_parallel_plan`` says: a
      dict of module names (``*`` matches one part of a name) to ``'colwise'`` or ``'rowwise'``;
    * ``activation_checkpointing``: class names of modules that compute their forward again in backward;
    * ``meta_init``: build the model without memory and initialise it by its ``init_weights()``, one full parameter at
      a time. The values depend on the seed and not on the number of ranks; they are not those of an ordinary build.

    Raises ConfigError for invalid arguments, and for a model that cannot be split as requested.
    """

    forward_is_collective = True

    def __init__(  # noqa: PLR0913 - the options of an engine are its config
        self,
        *,
        wrap: Sequence[str] | str | None = None,
        min_params: int = 1_000_000,
        mixed_precision: Mapping[str, Any] | None = None,
        reshard_after_forward: bool | None = None,
        cpu_offload: bool = False,
        mesh: Mapping[str, int] | None = None,
        activation_checkpointing: Sequence[str] | str | None = None,
        meta_init: bool = False,
        tensor_parallel: Mapping[str, str] | None = None,
    ) -> None:
        self._wrap = [wrap] if isinstance(wrap, str) else list(wrap or [])
        self._min_params = min_params
        self._precision = _checked_precision(mixed_precision)
        self._reshard_after_forward = reshard_after_forward
        self._cpu_offload = cpu_offload
        self._mesh_shape = dict(mesh or {})
        recomputed = activation_checkpointing
        self._recompute = [recomputed] if isinstance(recomputed, str) else list(recomputed or [])
        self._meta_init = meta_init
        self._plan = tensor_parallel
        self._synchronises = True

    # ---- building -----------------------------------------------------------------------------------------------
    def setup(self) -> None:
        super().setup()
        from torch.distributed.device_mesh import init_device_mesh

        shape = mesh_shape(self._mesh_shape, dist.world_size())
        self.model_parallel = shape.get("tp", 1)
        if self._plan is not None and "tp" not in self._mesh_shape:
            raise ConfigError(
                "strategy.tensor_parallel: a plan needs ranks to split layers over; add strategy.mesh=dict(tp=2)"
            )
        self.mesh = init_device_mesh(self.device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))
        self._tp_mesh = None
        if self.model_parallel > 1:
            self._tp_mesh = self.mesh["tp"]
            self.mesh = self.mesh[tuple(name for name in shape if name != "tp")]

    def build_context(self) -> AbstractContextManager[Any]:
        return torch.device("meta") if self._meta_init else nullcontext()

    def prepare(
        self,
        model: nn.Module,
        make_optim: Callable[[nn.Module], OptimWrapper] | None,
        compile_options: Mapping[str, Any] | None = None,
    ) -> None:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        options: dict[str, Any] = {
            "mesh": self.mesh, "reshard_after_forward": self._reshard_after_forward,  # None: all but the root
            "mp_policy": MixedPrecisionPolicy(**self._precision),
        }  # fmt: skip
        if self._cpu_offload and self.device.type != "cpu":
            options["offload_policy"] = CPUOffloadPolicy()
        self.model = self.module = model
        groups = self._groups(model)
        refuse_empty(model, type(self).__name__)
        self.notices = lay_out_contiguously(model, type(self).__name__)
        _refuse_mixed_types(model, groups)
        if self._tp_mesh is not None:
            if compile_options is not None:
                raise ConfigError(
                    "compile: torch cannot compile the layers that strategy.mesh.tp splits; leave one out"
                )
            parallelise(model, self._tp_mesh, plan_for(model, self._plan, self.model_parallel))
        checkpoint_activations(modules_of_class(model, self._recompute, "strategy.activation_checkpointing"))
        ties = shared_parameters(model)
        for module in groups if compile_options is not None else ():
            module.compile(**(compile_options or {}))
        try:
            for module in [*groups, model]:
                fully_shard(module, **options)
        except ValueError as error:
            raise ConfigError(f"model: FSDP2 cannot shard {type(model).__name__}: {error}") from error
        if self._meta_init:
            initialise_blank(model, torch.device("cpu") if self._cpu_offload else self.device, ties)
        self._move_buffers(model)
        if compile_options is not None and not groups:
            model.compile(**compile_options)
        self.optim = make_optim(model) if make_optim is not None else None
        if self.optim is not None:
            refuse_shards(self.optim, self.mesh, type(self).__name__)
        if self._tp_mesh is not None and self.optim is not None:
            check_replicas_once(model, self.optim.optimizer, self._tp_mesh)
        self._keep_in_step(model, compiled=compile_options is not None)

    def _keep_in_step(self, model: nn.Module, *, compiled: bool) -> None:
        """Have the ranks compare what they run: FSDP2 itself would exchange parameters of different modules."""
        hybrid = len(self.mesh.shape) > 1  # torch then exchanges gradients once more, past `announce_exchanges`
        parameters = dict(model.named_parameters())
        self._lockstep = Lockstep(type(self).__name__, parameters, defers=not hybrid, compiled=compiled)
        announce_exchanges(model, self._lockstep)
        for optimizer in self.optim.optimizers.values() if self.optim is not None else ():
            optimizer.register_step_pre_hook(lambda *_: self._lockstep.end_update())

    def _groups(self, model: nn.Module) -> list[nn.Module]:
        if self._wrap:
            groups = modules_of_class(model, self._wrap, "strategy.wrap")
        else:
            groups = modules_of_size(model, self._min_params)
        for names in shared_parameters(model):
            owners = {_owner(model, name, groups) for name in names}
            if len(owners) > 1:
                raise ConfigError(
                    f"strategy.wrap: {' and '.join(names)} are one parameter, which cannot belong to two groups; leave "
                    "out the class that holds one of them"
                )
        return groups

    def _move_buffers(self, model: nn.Module) -> None:
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device != self.device:
                    module._buffers[name] = buffer.to(self.device)

    # ---- training -----------------------------------------------------------------------------------------------
    def forward_context(self, mb: MicroBatch) -> AbstractContextManager[Any]:
        if mb.is_last != self._synchronises:
            self.module.set_requires_gradient_sync(mb.is_last)  # type: ignore[operator]
            self._synchronises = mb.is_last
        return super().forward_context(mb)

    def backward(self, loss: Tensor, mb: MicroBatch) -> None:
        self._lockstep.in_backward = True
        super().backward(loss, mb)
        self._lockstep.end_backward()

    def check_in_step(self) -> None:
        self._lockstep.check()

    def forget_gathered(self) -> None:
        # Without reshard_after_forward a forward that no backward follows leaves them, and the next one would use them.
        from torch.distributed.fsdp import FSDPModule

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _checked_precision(options: Mapping[str, Any] | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in (options or {}).items():
        where = f"strategy.mixed_precision.{key}"
        if key not in _PRECISION_KEYS:
            raise ConfigError(f"{where}: unknown key; expected one of {', '.join(_PRECISION_KEYS)}")
        if key == "cast_forward_inputs":
            found[key] = bool(value)
            continue
        dtype = _DTYPES.get(value) if isinstance(value, str) else value
        if dtype is not None and dtype not in _DTYPES.values():
            raise ConfigError(f"{where} is {value!r}; expected one of {', '.join(_DTYPES)}")
        if isinstance(value, str) and dtype is None:
            raise ConfigError(f"{where} is {value!r}; expected one of {', '.join(_DTYPES)}")
        found[key] = dtype
    return found


def _refuse_mixed_types(model: nn.Module, groups: Sequence[nn.Module]) -> None:
    first: dict[int, tuple[str, torch.dtype]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            other, dtype = first.setdefault(_owner(model, name, groups), (name, parameter.dtype))
            if parameter.dtype != dtype:
                raise ConfigError(
                    f"model: {name} is {parameter.dtype} and {other} is {dtype}, but FSDP2 needs one type in a group "
                    "of parameters that train; convert one, or name the class of its module in strategy.wrap"
                )


def _owner(model: nn.Module, name: str, groups: Sequence[nn.Module]) -> int:
    """The innermost group that holds a parameter, by id; 0 for the root."""
    owner, module = 0, model
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
        if any(module is group for group in groups):
            owner = id(module)
    return owner
