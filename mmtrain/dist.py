"""Collectives as plain functions that also work in one process, and the choice of a device.

Nothing here calls CUDA on a machine that has none. Every function may be called before, or without, a process group:
the world is then this one process.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether a process group is up in this process."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    return torch.distributed.get_rank() if is_distributed() else 0


def world_size() -> int:
    return torch.distributed.get_world_size() if is_distributed() else 1


def local_rank() -> int:
    """The number of this process on its own machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_distributed() else 0


def is_main() -> bool:
    """Whether this is rank 0, the one that decides and writes."""
    return rank() == 0


def default_device() -> torch.device:
    """The accelerator of this process where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank())
    return torch.device("cpu")


def init(backend: str | None = None, timeout: timedelta | None = None) -> None:
    """Join the process group that the launcher's environment variables describe (``RANK``, ``WORLD_SIZE``, ...).

    ``backend`` defaults to nccl where there is CUDA and to gloo elsewhere.
    """
    if is_distributed():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    chosen = backend or ("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    store = _store_of_attempt(timeout)
    if store is None:
        torch.distributed.init_process_group(chosen, timeout=timeout)
    else:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        torch.distributed.init_process_group(chosen, timeout=timeout, store=store, rank=rank, world_size=size)


def _store_of_attempt(timeout: timedelta | None) -> Any:
    """The store of torchrun's agent, with a part of its own for each attempt; None without an agent.

    The agent's store lives on when it starts the processes again (``--max-restarts`` with a given ``--master-port``);
    torch would then read the addresses of the processes that are gone.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(host, port, is_master=False, timeout=timeout or timedelta(minutes=5))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return torch.distributed.PrefixStore(f"mmtrain/attempt_{attempt}", store)


def shutdown() -> None:
    """Leave the process group, where there is one."""
    if is_distributed():
        torch.distributed.destroy_process_group()


def barrier() -> None:
    if world_size() > 1:
        torch.distributed.barrier()


def broadcast_object(value: T, source: int = 0) -> T:
    """Everyone gets the value that rank ``source`` has."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    torch.distributed.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Everyone gets the values of all ranks, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Return the mean of ``tensor`` over ranks; the argument itself is left alone."""
    return sum_over_ranks(tensor) / world_size() if world_size() > 1 else tensor


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of ``tensor`` over ranks; the argument itself is left alone."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    torch.distributed.all_reduce(total)
    return total


def on_main(function: Callable[[], T]) -> T:
    """Run ``function`` on rank 0 alone and give everyone its result; an exception reaches everyone too."""
    if world_size() == 1:
        return function()
    outcome: tuple[bool, Any] = (False, None)
    if is_main():
        try:
            outcome = (True, function())
        except Exception as error:
            outcome = (False, error)
    succeeded, value = broadcast_object(outcome)
    if not succeeded:
        raise value
    return value
