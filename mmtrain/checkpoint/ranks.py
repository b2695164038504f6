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

T = TypeVar("T")


class Ranks:
    """This process among those that write one checkpoint together. Making one is a collective of all processes."""

    def __init__(self, timeout: timedelta | None = None) -> None:
        self.rank = dist.rank()
        self.size = dist.world_size()
        self._group: Any = None
        if self.size > 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=timeout)

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes the manifest and renames."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Everyone gets everyone's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values

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

    def close(self) -> None:
        """Leave the group. Safe after the process group itself was left."""
        if self._group is not None and dist.is_distributed():
            torch.distributed.destroy_process_group(self._group)
        self._group = None
