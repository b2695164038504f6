"""Makes addresses local: a path or ``file://`` is used in place, anything else is copied to a temporary directory."""

import re
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mmtrain.errors import CheckpointError

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")  # two characters at least: C:/ is a drive
_TIMEOUT = 60.0


@contextmanager
def fetched(source: str) -> Iterator[Path]:
    """Yield a local path to ``source``, valid inside the block.

    ``http(s)://`` goes through the standard library, other schemes (``s3://``, ``gs://``, ``memory://``, ...) through
    fsspec, where it is installed. Raises CheckpointError if it cannot be fetched.
    """
    found = _SCHEME.match(source)
    scheme = found[1].lower() if found else ""
    if not scheme:
        yield Path(source).expanduser()
    elif scheme == "file":
        yield Path(unquote(urlsplit(source).path))
    else:
        with tempfile.TemporaryDirectory(prefix="mmtrain-weights-") as folder:
            get = _download if scheme in ("http", "https") else _fsspec
            yield get(source, Path(folder))


def _download(source: str, folder: Path) -> Path:
    target = folder / (Path(unquote(urlsplit(source).path)).name or "weights")
    try:
        with urllib.request.urlopen(source, timeout=_TIMEOUT) as answer, target.open("wb") as file:
            shutil.copyfileobj(answer, file, 1 << 20)
            announced = answer.headers.get("Content-Length")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source}: cannot be downloaded ({error})") from error
    if announced is not None and int(announced) != target.stat().st_size:
        raise CheckpointError(f"{source}: the download ended early, after {target.stat().st_size} of {announced} bytes")
    return target


def _fsspec(source: str, folder: Path) -> Path:
    try:
        import fsspec
    except ImportError as error:
        raise CheckpointError(f"{source}: reading this address needs fsspec: pip install 'mmtrain[remote]'") from error
    try:
        remote, path = fsspec.core.url_to_fs(source)
        target = folder / (Path(path.rstrip("/")).name or "weights")
        remote.get(path, str(target), recursive=remote.isdir(path))
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"{source}: cannot be fetched ({error})") from error
    return target
