"""Which files a text dataset consists of, and which of them are held out for validation."""

import fnmatch
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmtrain.errors import ConfigError
from mmtrain.registry import DATASETS

SPLITS = ("train", "val", "all")


@DATASETS.register_module()
class TextFiles:
    """The text files under ``root``, in one fixed order, split into training and validation files.

    * ``patterns``: shell patterns; one without a slash is compared with the file's name, one with a slash with its path
      below ``root``;
    * ``exclude``: likewise, for files and directories to leave out;
    * ``validation_share``: about the share of files that is held out. A hash of a file's
      path alone: it is the same on every machine, and adding files moves no other file;
    * ``name``: what the cache is called (default: the directory's name).
    """

    def __init__(
        self,
        root: str,
        patterns: Sequence[str] = ("*.txt",),
        *,
        exclude: Sequence[str] = (),
        validation_share: float = 0.05,
        name: str | None = None,
    ) -> None:
        if not 0 <= validation_share <= 1:
            raise ConfigError(f"source.validation_share: {validation_share} is not between 0 and 1")
        self.root = Path(root)
        self.patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.validation_share = validation_share
        self.name = name or self.root.resolve().name or "text"

    def files(self, split: str = "all") -> list[str]:
        """Return the paths of one split ("train", "val" or "all"), below ``root``, with slashes, sorted.

        Raises ConfigError when the directory does not exist or has no file for this split.
        """
        if split not in SPLITS:
            raise ConfigError(f"dataset.split: {split!r} is unknown; expected one of {', '.join(SPLITS)}")
        if not self.root.is_dir():
            raise ConfigError(f"source.root: {str(self.root)!r} does not exist; name a directory of text files")
        found = sorted(self._walk())
        if not found:
            raise ConfigError(f"source.root: no file below {str(self.root)!r} matches {' or '.join(self.patterns)}")
        chosen = found if split == "all" else [p for p in found if self.is_validation(p) == (split == "val")]
        if not chosen:
            raise ConfigError(
                f"dataset.split: all {len(found)} files below {str(self.root)!r} fall into the other split; "
                "set another source.validation_share, or put each split into a separate directory and use split='all'"
            )
        return chosen

    def is_validation(self, path: str) -> bool:
        """Whether the file at this path (below ``root``, with slashes) is held out for validation."""
        number = int.from_bytes(hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()[:8], "big")
        return number < self.validation_share * 2**64

    def _walk(self) -> Iterator[str]:
        for directory, directories, names in os.walk(self.root):
            below = Path(directory).relative_to(self.root)
            directories[:] = [name for name in directories if not _matches((below / name).as_posix(), self.exclude)]
            for name in names:
                path = (below / name).as_posix()
                if _matches(path, self.patterns) and not _matches(path, self.exclude):
                    yield path


@DATASETS.register_module()
class StdlibSource(TextFiles):
    """The source of Python's standard library: some 9 MB of text that every machine with Python has.

    It excludes tests, installed packages, and tables that are not code (``encodings``, ``pydoc_data``).
    """

    EXCLUDE = (
        "site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data",
        "__phello__*", "config-*", "lib-dynload",
    )  # fmt: skip

    def __init__(self, validation_share: float = 0.05) -> None:
        root = sysconfig.get_path("stdlib")
        super().__init__(root, ["*.py"], exclude=self.EXCLUDE, validation_share=validation_share, name="stdlib")


def _matches(path: str, patterns: Sequence[str]) -> bool:
    name = path.rsplit("/", 1)[-1]
    return any(fnmatch.fnmatchcase(path if "/" in pattern else name, pattern) for pattern in patterns)
