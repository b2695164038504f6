"""The copy that an asynchronous save takes: into a host buffer that is reused, while training hardly waits.

The buffer mirrors the files byte by byte, so that what follows is one long write. On the CPU it is on huge pages (where
the system has them, the first use then costs a fifth); for CUDA tensors it is pinned.

*Overlapped* sections change only in the optimizer's step (its moments): their copy continues during the next forward
and backward, and `Staged.wait` is called before the step. All others are copied before `Stager.stage` returns, because
a forward changes them too: the running statistics of a normalization are part of the model.
"""

import contextlib
import ctypes
import mmap
from bisect import bisect_left
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from mmtrain.checkpoint.format.tensors import Layout, is_plain
from mmtrain.checkpoint.write.parallel import submit

_ALIGNMENT = 64
_TOUCH = 64 << 20
_SMALL = 32 << 10
_move_small = ctypes.PyDLL(None).memmove  # for a small copy, giving up the interpreter's lock costs more than copying
_move_small.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_move_small.restype = None
HostCopy = tuple[int, int, Any]


class Staged:
    """A copy under way; `data` has the files' bytes in the order of the layouts, valid after `wait`."""

    def __init__(self, data: list[memoryview]) -> None:
        self.data = data
        self._futures: list[Future[None]] = []
        self._events: list[Any] = []

    def wait(self) -> None:
        """Return once the live tensors are no longer read. Any thread may call it, any number of times."""
        for future in self._futures:
            future.result()
        for event in self._events:
            event.synchronize()


class Stager:
    """Owns the buffer, which is as large as the largest state so far, and the threads that copy."""

    def __init__(self, threads: int = 2) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mmtrain-stage")
        self._threads = threads
        self._buffer: Tensor | None = None
        self._stream: Any = None
        self._reserving: Future[None] | None = None
        self._is_closed = False

    @property
    def bytes(self) -> int:
        """The size of the buffer; waits for one that is being made."""
        self._wait_reserved()
        return 0 if self._buffer is None else self._buffer.nbytes

    def reserve(self, layouts: Sequence[Layout]) -> None:
        """Make the buffer for these layouts in the background: the first `stage` then does not wait for new pages."""
        self._wait_reserved()
        total, pinned = _places(layouts)[1], _any_cuda(layouts)

        def make() -> None:
            address = self._room(total, pinned=pinned).data_ptr()
            for start in range(0, 0 if pinned else total, _TOUCH):
                if self._is_closed:
                    return
                ctypes.memset(address + start, 0, min(_TOUCH, total - start))  # without the interpreter's lock

        self._reserving = submit(self._pool, make)

    def stage(self, layouts: Sequence[Layout], *, overlapped: Collection[str] = ()) -> Staged:
        """Begin to copy all shards. The previous copy must have been written."""
        self._wait_reserved()
        starts, total = _places(layouts)
        buffer = self._room(total, pinned=_any_cuda(layouts))
        raw = memoryview(buffer.numpy())  # type: ignore[arg-type]
        staged = Staged([raw[start : start + layout.size] for start, layout in zip(starts, layouts, strict=True)])
        now = _Copies(buffer)
        later = _Copies(buffer)
        placed = list(zip(starts, layouts, strict=True))
        now.add_all([(start, layout) for start, layout in placed if layout.section not in overlapped])
        urgent = [self._submit(group) for group in _balanced(now.host, self._threads)]
        later.add_all([(start, layout) for start, layout in placed if layout.section in overlapped])
        self._copy_cuda(now, later, staged)
        staged._futures = [self._submit(group) for group in _balanced(later.host, self._threads)]
        for future in urgent:
            future.result()
        return staged

    def close(self) -> None:
        """End the threads and release the buffer."""
        self._is_closed = True
        self._pool.shutdown()
        self._buffer = None

    def _wait_reserved(self) -> None:
        if self._reserving is not None:
            self._reserving.exception()  # without the memory, `_room` raises it
            self._reserving = None

    def _room(self, size: int, *, pinned: bool) -> Tensor:
        if self._buffer is None or self._buffer.nbytes < size or (pinned and not self._buffer.is_pinned()):
            self._buffer = None  # released before the new one is made: there are never two
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True) if pinned else _huge_pages(size)
        return self._buffer

    def _submit(self, copies: list[HostCopy]) -> "Future[None]":
        return submit(self._pool, partial(_run, copies))

    def _copy_cuda(self, now: "_Copies", later: "_Copies", staged: Staged) -> None:
        if not (now.cuda or later.cuda):
            return
        # On the current stream a copy comes before every later kernel, so nothing can change its source too early.
        for target, source in now.cuda:
            target.copy_(source, non_blocking=True)
        current = torch.cuda.current_stream()
        staged._events.append(current.record_event())
        if later.cuda:
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for target, source in later.cuda:
                    target.copy_(source, non_blocking=True)
                    source.record_stream(self._stream)
                staged._events.append(self._stream.record_event())


def _places(layouts: Sequence[Layout]) -> tuple[list[int], int]:
    """Where each layout begins in the buffer, and the size of all."""
    starts = []
    total = 0
    for layout in layouts:
        starts.append(total)
        total += -(-layout.size // _ALIGNMENT) * _ALIGNMENT
    return starts, total


def _any_cuda(layouts: Sequence[Layout]) -> bool:
    return any(tensor.is_cuda for layout in layouts for tensor in layout.tensors)


class _Copies:
    """Copies into the buffer that are still to be made, on the host and on the device.

    A copy on the host is its size, the address of its target, and its source; without an address the source is a pair
    of tensors, target and source.
    """

    def __init__(self, buffer: Tensor) -> None:
        self.host: list[HostCopy] = []
        self.cuda: list[tuple[Tensor, Tensor]] = []
        self._buffer = buffer
        self._address = buffer.data_ptr()

    def add_all(self, layouts: Sequence[tuple[int, Layout]]) -> None:
        """Add all tensors of these layouts; each comes with its first byte in the buffer."""
        for start, layout in layouts:
            ends = (*layout.starts[1:], layout.size)
            for source, offset, end in zip(layout.tensors, layout.starts, ends, strict=True):
                if end > offset and (layout.is_plain or is_plain(source)):
                    # one memcpy without the interpreter's lock; torch's copy wakes a team of threads for each tensor
                    self.host.append((end - offset, self._address + start + offset, source))
                elif end > offset:
                    self._add(source, start + offset, end - offset)

    def _add(self, source: Tensor, start: int, size: int) -> None:
        target = self._buffer[start : start + size].view(source.dtype).view(source.shape)
        if source.is_cuda:
            self.cuda.append((target, source))
        else:
            self.host.append((size, 0, (target, source)))


def _run(copies: Sequence[HostCopy]) -> None:
    for size, address, source in copies:
        if not address:
            source[0].copy_(source[1])
        elif size < _SMALL:
            _move_small(address, source.data_ptr(), size)
        else:
            ctypes.memmove(address, source.data_ptr(), size)


def _balanced(copies: list[HostCopy], groups: int) -> list[list[HostCopy]]:
    """Consecutive copies in groups of about equal bytes."""
    sums = list(accumulate(copy[0] for copy in copies))
    total = sums[-1] if sums else 0
    bounds = [bisect_left(sums, total * number // groups) for number in range(1, groups)]
    edges = [0, *bounds, len(copies)]
    return [copies[low:high] for low, high in pairwise(edges) if high > low]


def _huge_pages(size: int) -> Tensor:
    memory = mmap.mmap(-1, max(size, mmap.PAGESIZE))
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or a kernel without transparent huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
