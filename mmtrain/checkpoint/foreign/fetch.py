"""Makes addresses local: a path or ``file://`` is used in place, anything else is copied to a temporary directory."""

import http.client
import re
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mmtrain import heartbeat
from mmtrain.errors import CheckpointError
from mmtrain.printable import reason

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)://")  # two characters at least: C:/ is a drive
# A download may take PATIENCE seconds and one more for every MIN_RATE bytes that have arrived: an answer of a byte
# every few seconds, which never breaks the limit of a single read, ends too.
PATIENCE = 60.0
MIN_RATE = 16 << 10
_BLOCK = 1 << 20


@contextmanager
def fetched(source: str) -> Iterator[Path]:
    """Yield a local path to ``source``, valid inside the block.

    ``http(s)://`` goes through the standard library, other schemes (``s3://``, ``gs://``, ``memory://``, ...) through
    fsspec, where it is installed. Raises CheckpointError where it cannot be fetched.
    """
    found = _SCHEME.match(source)
    scheme = found[1].lower() if found else ""
    if not scheme:
        yield Path(source).expanduser()
    elif scheme == "file":
        yield Path(unquote(urlsplit(source).path))
    else:
        with tempfile.TemporaryDirectory(prefix="mmtrain-weights-", ignore_cleanup_errors=True) as folder:
            get = _download if scheme in ("http", "https") else _fsspec
            yield get(source, Path(folder))


def _download(source: str, folder: Path) -> Path:
    target = folder / _file_name(urlsplit(source).path)
    download = _Download(source, target)
    begin = time.monotonic()
    while not download.done.wait(0.2):
        heartbeat.beat()
        elapsed = time.monotonic() - begin
        if elapsed > PATIENCE + download.received / MIN_RATE:
            download.stopped = True
            raise CheckpointError(
                f"{source}: the download is too slow ({download.received} bytes in {elapsed:.0f} seconds); get the "
                "file with another program and name its path"
            )
    if download.error is not None:
        raise CheckpointError(f"{source}: cannot be downloaded ({_why(download.error)})") from download.error
    if download.announced is not None and download.announced != download.received:
        raise CheckpointError(
            f"{source}: the download ended early, after {download.received} of {download.announced} bytes"
        )
    return target


class _Download:
    """A download in a thread of its own, so that the caller can stop waiting: in a name's resolution, in a header.

    ``received`` bytes so far of those ``announced``; ``stopped`` asks it to end at the next block.
    """

    def __init__(self, source: str, target: Path) -> None:
        self.received = 0
        self.announced: int | None = None
        self.error: Exception | None = None
        self.stopped = False
        self.done = threading.Event()
        threading.Thread(target=self._run, args=(source, target), name="mmtrain-download", daemon=True).start()

    def _run(self, source: str, target: Path) -> None:
        try:
            with urllib.request.urlopen(source, timeout=PATIENCE) as answer:
                self.announced = answer.length
                free = shutil.disk_usage(target.parent).free
                if self.announced is not None and self.announced > free:
                    raise OSError(f"it has {self.announced} bytes, and {target.parent} has room for {free}")
                with target.open("xb") as file:
                    while not self.stopped and (block := answer.read1(_BLOCK)):
                        file.write(block)
                        self.received += len(block)
        except Exception as error:
            self.error = error
            if isinstance(error, urllib.error.HTTPError):  # it is the answer, too
                error.close()
        finally:
            self.done.set()


def _fsspec(source: str, folder: Path) -> Path:
    try:
        import fsspec
    except ImportError as error:
        raise CheckpointError(f"{source}: reading this address needs fsspec: pip install 'mmtrain[remote]'") from error
    try:
        remote, path = fsspec.core.url_to_fs(source)
        target = folder / _file_name(path.rstrip("/"))
        remote.get(path, str(target), recursive=remote.isdir(path))
    except Exception as error:  # every file system has errors of its own
        raise CheckpointError(f"{source}: cannot be fetched ({_why(error)})") from error
    return target


def _file_name(path: str) -> str:
    """The last part of a path, with its ending, as a name that any directory can have."""
    name = re.sub(r"[^\w.-]", "_", unquote(path).rpartition("/")[2])[-100:]
    return name if name.strip(".") else "weights"


def _why(error: Exception) -> str:
    is_odd = isinstance(error, http.client.HTTPException)
    return f"the server's answer is not HTTP: {type(error).__name__} {reason(error)}" if is_odd else reason(error)
