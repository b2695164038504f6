"""Tensors that are divided over ranks (`torch.distributed.tensor.DTensor`): FSDP2 and tensor parallelism make them.

Every function also takes a plain tensor, which is the full tensor on this rank. DTensors are recognized by their
attributes, because importing `torch.distributed.tensor` takes a second and most runs never need it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import Parameter

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""A rectangular part of a tensor: its offsets in the full tensor and its shape, one number per dimension."""


def is_dtensor(value: Any) -> bool:
    """Whether ``value`` is a DTensor, sharded or replicated."""
    if type(value) is Tensor or type(value) is Parameter:  # looking for a missing attribute is slow, and there are many
        return False
    return hasattr(value, "placements") and hasattr(value, "device_mesh")


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of ``tensor``, sharing its memory; a plain tensor itself."""
    sharded: Any = tensor
    return sharded.to_local() if is_dtensor(tensor) else tensor


def local_box(tensor: Tensor) -> tuple[Tensor, Box]:
    """This rank's part of ``tensor``, detached and sharing its memory, and its box in the full tensor."""
    local = local_tensor(tensor).detach()
    if not is_dtensor(tensor):
        return local, ((0,) * tensor.dim(), tuple(tensor.shape))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = tensor
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, sharded.device_mesh, sharded.placements)
    return local, (tuple(offsets), tuple(local.shape))


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, on every rank; a collective over the tensor's mesh. A plain tensor is returned as it is."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_dtensor(tensor) else tensor


def full_state(value: Any) -> Any:
    """The same nested state with every DTensor in it replaced by its full tensor; a collective."""
    if isinstance(value, Mapping):
        return {key: full_state(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
        return type(value)(full_state(item) for item in value)
    return full_tensor(value)


def copy_from_full(target: Tensor, full: Tensor) -> None:
    """Copy this rank's part of ``full``, a plain tensor of the target's full shape, into ``target``."""
    local, box = local_box(target)
    local.copy_(narrow_to_box(full, (0,) * full.dim(), box))


def narrow_to_box(tensor: Tensor, origin: Iterable[int], box: Box) -> Tensor:
    """A view of the part ``box`` (in coordinates of the full tensor) of a tensor whose first element is at ``origin``.

    A box without elements may have offsets beyond the end, as the shard of a rank that holds nothing has.
    """
    for dimension, (start, length, base) in enumerate(zip(*box, origin, strict=True)):
        tensor = tensor.narrow(dimension, min(start - base, tensor.shape[dimension]), length)
    return tensor


def mesh_of(tensor: Tensor) -> Any:
    """The device mesh of a DTensor; None for a plain tensor."""
    sharded: Any = tensor
    return sharded.device_mesh if is_dtensor(tensor) else None


def ranks_with_same_shard(tensor: Tensor) -> list[int]:
    """The ranks that hold the same box of a DTensor as this rank, ascending; [] where this rank is not in its mesh.

    A tensor on a part of a mesh (``mesh['dp']`` of dp and tp) is repeated along the dimensions left out.
    """
    sharded: Any = tensor
    mesh = sharded.device_mesh
    names = mesh.mesh_dim_names or tuple(range(mesh.ndim))
    placed = dict(zip(names, sharded.placements, strict=True))
    root = mesh._get_root_mesh()
    if root is None or not set(names) <= set(root.mesh_dim_names or ()):
        root = mesh
    coordinate = root.get_coordinate()
    if coordinate is None:
        return []
    axes = zip(coordinate, root.mesh_dim_names or names, strict=True)
    same = tuple(at if name in placed and not placed[name].is_replicate() else slice(None) for at, name in axes)
    return sorted(root.mesh[same].flatten().tolist())
