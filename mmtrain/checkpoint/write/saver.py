"""One save, from the plan to the renamed directory: what every rank writes, and what each disk's leader adds."""

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mmtrain.checkpoint.format import tree
from mmtrain.checkpoint.format.index import INDEX, Index, PieceEntry, TensorEntry, encode_index, merge
from mmtrain.checkpoint.format.manifest import MANIFEST, FileRecord, Manifest, encode
from mmtrain.checkpoint.format.tensors import Layout, dtype_name, lay_out, lay_out_one, write_hashed, write_layout
from mmtrain.checkpoint.retention import RetirePolicy
from mmtrain.checkpoint.sharding import Held, Piece
from mmtrain.checkpoint.topology.newest import names_to_delete
from mmtrain.checkpoint.topology.parts import divide, markers
from mmtrain.checkpoint.topology.ranks import Ranks
from mmtrain.checkpoint.write.parallel import run_all
from mmtrain.checkpoint.write.staging import Staged
from mmtrain.checkpoint.write.storage import Transaction, attempt, delete_checkpoint, write_pointer
from mmtrain.errors import CheckpointError
from mmtrain.files import Files, hash_file, write_new


@dataclass(slots=True)
class Part:
    """What one rank wrote: its files, its share of the index, or the sentence that says why it could not."""

    files: dict[str, FileRecord] = field(default_factory=dict)
    index: Index = field(default_factory=dict)
    failure: str | None = None


@dataclass(slots=True)
class Plan:
    """What this rank will write: laid-out tensors (``large`` are staged, ``small`` are copies already) and JSON."""

    large: list[Layout] = field(default_factory=list)
    small: list[Layout] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    index: Index = field(default_factory=dict)

    def add_section(self, section: str, held: Held, *, rank: int) -> None:
        """Plan a section of tensors."""
        written = [piece for piece, writes in zip(held.pieces, held.writes, strict=True) if writes and _has_part(piece)]
        layouts = lay_out(section, f"{section}/rank_{rank:05d}", written)
        self.large += layouts
        entries = self.index.setdefault(section, {})
        self._note(section, layouts)
        by_name = {piece.name: piece for piece in held.pieces}
        for name, target in held.aliases.items():
            piece = by_name[name]
            code = dtype_name(piece.tensor.dtype, f"{section}/{name}")
            entries[name] = TensorEntry(code, piece.shape, alias=target)

    def add_tree(self, stem: str, value: Any) -> None:
        """Plan a nested plain value: ``<stem>.json``, and ``<stem>.safetensors`` where it holds tensors."""
        document, tensors = tree.split(value, path=stem.partition("/")[0])
        self.blobs[f"{stem}.json"] = tree.to_json(document)
        if tensors:
            layout = lay_out_one(stem, f"{stem}.safetensors", [whole(name, t) for name, t in tensors.items()])
            self.small.append(layout)
            self._note(stem, [layout])

    def _note(self, section: str, layouts: Sequence[Layout]) -> None:
        entries = self.index.setdefault(section, {})
        for layout in layouts:
            for piece, start in zip(layout.pieces, layout.starts, strict=True):
                box = PieceEntry(layout.path, len(layout.header) + start, piece.offsets, tuple(piece.tensor.shape))
                entries[piece.name] = TensorEntry(dtype_name(piece.tensor.dtype, piece.name), piece.shape, (box,))


def whole(name: str, tensor: Tensor) -> Piece:
    """A tensor that is not sharded, as a piece."""
    return Piece(name, tensor, tuple(tensor.shape), (0,) * tensor.dim())


def _has_part(piece: Piece) -> bool:
    return piece.tensor.numel() > 0 or 0 in piece.shape  # a rank may hold nothing of a tensor that has something


class PendingSave:
    """A save under way. All fields are final once `done`.

    ``stall_seconds`` is how long training has waited for it, ``total_seconds`` the time until it was durable, ``bytes``
    the size of the whole checkpoint, ``error`` why it failed, ``notices`` what did not work but costs no checkpoint
    (the pointer, a deletion).
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self.stall_seconds = 0.0
        self.total_seconds = 0.0
        self.bytes = 0
        self.error: CheckpointError | None = None
        self.notices: list[str] = []
        self.reported = False
        self._staged: Staged | None = None
        self._thread: threading.Thread | None = None

    @property
    def done(self) -> bool:
        """Whether nothing is going on any more."""
        return self._thread is None or not self._thread.is_alive()

    def wait_staged(self) -> None:
        """Return once the live tensors may change. An error in copying is kept for `wait`."""
        if self._staged is not None:
            with self.stall(), contextlib.suppress(Exception):
                self._staged.wait()
            self._staged = None

    def join(self) -> None:
        """Return once it is done, however it ended."""
        if self._thread is not None and self._thread is not threading.current_thread():
            with self.stall():
                self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Return once the checkpoint is durable. Raises CheckpointError where it is not."""
        self.join()
        self.raise_error()

    def raise_error(self) -> None:
        """Raise the error, if there is one, and note that it was told."""
        if self.error is not None:
            self.reported = True
            raise self.error

    @contextlib.contextmanager
    def stall(self) -> Any:
        """Count the time inside as waited for."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.stall_seconds += time.perf_counter() - begin

    def start(self, work: Callable[[], None], staged: Staged | None) -> None:
        """Do ``work`` in a thread of its own; the interpreter does not end before it."""
        self._staged = staged
        self._thread = threading.Thread(target=work, name=f"mmtrain-save-{self.name}")
        self._thread.start()


@dataclass(slots=True)
class Job:
    """Everything one save needs. ``failure``: what already went wrong on this rank before the writing began."""

    pending: PendingSave
    transaction: Transaction
    manifest: Manifest
    retire: RetirePolicy | None = None
    plan: Plan = field(default_factory=Plan)
    staged: Staged | None = None
    adopt: bool = False
    failure: Exception | None = None


class Saver:
    """Carries out jobs. ``pool`` is for the files of one save, ``ranks`` for the words between processes."""

    def __init__(self, root: Path, files: Files, pool: ThreadPoolExecutor, ranks: Ranks) -> None:
        self._root = root
        self._files = files
        self._pool = pool
        self._ranks = ranks

    def run(self, job: Job) -> None:
        """Write, gather the other ranks' results, commit, and delete what ``job.retire`` says.

        If any rank failed, the partial directory is removed.

        An Exception ends up in ``job.pending.error``; what is no Exception (Ctrl-C in a blocking save) passes through.
        """
        pending = job.pending
        try:
            parts = self._together(lambda: self._write(job))
            if job.adopt:
                known = self._ranks.on_leaders(lambda: {path for part in parts for path in part.files})
                parts += self._together(lambda: self._adopt(job.transaction.directory, known))
            shared = self._ranks.disks.one
            if shared:
                pending.bytes, notices = self._ranks.on_main(lambda: self._commit(job, parts))
            else:
                pending.bytes, notices = self._commit_parts(job, parts)
            pending.notices += notices
            if job.retire is not None and (self._ranks.main or not shared):
                self._retire(job.retire, pending)
        except BaseException as error:
            if self._ranks.leader:
                pending.notices += job.transaction.abort()
            if not isinstance(error, Exception):
                raise
            pending.error = failed(pending.path, error)
        finally:
            job.plan, job.staged, job.failure = Plan(), None, None  # lets go of the live tensors

    def _together(self, work: Callable[[], Part]) -> list[Part]:
        """Every rank works, then leaders hear what all have written. Raises on every rank where one failed."""
        cause = None
        try:
            part = work()
        except Exception as error:
            part, cause = Part(failure=str(error) or repr(error)), error
        for rank, failure in enumerate(self._ranks.gather(part.failure)):
            if failure is not None:
                where = f"rank {rank}: " if self._ranks.size > 1 else ""
                raise CheckpointError(where + failure) from cause
        return self._ranks.gather_on_leaders(part)

    def _write(self, job: Job) -> Part:
        """Write everything that this rank has planned. The directories are made by whoever comes first."""
        if job.failure is not None:
            raise job.failure
        plan, directory = job.plan, job.transaction.directory
        paths = [*(layout.path for layout in (*plan.large, *plan.small)), *plan.blobs]
        for parent in sorted({str(Path(path).parent) for path in paths} - {"."}):
            with contextlib.suppress(FileExistsError):
                self._files.mkdir(directory / parent)
        views: list[memoryview | None] = [None] * len(plan.large)
        if job.staged is not None:
            job.staged.wait()
            views = [*job.staged.data]
        work: dict[str, Callable[[], FileRecord]] = {
            layout.path: partial(write_layout, layout, directory, self._files, view)
            for layout, view in zip((*plan.large, *plan.small), (*views, *[None] * len(plan.small)), strict=True)
        }
        for path, blob in plan.blobs.items():
            work[path] = partial(write_hashed, directory / path, [memoryview(blob)], self._files)
        records = run_all(self._pool, list(work.values()))
        return Part(dict(zip(work, records, strict=True)), plan.index)

    def _adopt(self, directory: Path, known: Collection[str]) -> Part:
        """Hash and fsync what others wrote into the directory; the ranks divide the files among themselves."""
        paths = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
        own = self._ranks.own
        mine = [path for path in paths if path not in known][own.index(self._ranks.rank) :: len(own)]
        records = run_all(self._pool, [partial(self._adopt_one, directory / path) for path in mine])
        return Part(dict(zip(mine, records, strict=True)))

    def _adopt_one(self, path: Path) -> FileRecord:
        self._files.fsync_path(path)
        return FileRecord(path.stat().st_size, hash_file(path))

    def _commit(self, job: Job, parts: Sequence[Part]) -> tuple[int, list[str]]:
        """Describe, rename into place, pointer: rank 0 alone. Returns the checkpoint's bytes and notices."""
        size = self._describe(job, parts)
        notices = job.transaction.publish()
        return size, notices + self._point(job.manifest.name)

    def _commit_parts(self, job: Job, parts: Sequence[Part]) -> tuple[int, list[str]]:
        """The same on every disk; no leader renames before the directories of all are complete."""
        size = self._ranks.on_leaders(lambda: self._describe(job, parts))
        notices = self._ranks.on_leaders(job.transaction.publish)
        return size, notices + (self._point(job.manifest.name) if self._ranks.leader else [])

    def _describe(self, job: Job, parts: Sequence[Part]) -> int:
        """Write index and manifest, and bring the directory to the disk. Returns the checkpoint's bytes."""
        directory, manifest, disks = job.transaction.directory, job.manifest, self._ranks.disks
        index = encode_index(merge([part.index for part in parts], copies=not disks.one))
        common = {INDEX: write_hashed(directory / INDEX, [memoryview(index)], self._files)}
        if disks.one:
            files = {path: record for part in parts for path, record in part.files.items()}
            manifest.files = dict(sorted((files | common).items()))
        else:
            manifest.files, manifest.parts = divide([part.files for part in parts], disks, common)
            for marker, ranks, data in markers(disks):
                if self._ranks.rank in ranks:
                    write_new(directory / marker, data, self._files)
        write_new(directory / MANIFEST, encode(manifest), self._files)
        job.transaction.seal()
        return manifest.bytes

    def _retire(self, retire: RetirePolicy, pending: PendingSave) -> None:
        """Delete older checkpoints; what cannot be deleted is a notice, because the new checkpoint is complete."""
        for name in names_to_delete(self._root, self._ranks, retire):
            delete = partial(delete_checkpoint, self._root, name, self._files)
            pending.notices += attempt(delete, f"{name} could not be deleted")

    def _point(self, name: str) -> list[str]:
        return attempt(lambda: write_pointer(self._root, name, self._files), "the pointer was not written")


def failed(path: Path, error: BaseException) -> CheckpointError:
    """The one sentence for a save that failed."""
    told = CheckpointError(f"{path} was not saved: {error}; the older checkpoints are untouched")
    told.__cause__ = error
    return told
