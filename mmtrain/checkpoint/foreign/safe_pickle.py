"""``torch.load`` for files of other programs: ``weights_only=True``, and unknown classes replaced by inert stand-ins.

torch's restricted unpickler refuses every name outside a short list. Checkpoints of other programs contain harmless
data objects next to the weights (MMEngine's have ``HistoryBuffer`` and numpy arrays). Such a name is mapped to a class
that takes anything and does nothing: it is never imported, so none of its code can run. A name that only makes sense in
code (anything in Python's standard library but a few data types, or in torch beyond its list) causes the file to
be refused.
"""

import re
import sys
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from mmtrain.errors import CheckpointError
from mmtrain.files import check_regular
from mmtrain.printable import reason

_UNKNOWN = re.compile(r"(?:Unsupported global: GLOBAL|Trying to load unsupported GLOBAL) (\S+) w")
_BYTEARRAY = re.compile(rb"c(__builtin__|builtins)\nbytearray\n")
_SCANNED_BLOCKS = 256  # of one MB
_NAMES_LIMIT = 128
_DATA = {  # of the standard library: data types, and functions that pickle writes for such data
    "getattr", "collections.defaultdict", "collections.deque", "datetime.datetime", "datetime.date",
    "datetime.timedelta", "argparse.Namespace", "types.SimpleNamespace", "pathlib.PosixPath", "pathlib.WindowsPath",
    "pathlib.Path", "pathlib.PurePosixPath", "pathlib._local.PosixPath", "uuid.UUID", "enum.Enum", "object", "slice",
    "range", "frozenset", "list", "dict", "tuple", "set", "int", "float", "str", "bytes", "bool", "type",
    "copyreg._reconstructor", "copy_reg._reconstructor", "decimal.Decimal", "fractions.Fraction", "functools.partial",
}  # fmt: skip
_CODE_TOPS = {*sys.stdlib_module_names, "__builtin__", "torch", "torchvision", "cloudpickle", "dill", "joblib", "pip"}


class Inert:
    """Stands in for an object of a class that must not be loaded."""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...

    def __hash__(self) -> int:
        return id(self)


def _plain_dict(*_: Any) -> dict[Any, Any]:
    return {}


def _plain_list(*_: Any) -> list[Any]:
    return []


_CONTAINERS: dict[str, Any] = {
    "collections.defaultdict": _plain_dict,
    "collections.deque": _plain_list,
}  # pickle fills them afterwards


def load(path: Path) -> tuple[Any, list[str]]:
    """Read a file that ``torch.save`` wrote, on the CPU; return its contents and the names that became `Inert`.

    Raises CheckpointError for a file that contains code, with the name that it would call, and for one that cannot be
    read.
    """
    try:
        check_regular(path.stat(), path)
        return _load_zip(path) if zipfile.is_zipfile(path) else _load_legacy(path)
    except CheckpointError:
        raise
    except Exception as error:
        why = "it is empty" if _is_empty(path) else _first_line(error)
        raise CheckpointError(
            f"{path}: it cannot be read as weights ({why}); expected a file of torch.save, or .safetensors"
        ) from error


def _is_empty(path: Path) -> bool:
    return path.is_file() and not path.stat().st_size


def _load_zip(path: Path) -> tuple[Any, list[str]]:
    _check_archive(path)
    stand_ins: dict[str, Any] = {}
    for name in sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path))):
        _stand_in(name, stand_ins, path)
    return _load_with(stand_ins, path, mmap=True)


def _load_legacy(path: Path) -> tuple[Any, list[str]]:
    """Files from before torch 1.6 and plain pickles: torch lists their names only one by one, in its errors."""
    with path.open("rb") as file:
        _refuse_bytearrays(file, path)
    stand_ins: dict[str, Any] = {}
    while len(stand_ins) < _NAMES_LIMIT:
        try:
            return _load_with(stand_ins, path, mmap=False)
        except Exception as error:
            found = _UNKNOWN.search(str(error))
            if found is None:
                raise
            _stand_in(found[1], stand_ins, path)
    raise CheckpointError(f"{path}: it names more than {_NAMES_LIMIT} classes, which no file of weights does")


def _load_with(stand_ins: dict[str, Any], path: Path, *, mmap: bool) -> tuple[Any, list[str]]:
    with torch.serialization.safe_globals([(kind, name) for name, kind in stand_ins.items()]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap), sorted(stand_ins)


def _stand_in(name: str, stand_ins: dict[str, Any], path: Path) -> None:
    """Add a stand-in for ``name``. Raises CheckpointError if it is code."""
    name = name.removeprefix("builtins.")
    full = name if "." in name else f"builtins.{name}"
    if _is_code(name) or full in stand_ins:
        raise CheckpointError(
            f"{path}: refused, it contains code: loading it would call {name}; nothing in it was run. "
            "Save a state dict of tensors, best as safetensors, in a program that you trust"
        )
    stand_ins[full] = _CONTAINERS.get(full) or type(full.rpartition(".")[2], (Inert,), {})


def _check_archive(path: Path) -> None:
    """Refuse what torch.save does not write: code, and contents that are larger than the file that holds them."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        if any("/code/" in f"/{name}" or name.endswith("constants.pkl") for name in archive.namelist()):
            raise CheckpointError(
                f"{path}: refused, it is a TorchScript archive, which contains code; nothing in it was run"
            )
        for entry in archive.infolist():
            if entry.file_size > size or entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{path}: {entry.filename} in it is compressed or larger than the file itself")
            if entry.filename.endswith("data.pkl"):
                with archive.open(entry) as file:
                    _refuse_bytearrays(file, path)


def _refuse_bytearrays(file: IO[bytes], path: Path) -> None:
    """Refuse the one class of torch's list that takes memory by a number: ``bytearray(10**12)`` is a few bytes."""
    before = b""
    for _ in range(_SCANNED_BLOCKS):  # then come the tensors' bytes, which may be any
        block = file.read(1 << 20)
        if not block:
            return
        if _BYTEARRAY.search(before + block):
            raise CheckpointError(f"{path}: refused, it holds a bytearray, which may take any amount of memory")
        before = block[-64:]


def _is_code(name: str) -> bool:
    if name in _DATA:
        return False
    return "." not in name or name.partition(".")[0] in _CODE_TOPS


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("Weights only load failed", "(1)", "(2)", "Please file"))]
    return reason(RuntimeError((kept or lines or [repr(error)])[0]))
