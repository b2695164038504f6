"""The transaction that makes a checkpoint exist completely or not at all, and the clearing up after a killed run.

Every call that changes the disk goes through a `Files` object, so that tests can make any one of them fail, or end the
process in it. The order is: files into a hidden sibling directory, each fsynced -> manifest last -> fsync of
the directories -> rename into place -> fsync of the parent -> the pointer ``last_checkpoint`` -> only then retention.

Hidden names, all beside the checkpoints: ``.<name>.tmp-<owner>`` (being written), ``.<name>.old-<owner>`` (the one of
the same name that is being replaced), ``.<name>.del-<owner>`` (being deleted). ``<owner>`` identifies the process
(`mmtrain.checkpoint.process_identity`), so that what a living process is writing is never cleared away.
"""

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from mmtrain.checkpoint import process_identity
from mmtrain.checkpoint.format.manifest import MANIFEST
from mmtrain.checkpoint.format.verify import read_manifest
from mmtrain.errors import CheckpointError
from mmtrain.files import Files, make_directories, read_bounded, replacing, write_new

POINTER = "last_checkpoint"
_POINTER_LIMIT = 4096
_HIDDEN = re.compile(r"^\.(?P<name>.+)\.(?P<kind>tmp|old|del)-(?P<token>[0-9a-f]+-[0-9a-f]+-\d+-\d+-[0-9a-f]+)$")
_OURS = (MANIFEST, "tensors.json", "state.json")


class Transaction:
    """The making of one checkpoint ``root/name``: `begin`, write into ``directory``, `seal`, `publish`; or `abort`."""

    def __init__(self, root: Path, name: str, files: Files, token: str | None = None) -> None:
        self.root = root
        self.name = name
        self.token = token or process_identity.new_token()
        self.directory = root / f".{name}.tmp-{self.token}"
        self._files = files

    def begin(self) -> None:
        """Make the directory to write into, and the work directory if it is missing."""
        make_directories(self.root, self._files)
        self._files.mkdir(self.directory)

    def seal(self) -> None:
        """Bring the entries of the finished directory to the disk."""
        for directory in sorted((p for p in self.directory.rglob("*") if p.is_dir()), reverse=True):
            self._files.fsync_path(directory)
        self._files.fsync_path(self.directory)

    def publish(self) -> list[str]:
        """Rename the sealed directory into place, durably; return notices on what could not be cleared away.

        A checkpoint of the same name stays until the new one is in place. Anything else of that name is kept under
        another one.
        """
        final = self.root / self.name
        aside = None
        notices = []
        if os.path.lexists(final):
            aside, notice = self._aside(final)
            notices += [notice] if notice else []
            self._files.rename(final, aside)
        try:
            self._files.rename(self.directory, final)
        except BaseException:
            if aside is not None:
                self._files.rename(aside, final)
            raise
        self._files.fsync_path(self.root)
        if aside is not None and not notices:
            notices += attempt(
                lambda: remove_tree(aside, self._files), f"the replaced {self.name} could not be deleted"
            )
        return notices

    def _aside(self, final: Path) -> tuple[Path, str]:
        why = _why_kept(final)
        if not why:
            return self.root / f".{self.name}.old-{self.token}", ""
        kept = self.root / f"{self.name}.foreign-{self.token.rpartition('-')[2]}"
        return kept, f"{final} {why}; it is kept as {kept.name}"

    def abort(self) -> list[str]:
        """Remove the partial directory; return notices on what could not be removed. Never raises OSError."""

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.directory.lstat()
                remove_tree(self.directory, self._files)

        return attempt(remove, f"the partial directory {self.directory.name} could not be removed")


def _why_kept(final: Path) -> str:
    """Why what is in the place of a new checkpoint is not an earlier save of it, which the new one replaces; or ""."""
    if not (final.is_dir() and any((final / known).exists() for known in _OURS)):
        return "was not written by mmtrain"
    try:
        name = read_manifest(final).name
    except CheckpointError:  # a damaged one
        return ""
    return "" if name == final.name else f"is a copy of {name}"


def write_pointer(root: Path, name: str, files: Files) -> None:
    """Write ``name`` into ``last_checkpoint``: a relative name, so that a moved work directory still resumes."""
    aside = root / f".{POINTER}.tmp-{process_identity.new_token()}"
    with replacing(root / POINTER, aside=aside, durable=False, files=files):
        write_new(aside, name.encode(), files)
    files.fsync_path(root)


def device_of(path: Path) -> int:
    """The kernel's number of the file system that ``path`` is on, or would be made on."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path.stat().st_dev


def read_pointer(root: Path) -> str | None:
    """The name in ``last_checkpoint``, which is only a hint; None if there is none."""
    try:
        return read_bounded(root / POINTER, _POINTER_LIMIT).decode().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def delete_checkpoint(root: Path, name: str, files: Files) -> None:
    """Delete ``root/name``: renamed away first, so that a half-deleted one is never taken for a checkpoint."""
    doomed = root / f".{name}.del-{process_identity.new_token()}"
    files.rename(root / name, doomed)
    remove_tree(doomed, files)


def remove_tree(path: Path, files: Files) -> None:
    """Delete a file, or a directory with its contents. Links are removed, not followed."""
    if path.is_symlink() or not path.is_dir():
        files.unlink(path)
        return
    for child in sorted(path.iterdir()):
        remove_tree(child, files)
    files.rmdir(path)


def recover(root: Path, files: Files, *, exclusive: bool = False) -> list[str]:
    """Clear away what killed runs left, and put back a checkpoint that was being replaced; return one notice for each.

    Leftovers of a process that is alive, or that is on another machine, stay; ``exclusive=True`` says that the caller
    holds the lock of the work directory, so that only this process can be writing. No save may be in flight.
    """
    notices: list[str] = []
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        match = _HIDDEN.match(path.name)
        if match is None or process_identity.is_other_alive(match["token"], unknown=not exclusive):
            continue
        final = root / match["name"]
        if match["kind"] == "old" and not os.path.lexists(final):
            failed = attempt(lambda: files.rename(path, final), f"{path.name} could not be put back")  # noqa: B023
            notices += failed or [f"put back {final.name}, whose replacement was never finished"]
        else:
            failed = attempt(lambda: remove_tree(path, files), f"{path.name} could not be removed")  # noqa: B023
            notices += failed or [f"removed {path.name}, left by a save or a deletion that never finished"]
    return notices


def attempt(action: Callable[[], None], what: str) -> list[str]:
    """Do what a finished save does not depend on: an OSError becomes a notice."""
    try:
        action()
    except OSError as error:
        return [f"{what}: {error}"]
    return []
