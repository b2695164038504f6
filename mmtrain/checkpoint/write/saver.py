"""One save, from the plan to the renamed directory: what every rank writes, and what each disk's leader adds."""

import contextlib
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mmtrain.checkpoint.format import tree
from mmtrain.checkpoint.format.index import INDEX, Index, encode_index
from mmtrain.checkpoint.format.manifest import MANIFEST, FileRecord, Manifest, encode
from mmtrain.checkpoint.format.tensors import write_hashed, write_layout
from mmtrain.checkpoint.inventory import Inventory
from mmtrain.checkpoint.retention import RetirePolicy
from mmtrain.checkpoint.topology.base import Topology
from mmtrain.checkpoint.write.parallel import run_all
from mmtrain.checkpoint.write.pending import PendingSave
from mmtrain.checkpoint.write.plan import Plan
from mmtrain.checkpoint.write.staging import Staged
from mmtrain.checkpoint.write.storage import Transaction, attempt, delete_checkpoint, write_pointer
from mmtrain.errors import CheckpointError
from mmtrain.files import Files, hash_file, write_new


@dataclass(slots=True)
class SaveJob:
    """Everything one save needs.

    ``adopt``: other code writes into the directory too; ``failure``: what went wrong on this rank before the writing.
    """

    pending: PendingSave
    transaction: Transaction
    manifest: Manifest
    retire: RetirePolicy | None = None
    plan: Plan = field(default_factory=Plan)
    staged: Staged | None = None
    adopt: bool = False
    failure: Exception | None = None


@dataclass(slots=True)
class RankResult:
    """What one rank wrote: its files, its part of the index, or the sentence that says why it could not."""

    files: dict[str, FileRecord] = field(default_factory=dict)
    index: Index = field(default_factory=dict)
    failure: str | None = None


class Saver:
    """Carries out jobs. ``pool`` writes the files of one save."""

    def __init__(
        self, root: Path, files: Files, pool: ThreadPoolExecutor, topology: Topology, inventory: Inventory
    ) -> None:
        self._root = root
        self._inventory = inventory
        self._files = files
        self._pool = pool
        self._topology = topology

    def run(self, job: SaveJob) -> None:
        """Write, commit when all ranks have written, and delete what ``job.retire`` says; a collective.

        When any rank fails, the partial directory is removed. Any exception ends up in ``job.pending.error``; one that
        is not an Exception (Ctrl-C in a blocking save) is raised too.
        """
        pending = job.pending
        try:
            self._commit(job)
        except BaseException as error:
            pending.fail(error)  # at once: the clearing up may fail too
            if self._topology.is_leader:
                pending.notices += job.transaction.abort()
            if not isinstance(error, Exception):
                raise
        else:
            pending.succeed()
            self._finish(job)
        finally:  # lets go of the live tensors
            job.plan = Plan()
            job.staged = job.failure = None

    def _commit(self, job: SaveJob) -> None:
        """Write the checkpoint and rename it into place, durably, on every disk."""
        topology = self._topology
        results = self._on_all_ranks(lambda: self._write(job))
        if job.adopt:
            known = topology.on_leaders(lambda: {path for result in results for path in result.files})
            results += self._on_all_ranks(lambda: self._adopt(job.transaction.directory, known))
        # no leader renames before the directories of all are complete
        job.pending.bytes = topology.on_leaders(lambda: self._describe(job, results))
        job.pending.notices += topology.on_leaders(job.transaction.publish)

    def _on_all_ranks(self, work: Callable[[], RankResult]) -> list[RankResult]:
        """Every rank works; leaders get the results of all. Raises on every rank if one failed."""
        cause: BaseException | None = None
        try:
            result = work()
        except BaseException as error:  # whatever it is: the other ranks wait for this one
            result = RankResult(failure=str(error) or repr(error))
            cause = error
        ranks = self._topology.ranks
        if cause is not None and not isinstance(cause, Exception):
            ranks.gather(result.failure)
            raise cause
        for rank, failure in enumerate(ranks.gather(result.failure)):
            if failure is not None:
                where = f"rank {rank}: " if ranks.size > 1 else ""
                raise CheckpointError(where + failure) from cause
        return self._topology.gather_on_leaders(result)

    def _write(self, job: SaveJob) -> RankResult:
        """Write everything that this rank has planned. The first rank to need a directory makes it."""
        if job.failure is not None:
            raise job.failure
        plan = job.plan
        directory = job.transaction.directory
        paths = [*(layout.path for layout in (*plan.large, *plan.small)), *plan.documents]
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
        for path, document in plan.documents.items():
            work[path] = partial(self._write_json, directory / path, document)
        records = run_all(self._pool, list(work.values()))
        return RankResult(dict(zip(work, records, strict=True)), plan.index)

    def _write_json(self, path: Path, document: Any) -> FileRecord:
        return write_hashed(path, [memoryview(tree.to_json(document))], self._files)

    def _adopt(self, directory: Path, known: Collection[str]) -> RankResult:
        """Hash and fsync what other code wrote into the directory; the ranks of a disk divide the files evenly."""
        paths = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
        ranks = self._topology.disk_ranks
        own = [path for path in paths if path not in known][ranks.index(self._topology.ranks.rank) :: len(ranks)]
        records = run_all(self._pool, [partial(self._adopt_one, directory / path) for path in own])
        return RankResult(dict(zip(own, records, strict=True)))

    def _adopt_one(self, path: Path) -> FileRecord:
        self._files.fsync_path(path)
        return FileRecord(path.stat().st_size, hash_file(path))

    def _describe(self, job: SaveJob, results: Sequence[RankResult]) -> int:
        """Write index and manifest, and bring the directory to the disk. Returns the checkpoint's bytes."""
        directory = job.transaction.directory
        index = encode_index(self._topology.merge_indexes([result.index for result in results]))
        common = {INDEX: write_hashed(directory / INDEX, [memoryview(index)], self._files)}
        self._topology.list_files(job.manifest, [result.files for result in results], common)
        for path, data in self._topology.markers():
            write_new(directory / path, data, self._files)
        write_new(directory / MANIFEST, encode(job.manifest), self._files)
        job.transaction.seal()
        return job.manifest.bytes

    def _finish(self, job: SaveJob) -> None:
        """The pointer and retention. The checkpoint is complete, so what does not work is a notice."""
        notices = job.pending.notices
        if self._topology.is_leader:
            point = partial(write_pointer, self._root, job.manifest.name, self._files)
            notices += attempt(point, "the pointer was not written")
        if job.retire is None:
            return
        try:
            names = self._topology.names_to_delete(self._inventory, job.retire)
        except Exception as error:
            notices.append(f"no older checkpoint was deleted: {str(error) or repr(error)}")
            return
        for name in names:
            delete = partial(delete_checkpoint, self._root, name, self._files)
            notices += attempt(delete, f"{name} could not be deleted")
