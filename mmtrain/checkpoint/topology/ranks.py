"""Collectives of checkpoints, which never interleave with those of training.

A save ends in a background thread, and its gathers must not interleave with the all-reduces of the next step. So
checkpoints have a separate process group (gloo, on the CPU). One thread at a time uses it: the background thread
while a save is in flight, the main thread otherwise. A rank that fails still joins the collective and sends its error,
so all ranks learn of it at once; a rank that has ended breaks the connection, which is an error on the others.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from mmtrain import dist

T = TypeVar("T")


class Ranks:
    """This process among those that write one checkpoint together. Making one is a collective of all processes."""

    def __init__(self) -> None:
        self.rank = dist.rank()
        self.size = dist.world_size()
        self._group: Any = None
        if self.size > 1:
            self._group = torch.distributed.new_group(backend="gloo")

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which decides."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank gets the values of all, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def gather_on_main(self, value: T) -> list[T]:
        """Rank 0 gets the values of all, in the order of ranks; the others get []."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        torch.distributed.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def on_main(self, function: Callable[[], T]) -> T:
        """Rank 0 runs ``function``; every rank gets its result or its exception."""
        if self.size == 1:
            return function()
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.is_main:
            try:
                outcome = (function(), None)
            except Exception as error:
                outcome = (None, error)
        box: list[Any] = [outcome]
        torch.distributed.broadcast_object_list(box, src=0, group=self._group)
        value, failure = box[0]
        if failure is not None:
            raise failure
        return value

    def close(self) -> None:
        """Leave the group. Safe after the process group of training was left."""
        if self._group is not None and dist.is_distributed():
            torch.distributed.destroy_process_group(self._group)
        self._group = None
