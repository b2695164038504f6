"""Model and optimizer state by plain parameter name, whatever DeepSpeed has flattened and divided over the ranks.

A trained parameter's float32 master is a slice of a flat tensor, of which each rank may hold a part. `fragments` says
where; everything else here is copying. Parameters are gathered one at a time, completely, on the CPU of every rank.
Functions that gather are collectives.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmtrain import dist, model_state
from mmtrain.errors import CheckpointError
from mmtrain.optim import OptimWrapper
from mmtrain.strategies.base import OptimizerState, SavedTensor, TrainedTensor
from mmtrain.strategies.optimizer_state import not_trained, placed


class Fragment(NamedTuple):
    """A parameter's master on this rank: ``flat[start : start + size]`` is the parameter from element ``offset`` on.

    ``flat`` is the optimizer's own parameter. ``whole`` says that every rank holds all of it.
    """

    flat: Tensor
    start: int
    offset: int
    size: int
    whole: bool = False


def fragments(engine: Any) -> dict[int, Fragment]:
    """The fragment of every trained parameter, by the parameter's id."""
    own = engine.optimizer
    if hasattr(own, "fp32_partitioned_groups_flat"):
        return dict(_of_stage_3(own))
    if hasattr(own, "single_partition_of_fp32_groups"):
        return dict(_of_stages_1_2(own))
    if hasattr(own, "fp32_groups_flat_partition"):
        return dict(_mapped(own.bf16_groups, own.fp32_groups_flat_partition))
    if hasattr(own, "fp32_groups"):
        groups = zip(own.fp16_groups, own.fp32_groups, strict=True)
        pairs = [pair for group in groups for pair in zip(*group, strict=True)]
    else:
        pairs = [(parameter, parameter) for group in own.param_groups for parameter in group["params"]]
    return {id(parameter): Fragment(master, 0, 0, master.numel(), whole=True) for parameter, master in pairs}


def _of_stage_3(own: Any) -> Iterator[tuple[int, Fragment]]:
    for group in own.fp16_groups:
        for parameter in group:
            index, start, size = own.grad_position[own.get_param_id(parameter)]
            offset = dist.rank() * size
            count = max(0, min(size, parameter.ds_numel - offset))
            flat = own.fp32_partitioned_groups_flat[index]
            yield id(parameter), Fragment(flat, start, min(offset, parameter.ds_numel), count)


def _of_stages_1_2(own: Any) -> Iterator[tuple[int, Fragment]]:
    # DeepSpeed's own mapping (`_hp_mapping`) is wrong with round_robin_gradients: it counts in the order before it.
    masters = own.single_partition_of_fp32_groups
    groups = zip(own.round_robin_bit16_groups, own.round_robin_bit16_offsets, masters, strict=True)
    for group, offsets, flat in groups:
        first = dist.rank() * flat.numel()
        for parameter, begin in zip(group, offsets, strict=True):
            offset = min(max(first - begin, 0), parameter.numel())
            start = max(begin - first, 0)
            size = max(0, min(parameter.numel() - offset, flat.numel() - start))
            yield id(parameter), Fragment(flat, start if size else 0, offset, size)


def _mapped(groups: Any, flats: Any) -> Iterator[tuple[int, Fragment]]:
    for group, flat in zip(groups, flats, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:  # all of it is on other ranks
                yield id(parameter), Fragment(flat, 0, 0, 0)
            else:
                own, low = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield id(parameter), Fragment(flat, own.start, low.start, own.numel)


# ---- the model -------------------------------------------------------------------------------------------------------
def whole_model(model: nn.Module, engine: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name: masters if there are any. Tied names are one tensor."""
    found, done = fragments(engine), {}
    state: dict[str, Tensor] = {}
    for name, value in model_state.tensors_of(model, keep_vars=True).items():
        if id(value) not in done:
            done[id(value)] = _whole_value(value, found.get(id(value)), engine.device)
        state[name] = done[id(value)]
    return state


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def model_targets(model: nn.Module, engine: Any, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor]:
    """Memory for saved tensors: of parameters the full tensor, for the rest that of `mmtrain.model_state.targets`."""
    found = model_state.targets(model, saved)
    return found | {name: value for name, value in whole_model(model, engine).items() if name in _parameters(model)}


def _shape(value: Any) -> torch.Size:
    return getattr(value, "ds_shape", value.shape)


def _whole_value(value: Any, fragment: Fragment | None, device: torch.device) -> Tensor:
    if fragment is None and hasattr(value, "ds_id"):
        fragment = _of_frozen(value)
    if fragment is None:
        return value.detach()
    return _gather(fragment.flat, fragment, _shape(value), device)


def _of_frozen(value: Any) -> Fragment:
    """A parameter of stage 3 without a master: its own partition."""
    size = value.ds_tensor.numel()
    offset = min(dist.rank() * size, value.ds_numel)
    return Fragment(value.ds_tensor, 0, offset, max(0, min(size, value.ds_numel - offset)))


def _gather(flat: Tensor, fragment: Fragment, shape: torch.Size, device: torch.device) -> Tensor:
    if fragment.whole:
        return flat.detach().reshape(shape)
    whole = torch.zeros(shape.numel(), dtype=flat.dtype, device=device)
    whole.narrow(0, fragment.offset, fragment.size).copy_(_part(flat, fragment))
    torch.distributed.all_reduce(whole)  # each element comes from one rank, the others add zeros
    return whole.cpu().reshape(shape)


def _part(flat: Tensor, fragment: Fragment) -> Tensor:
    return flat.detach().reshape(-1).narrow(0, fragment.start, fragment.size)


def _put(flat: Tensor, fragment: Fragment, value: Tensor) -> None:
    _part(flat, fragment).copy_(value.reshape(-1).narrow(0, fragment.offset, fragment.size))


@torch.no_grad()
def load_model(model: nn.Module, engine: Any, state: Mapping[str, Any]) -> None:
    """Copy full tensors into masters and parameters; parameters without a tensor of their shape are left alone."""
    found, parameters = fragments(engine), _parameters(model)
    rest = {name: value for name, value in state.items() if name not in parameters}
    for name, value in parameters.items():
        if name not in state or state[name].shape != _shape(value):
            continue
        fragment = found.get(id(value))
        if fragment is not None:
            _put(fragment.flat, fragment, state[name])
        if hasattr(value, "ds_id"):
            own = _of_frozen(value)
            _put(own.flat, own, state[name])
        elif fragment is None or fragment.flat is not value:
            value.copy_(state[name])
        if not hasattr(value, "ds_id"):
            rest[name] = value  # it is in its place; a module that loads in its own way may want to see it
    model_state.load(model, rest)
    if any(name in state and hasattr(value, "ds_id") for name, value in parameters.items()):
        gather_persistent(engine)


@torch.no_grad()
def clear_padding(model: nn.Module, engine: Any) -> None:
    """Stage 3: zero what fills up the last rank's partition of a parameter, which DeepSpeed leaves as memory was.

    Otherwise files of identical runs differ, and may contain a NaN.
    """
    found = fragments(engine)
    for parameter in model.parameters():
        own = _of_frozen(parameter)
        padding = own.flat.numel() - own.size
        own.flat.data.reshape(-1).narrow(0, own.size, padding).zero_()
        master = found.get(id(parameter))
        if master is not None:
            master.flat.data.narrow(0, master.start + master.size, padding).zero_()


def make_whole(model: nn.Module) -> None:
    """Give parameters that stage 3 had cut for one rank, which holds all of each, their values back."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    parameter: Any
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):
            own = _of_frozen(parameter)
            parameter.data = _part(own.flat, own).to(parameter.device).reshape(_shape(parameter))
            parameter.ds_status = ZeroParamStatus.AVAILABLE


def gather_persistent(engine: Any) -> None:
    """Gather again what stage 3 keeps gathered and drop the rest, because the partitions have changed. A collective."""
    engine.optimizer.checkpoint_event_prologue()
    engine.optimizer.checkpoint_event_epilogue()


def local_views(model: nn.Module, device: torch.device) -> dict[str, TrainedTensor]:
    """Stage 3: each trained parameter's partition as a flat sharded tensor that shares its memory."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh(device.type, (dist.world_size(),))
    views = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own, shape = _of_frozen(parameter), _shape(parameter)
            size = torch.Size([shape.numel()])
            local = _part(own.flat, own)
            view = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=size, stride=(1,))
            views[name] = TrainedTensor(view, shape)
    return views


# ---- the optimizer ---------------------------------------------------------------------------------------------------
def whole_optimizer(model: nn.Module, engine: Any, optim: OptimWrapper) -> dict[str, Tensor]:
    """The optimizer's state as ``<parameter>/<slot>``; a flat tensor's step count is that of each of its parameters."""
    tensors: dict[str, Tensor] = {}
    for name, parameter, fragment in _trained(model, engine):
        for slot, value in optim.optimizer.state.get(fragment.flat, {}).items():
            if not isinstance(value, Tensor):
                tensors[f"{name}/{slot}"] = torch.tensor(value, dtype=torch.float64)
            elif value.shape == fragment.flat.shape:
                tensors[f"{name}/{slot}"] = _gather(value, fragment, _shape(parameter), engine.device)
            else:
                tensors[f"{name}/{slot}"] = value
    return tensors


@torch.no_grad()
def load_optimizer(model: nn.Module, engine: Any, optim: OptimWrapper, state: OptimizerState) -> None:
    """Restore what `whole_optimizer`, or another strategy, gave.

    Raises CheckpointError for a parameter that is not trained here, and if parameters that share a flat tensor have
    differing step counts, which DeepSpeed cannot represent.
    """
    trained = {name: (_shape(parameter), fragment) for name, parameter, fragment in _trained(model, engine)}
    for key, value in _with_numbers(state).items():
        name, _, slot = key.rpartition("/")
        if name not in trained:
            raise not_trained(name)
        shape, fragment = trained[name]
        own = optim.optimizer.state[fragment.flat]
        if value.shape == shape and not (slot == "step" and not shape):
            if slot not in own:
                own[slot] = torch.zeros_like(fragment.flat, dtype=value.dtype, requires_grad=False)
            _put(own[slot], fragment, value)
        elif value.dim():
            raise CheckpointError(f"optimizer state {key!r} has shape {tuple(value.shape)}, its parameter has another")
        else:
            _put_number(own, slot, placed(slot, value, fragment.flat, optim.optimizer), key)
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False


def _with_numbers(state: OptimizerState) -> dict[str, Tensor]:
    """The tensors, with the numbers that other strategies keep beside them as tensors too."""
    tensors = dict(state.tensors)
    for key, values in (state.values or {}).items():
        if key.startswith("$"):  # strides, which flat partitions do not have
            continue
        unknown = next((key for key in ("whole", "other_state", "extra") if values.get(key)), "")
        for name, rest in values.get("state", {}).items():
            for slot, value in rest.items():
                if isinstance(value, (bool, int, float)):
                    tensors[f"{name}/{slot}"] = torch.tensor(value, dtype=torch.float64)
                elif value is not None:
                    unknown = f"{name}/{slot}"
        if unknown:
            raise CheckpointError(
                f"the checkpoint holds optimizer state that DeepSpeed's flat partitions cannot take ({unknown}); "
                "resume with the strategy that saved it, or start from the weights (resume=False, load_from=...)"
            )
    return tensors


def _put_number(own: dict[str, Any], slot: str, value: Any, key: str) -> None:
    if slot in own and float(own[slot]) != float(value):
        raise CheckpointError(
            f"optimizer state {key!r} is {float(value):g} and {float(own[slot]):g} for another parameter of its group: "
            "DeepSpeed keeps one step count per group; resume with the strategy that saved, or start from the weights"
        )
    own[slot] = value


def _trained(model: nn.Module, engine: Any) -> Iterator[tuple[str, Any, Fragment]]:
    found = fragments(engine)
    for name, parameter in model.named_parameters():
        if id(parameter) in found:
            yield name, parameter, found[id(parameter)]
