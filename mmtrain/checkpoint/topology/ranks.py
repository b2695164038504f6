"""How the ranks of one save talk to each other, without getting between the collectives of training.

Writing ends in a background thread, and its gathers must not interleave with the all-reduces of the next step. So the
store has a process group of its own (gloo, on the CPU), which only one thread at a time uses: the background thread
while a save is in flight, the main thread otherwise. A rank that fails still takes part, with its error in its hands,
so that the others hear of it at once; a rank that is gone breaks the connection, which is an error on the others.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

from mmtrain import dist
from mmtrain.checkpoint.topology.disks import Disks

T = TypeVar("T")


class Ranks:
    """This process among those that write one checkpoint together. Making one is a collective of all processes.

    ``disks`` says which of them see the same directory; all of them where it is silent.
    """

    def __init__(self, disks: Disks | None = None, *, timeout: timedelta | None = None) -> None:
        self.rank = dist.rank()
        self.size = dist.world_size()
        self.disks = disks or Disks.shared(self.size)
        self.own = self.disks.ranks_with(self.rank)
        self._group: Any = None
        if self.size > 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=timeout)

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which decides."""
        return self.rank == 0

    @property
    def leader(self) -> bool:
        """Whether this is the rank that writes the manifest of its disk and renames there; on a shared one rank 0."""
        return self.rank == self.own[0]

    def gather(self, value: T) -> list[T]:
        """Everyone gets everyone's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def gather_on_leaders(self, value: T) -> list[T]:
        """Every disk's leader gets everyone's value, in the order of ranks; others may get nothing."""
        if self.size == 1 or not self.disks.one:
            return self.gather(value)
        values: list[Any] | None = [None] * self.size if self.main else None
        torch.distributed.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def on_main(self, function: Callable[[], T]) -> T:
        """Rank 0 runs ``function``; everyone gets its result or its exception."""
        if self.size == 1:
            return function()
        outcome: tuple[Any, BaseException | None] = (None, None)
        if self.main:
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

    def on_leaders(self, function: Callable[[], T]) -> T:
        """Each disk's leader runs ``function``; everyone gets its own leader's result, or the first one's exception."""
        if self.disks.one:
            return self.on_main(function)
        return self.disks.on_leaders(function, gather=self.gather)

    def close(self) -> None:
        """Leave the group. Safe after the process group itself was left."""
        if self._group is not None and dist.is_distributed():
            torch.distributed.destroy_process_group(self._group)
        self._group = None
