"""Collectives as plain functions that also work in one process, and the choice of a device.

Nothing here calls CUDA on a machine that has none. Every function may be called before, or without, a process group:
the world is then this one process.
"""

import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmtrain.errors import RunError

T = TypeVar("T")

_model_parallel = 1


def is_distributed() -> bool:
    """Whether a process group is up in this process."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    return torch.distributed.get_rank() if is_distributed() else 0


def world_size() -> int:
    return torch.distributed.get_world_size() if is_distributed() else 1


def set_model_parallel(size: int) -> None:
    """Declare that ``size`` consecutive ranks share one copy of the model, and so work on the same samples."""
    global _model_parallel  # noqa: PLW0603 - the world is the process's, not an object's
    _model_parallel = size


def model_parallel() -> int:
    """The number of ranks that share one copy of the model; 1 if each has a full copy."""
    return _model_parallel


def data_rank() -> int:
    """Which share of the samples this process works on: the index of its copy of the model."""
    return rank() // _model_parallel


def data_size() -> int:
    """The number of shares that samples are divided into: the number of copies of the model."""
    return world_size() // _model_parallel


def local_rank() -> int:
    """The rank of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_distributed() else 0


def is_main() -> bool:
    """Whether this is rank 0, the one that decides and writes."""
    return rank() == 0


def default_device() -> torch.device:
    """The accelerator of this process if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def init(backend: str | None = None, timeout: timedelta | None = None, *, store: Any = None) -> None:
    """Join the process group that the launcher's environment variables describe (``RANK``, ``WORLD_SIZE``, ...).

    ``backend`` defaults to nccl if there is CUDA and to gloo elsewhere; ``store`` is where the processes meet,
    without one torch opens it.
    """
    if is_distributed():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    chosen = backend or ("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if store is None:
        torch.distributed.init_process_group(chosen, timeout=timeout)
    else:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.distributed.init_process_group(chosen, timeout=timeout, store=store, rank=rank, world_size=size)


def set_timeout(timeout: timedelta) -> None:
    """Set the limit for a collective in every existing process group; only nccl and gloo have one."""
    from torch.distributed import distributed_c10d

    for group, (backend, _) in distributed_c10d._world.pg_map.items():
        if "nccl" in backend or "gloo" in backend:
            distributed_c10d._set_pg_timeout(timeout, group)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    set_model_parallel(1)
    if is_distributed():
        torch.distributed.destroy_process_group()


def barrier() -> None:
    if world_size() > 1:
        torch.distributed.barrier()


def broadcast_object(value: T, source: int = 0) -> T:
    """Return the value of rank ``source`` on every rank."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    torch.distributed.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Return the values of all ranks on every rank, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Return the mean of ``tensor`` over ranks; the argument is not changed."""
    return sum_over_ranks(tensor) / world_size() if world_size() > 1 else tensor


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of ``tensor`` over ranks; the argument is not changed."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    torch.distributed.all_reduce(total)
    return total


def on_main(function: Callable[[], T]) -> T:
    """Run ``function`` on rank 0 and return its result on every rank; an exception is raised on every rank.

    Where an exception, or a result, cannot be pickled, rank 0 raises its own, and the other ranks a RunError that says
    the same.
    """
    if world_size() == 1:
        return function()
    value: Any = None
    error: Exception | None = None
    if is_main():
        try:
            value = function()
        except Exception as failure:
            error = failure
    error, sent = _pickled(value, error) if is_main() else (None, b"")
    sent = broadcast_object(sent)
    if error is not None:
        raise error
    if is_main():
        return value
    succeeded, value = pickle.loads(sent)
    if not succeeded:
        raise value
    return value


def _pickled(value: Any, error: Exception | None) -> tuple[Exception | None, bytes]:
    """The error to raise here, if any, and what tells the other ranks: (whether it succeeded, value or error)."""
    if error is None:
        try:
            return None, pickle.dumps((True, value))
        except Exception as failure:  # pickle raises what the object raises
            error = failure
    try:
        sent = pickle.dumps((False, error))
        alike = str(pickle.loads(sent)[1]) == str(error)  # one with a constructor of its own may change
    except Exception:
        alike = False
    return error, sent if alike else pickle.dumps((False, RunError(f"{type(error).__name__}: {error}")))
