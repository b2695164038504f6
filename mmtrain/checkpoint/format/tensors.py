"""Tensors as safetensors files (https://huggingface.co/docs/safetensors), written from memory views without a copy.

A file is an 8-byte little-endian length, a JSON header of that many bytes, and the raw bytes of the tensors. Here the
order of tensors is that of the safetensors library (wider types first, then by name), so that every tensor is aligned
to its type. The bytes are hashed (xxh3-128) on their way to the disk.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from mmtrain import heartbeat
from mmtrain.checkpoint.format.manifest import FileRecord
from mmtrain.checkpoint.sharding import TensorShard
from mmtrain.errors import CheckpointError
from mmtrain.files import Files

FILE_LIMIT = 512 << 20  # several files, so that two threads can write at once
_CHUNK = 4 << 20
_SMALL = 256 << 10
_DTYPE_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "bool": "BOOL",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
    "complex128": "C128", "complex32": "C32",
}  # fmt: skip
_PAIRS = {"C128": "F64", "C32": "F16"}  # complex types that safetensors lacks: pairs of numbers in a file's header
DTYPES = {code: getattr(torch, name) for name, code in _DTYPE_NAMES.items() if hasattr(torch, name)}
_NAMES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Layout:
    """One safetensors file: ``path`` in the checkpoint, ``header`` with its length, tensors in the order of the file.

    ``starts`` are byte positions counted from the end of the header; ``size`` is the number of bytes after it.
    ``is_plain``: all tensors are, see `is_plain`.
    """

    section: str
    path: str
    header: bytes
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    starts: tuple[int, ...]
    size: int
    is_plain: bool


def dtype_name(dtype: torch.dtype, where: str) -> str:
    """The name of a type, safetensors' where it has one. Raises CheckpointError naming ``where`` for an unknown one."""
    if dtype not in _NAMES:
        raise CheckpointError(f"{where}: type {dtype} cannot be written to a safetensors file")
    return _NAMES[dtype]


def lay_out(section: str, stem: str, shards: Iterable[TensorShard], *, limit: int = FILE_LIMIT) -> list[Layout]:
    """Divide shards into files of at most ``limit`` bytes (a larger tensor gets a file to itself).

    The files are ``<stem>_part_00000.safetensors`` and so on.
    """
    groups: list[list[TensorShard]] = []
    filled = 0
    for shard in shards:
        if not groups or filled + shard.tensor.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(shard)
        filled += shard.tensor.nbytes
    return [lay_out_one(section, f"{stem}_part_{i:05d}.safetensors", group) for i, group in enumerate(groups)]


def lay_out_one(section: str, path: str, shards: Iterable[TensorShard]) -> Layout:
    """Lay out one file."""
    shards = list(shards)
    if any(shard.name == "__metadata__" for shard in shards):
        raise CheckpointError(f"{section}: a tensor cannot be called __metadata__; safetensors reserves that name")
    ordered = sorted(shards, key=lambda shard: (-shard.tensor.element_size(), shard.name))
    header: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    starts = []
    position = 0
    for shard in ordered:
        end = position + shard.tensor.nbytes
        code = dtype_name(shard.tensor.dtype, f"{section}/{shard.name}")
        shape = [*shard.tensor.shape, 2] if code in _PAIRS else [*shard.tensor.shape]
        header[shard.name] = {"dtype": _PAIRS.get(code, code), "shape": shape, "data_offsets": [position, end]}
        if tuple(shard.tensor.shape) != shard.shape:
            parts[shard.name] = {"shape": shard.shape, "offsets": shard.offsets}
        starts.append(position)
        position = end
    metadata = {"format": "pt"} | ({"mmtrain.shards": json.dumps(parts)} if parts else {})
    text = json.dumps({"__metadata__": metadata} | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    names, tensors = tuple(shard.name for shard in ordered), tuple(shard.tensor for shard in ordered)
    start = len(text).to_bytes(8, "little")
    return Layout(section, path, start + text, names, tensors, tuple(starts), position, all(map(is_plain, tensors)))


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order: its memory where that is contiguous on the CPU, else a copy."""
    plain = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
    return memoryview(flat_bytes(plain)) if plain.numel() else memoryview(b"")


def flat_bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor on the CPU as a flat numpy array of bytes."""
    # as_strided, since a tensor with a single element counts as contiguous whatever its strides
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor's bytes are in row-major order in CPU memory."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def write_layout(layout: Layout, directory: Path, files: Files, data: memoryview | None = None) -> FileRecord:
    """Write one file, fsync it, and return its record.

    ``data`` holds the tensors' bytes as laid out; without it they are taken from the live tensors.
    """
    views = [data] if data is not None else map(byte_view, layout.tensors)
    return write_hashed(directory / layout.path, _chunks(chain([memoryview(layout.header)], views)), files)


def write_hashed(path: Path, chunks: Iterable[memoryview], files: Files) -> FileRecord:
    """Write chunks into a new file, hashing each while it is in the processor's cache; fsync; return the record."""
    hasher = xxhash.xxh3_128()
    size = 0
    handle = files.open(path)
    try:
        for chunk in chunks:
            hasher.update(chunk)
            files.write(handle, chunk)
            heartbeat.beat()
            size += chunk.nbytes
        files.fsync(handle)
    finally:
        files.close(handle)
    return FileRecord(size, hasher.hexdigest())


def _chunks(views: Iterable[memoryview]) -> Iterator[memoryview]:
    """Small views joined, large ones cut, so that a call writes neither a few bytes nor more than a cache holds."""
    gathered = bytearray()
    for view in views:
        if view.nbytes <= _SMALL:
            gathered += view
        if gathered and (view.nbytes > _SMALL or len(gathered) > _SMALL):
            yield memoryview(gathered)
            gathered = bytearray()
        if view.nbytes > _SMALL:
            yield from (view[start : start + _CHUNK] for start in range(0, view.nbytes, _CHUNK))
    if gathered:
        yield memoryview(gathered)
