"""The checkpoints of a work directory: save, list, find the newest good one, open, delete."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmtrain.checkpoint import discover
from mmtrain.checkpoint.format.manifest import Manifest
from mmtrain.checkpoint.format.verify import Problem, Verify
from mmtrain.checkpoint.inventory import Inventory
from mmtrain.checkpoint.lock import WorkDirLock
from mmtrain.checkpoint.reader import Checkpoint, open_checkpoint
from mmtrain.checkpoint.retention import Entry, RetirePolicy
from mmtrain.checkpoint.topology.base import Topology
from mmtrain.checkpoint.topology.find import find_topology
from mmtrain.checkpoint.topology.newest import manifest_hash
from mmtrain.checkpoint.write import storage
from mmtrain.checkpoint.write.pending import PendingSave, save_error
from mmtrain.checkpoint.write.plan import Sections
from mmtrain.checkpoint.write.planner import Planner
from mmtrain.checkpoint.write.saver import SaveJob, Saver
from mmtrain.checkpoint.write.staging import Stager
from mmtrain.checkpoint.write.storage import Transaction
from mmtrain.errors import CheckpointError
from mmtrain.files import Files, LocalFiles

ExtraWriter = Callable[[Path], None]


class CheckpointStore:
    """The checkpoints of one work directory.

    Every rank makes one at the same point of the program (with several ranks it is a collective), and every rank calls
    `save` and `newest_good` together. One save is in flight at a time; the next one waits for it.

    * ``fs``: the file system; tests pass one that fails;
    * ``step_sections``: sections that only the optimizer's step changes, and changes alike on all ranks. They may
      still be copied during the next forward and backward, and the ranks that write share their full tensors evenly;
    * ``lock``: the lock on ``root``, on the ranks that hold it. Leftovers of any other process can then be deleted,
      and each save first makes sure that the directory is still the one that was locked (`check_place`);
    * ``topology``: which ranks see the same ``root``; found out by default. The store closes it. Where ranks do not
      share a disk, each disk keeps a part of every checkpoint (`mmtrain.checkpoint.topology.disk_parts`), and a
      checkpoint is good if all of its parts are.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        fs: Files | None = None,
        step_sections: Iterable[str] = ("optimizer",),
        lock: WorkDirLock | None = None,
        threads: int = 2,
        topology: Topology | None = None,
    ) -> None:
        self.root = Path(root)
        self._lock = lock
        self.topology = topology or find_topology(self.root)
        self._fs = fs or LocalFiles()
        self._step_sections = frozenset(step_sections)
        self._planner = Planner(self.topology, self._step_sections)
        self._stager = Stager(threads)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mmtrain-write")
        self._inventory = Inventory(self.root)
        self._saver = Saver(self.root, self._fs, self._pool, self.topology, self._inventory)
        self._last: PendingSave | None = None
        self._device = storage.device_of(self.root.absolute())

    # ---- saving

    def save(
        self,
        name: str,
        tensors: Sections,
        *,
        state: Any = None,
        rng: Any = None,
        manifest_fields: Mapping[str, Any] | None = None,
        extra_writers: Sequence[ExtraWriter] = (),
        blocking: bool = False,
        retire: RetirePolicy | None = None,
    ) -> PendingSave:
        """Save under ``name`` (``iter_500.pth``); a collective.

        ``tensors`` are sections of tensors by name, plain or DTensors; ``state`` is a nested plain value, of which rank
        0's is saved; ``rng`` is another one, of which every rank's is saved. ``manifest_fields`` are fields of
        `Manifest`. ``extra_writers`` are called at once with the open directory on every rank, and what they write
        there becomes part of the checkpoint. ``blocking`` writes from the live tensors and returns when all is durable.
        ``retire`` says which older checkpoints the save deletes as its last step; none by default.

        Raises CheckpointError if the save cannot begin, if it fails and is blocking, and if the previous one failed
        and that was not reported yet. The older checkpoints are untouched in every case. Raises RunError if the
        directory was deleted and belongs to another run now.
        """
        begin = time.perf_counter()
        manifest = Manifest(**{**(manifest_fields or {}), "name": name, "world_size": self.topology.ranks.size})
        manifest.sections = sorted(tensors)
        problem = self._unreported_error()
        writers = self._planner.agree_on_writers(name, tensors, problem=problem)
        pending = PendingSave(name, self.root / name)
        transaction = Transaction(self.root, name, self._fs, self._begin(pending))
        manifest = self.topology.same_manifest(manifest)
        job = SaveJob(pending, transaction, manifest, retire, adopt=bool(extra_writers))
        try:
            job.plan = self._planner.plan(tensors, writers, state=state, rng=rng)
            if not blocking:
                job.staged = self._stager.stage(job.plan.large, overlapped=self._step_sections)
            for writer in extra_writers:
                writer(transaction.directory)
        except Exception as error:  # the other ranks wait for this one: the job reports it to them
            job.failure = error
        self._last = pending
        self._run(job, begin, blocking=blocking)
        return pending

    def prepare(self, tensors: Sections) -> None:
        """Plan the first save and make its buffer in the background, so that training does not wait for them then.

        ``tensors`` are like those that will be saved; a collective. What cannot be saved is reported by the save.
        """
        if self._last is None:
            with contextlib.suppress(CheckpointError):
                self._stager.reserve(self._planner.prepare(tensors))

    @property
    def buffer_bytes(self) -> int:
        """The size of the buffer that asynchronous saves copy into."""
        return self._stager.bytes

    def wait(self) -> None:
        """Return once no save is in flight. Raises CheckpointError if the last one failed, unless that was reported."""
        if self._last is not None:
            self._last.join()
            if not self._last.reported:
                self._last.raise_error()

    def close(self) -> None:
        """Wait for the save in flight and end the threads; raises like `wait`."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._stager.close()
            self.topology.close()

    # ---- looking

    def entries(self, *, verify: Verify = "size") -> list[Entry]:
        """The complete checkpoints in ascending order of iteration, found by looking at this rank's directory.

        Like the other methods that look, it raises CheckpointError where the directory cannot be read.
        """
        with self._looking():
            return discover.scan(self.root, verify=verify)[0]

    def names(self) -> list[str]:
        """The names of `entries`."""
        return [entry.name for entry in self.entries()]

    def pointer(self) -> str | None:
        """What ``last_checkpoint`` contains: a hint for people and other tools."""
        return storage.read_pointer(self.root)

    def newest_good(self, verify: Verify = "full") -> tuple[Checkpoint | None, list[Problem]]:
        """Return the newest checkpoint that verifies, or None, and the faults of newer ones; a collective.

        Leftovers of killed runs are cleared away first. Each disk's leader looks, and what is good on all disks counts.
        """
        if self._last is not None:
            self._last.join()
        with self._looking():
            name, problems = self.topology.newest_good(self.root, verify=verify, clear=self.recover)
        return (None if name is None else self.open(name, verify="none")), problems

    def newest_entry(self) -> Entry | None:
        """The newest checkpoint that is complete on any disk; hashes are not compared. A collective."""
        with self._looking():
            return self.topology.newest_entry(self.root)

    def open(self, name_or_path: str | Path, verify: Verify = "full") -> Checkpoint:
        """Open one checkpoint by its name here or by a path; see `open_checkpoint`."""
        return open_checkpoint(name_or_path, root=self.root, verify=verify)

    def open_on_all(self, name_or_path: str | Path, verify: Verify = "full") -> Checkpoint:
        """Open one checkpoint on every rank; a collective. Each disk's leader verifies it; the others compare sizes.

        Raises CheckpointError, on every rank, if one of them cannot open it or sees another save of that name.
        """
        checkpoint = None
        found: tuple[str, Exception | None]
        try:
            checkpoint = self.open(name_or_path, verify if self.topology.is_leader else "size")
            found = (manifest_hash(checkpoint.path), None)
        except (CheckpointError, OSError) as error:
            found = ("", error)
        gathered = self.topology.ranks.gather(found)
        for rank, (digest, failure) in enumerate(gathered):
            if failure is not None:
                raise self.topology.disks.with_rank(rank, failure)
            if digest != gathered[0][0]:
                raise CheckpointError(
                    f"{name_or_path}: rank {rank} sees another save of this name than rank 0; "
                    "copy the same checkpoint to all nodes"
                )
        assert checkpoint is not None
        return checkpoint

    def own_rng(self, checkpoint: Checkpoint) -> Any:
        """What this rank saved as its generators, from whichever disk has it; None if none has. A collective."""
        return self.topology.read_rng(checkpoint)

    # ---- clearing up

    def recover(self) -> list[str]:
        """Clear away what killed runs left and put back what they were replacing; return a notice for each."""
        return storage.recover(self.root, self._fs, exclusive=self._lock is not None)

    def prune(self, retire: RetirePolicy) -> list[str]:
        """Delete what ``retire`` does not keep; every rank calls this, and each disk's leader deletes.

        Returns the names deleted on this rank's disk, [] on other ranks. Raises OSError if one cannot be deleted.
        """
        names = self.topology.names_to_delete(self._inventory, retire)
        for name in names:
            storage.delete_checkpoint(self.root, name, self._fs)
        return names

    def check_place(self) -> list[str]:
        """Make sure that ``root`` is still the directory that was locked; a collective. Returns a notice if it is new.

        `save` does the same first; this is for what is written beside checkpoints. Raises CheckpointError where the
        directory cannot be reached, or its disk is not mounted, and RunError where another run has taken it.
        """
        try:
            return self.topology.on_leaders(self._claim)
        except OSError as error:
            raise CheckpointError(f"{self.root} cannot be written: {error}") from error

    def _claim(self) -> list[str]:
        if storage.device_of(self.root.absolute()) != self._device:  # else the save would go to the disk beneath
            raise OSError(f"{self.root} is on another disk than at the start; its mount is gone")
        notice = self._lock.renew() if self._lock is not None else ""
        return [notice] if notice else []

    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(f"{self.root} cannot be read: {error}") from error

    # ---- the steps of a save

    def _unreported_error(self) -> str | None:
        """Wait for the previous save; why it failed, unless that was reported."""
        if self._last is None:
            return None
        self._last.join()
        if self._last.error is None or self._last.reported:
            return None
        self._last.reported = True
        return str(self._last.error)

    def _begin(self, pending: PendingSave) -> str:
        """Begin on every disk or on none; the token of the leader of this rank's disk."""
        try:
            return self.topology.on_leaders(lambda: self._begin_here(pending))
        except CheckpointError:
            if self.topology.is_leader:
                with contextlib.suppress(OSError):
                    self.recover()  # also what this process itself has begun
            raise

    def _begin_here(self, pending: PendingSave) -> str:
        transaction = Transaction(self.root, pending.name, self._fs)
        try:
            pending.notices += self._claim()
            pending.notices += self.recover()
            transaction.begin()
        except OSError as error:
            transaction.abort()
            raise save_error(pending.path, error) from error
        return transaction.token

    def _run(self, job: SaveJob, begin: float, *, blocking: bool) -> None:
        pending = job.pending

        def work() -> None:
            try:
                self._saver.run(job)
            finally:
                pending.total_seconds = time.perf_counter() - begin

        if blocking:
            try:
                work()
            except BaseException:  # Ctrl-C
                pending.reported = True
                raise
        else:
            pending.start(work, job.staged)
        pending.stall_seconds = time.perf_counter() - begin
        if blocking:
            pending.raise_error()
