"""Bytes of tensors from files: read straight into memory where the layout allows, mapped where it does not."""

import mmap
import os
import threading
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtrain.checkpoint.format.index import ShardEntry
from mmtrain.checkpoint.format.tensors import byte_view
from mmtrain.errors import CheckpointError
from mmtrain.files import open_regular


class ShardReader:
    """The open files of one load; used from several threads, closed at the end of the ``with`` block."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._handles: dict[str, int] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: Any) -> None:
        self._maps.clear()  # a map ends when the last tensor that uses it goes
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def read_into(self, shard: ShardEntry, target: Tensor) -> None:
        """Fill ``target``, whose memory `is_plain`, with the shard; without the page faults that a map costs."""
        view = byte_view(target)
        position = shard.start
        handle = self._open(shard.file)
        while view.nbytes:
            try:
                count = os.preadv(handle, [view], position)
            except OSError as error:
                raise CheckpointError(f"{self._directory / shard.file}: cannot be read ({error})") from error
            if count == 0:
                raise CheckpointError(f"{self._directory / shard.file}: it ends before byte {position + view.nbytes}")
            view = view[count:]
            position += count

    def mapped(self, shard: ShardEntry, dtype: torch.dtype) -> Tensor:
        """The shard as a view of the mapped file; only what is used is read."""
        count = prod(shard.shape)
        if count == 0:
            return torch.empty(shard.shape, dtype=dtype)
        view = self._map(shard.file)
        if shard.start + count * dtype.itemsize > len(view):
            raise CheckpointError(
                f"{self._directory / shard.file}: it ends before byte {shard.start + count * dtype.itemsize}"
            )
        return torch.frombuffer(view, dtype=dtype, count=count, offset=shard.start).view(shard.shape)

    def _open(self, file: str) -> int:
        with self._lock:
            if file not in self._handles:
                try:
                    self._handles[file] = open_regular(self._directory / file)
                except OSError as error:
                    raise CheckpointError(f"{self._directory / file}: cannot be opened ({error})") from error
            return self._handles[file]

    def _map(self, file: str) -> mmap.mmap:
        handle = self._open(file)
        with self._lock:
            if file not in self._maps:
                # private and writable, though never written: torch warns of read-only memory
                try:
                    self._maps[file] = mmap.mmap(handle, 0, access=mmap.ACCESS_COPY)
                except (OSError, ValueError) as error:  # ValueError: it is empty
                    raise CheckpointError(f"{self._directory / file}: cannot be mapped ({error})") from error
            return self._maps[file]
