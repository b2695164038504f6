"""The one door to checkpoints: save them, list them, find the newest good one, open one."""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from mmtrain.checkpoint import discover as catalog
from mmtrain.checkpoint.format.manifest import Manifest
from mmtrain.checkpoint.format.verify import Problem, Verify, find_problems, read_manifest
from mmtrain.checkpoint.reader import Checkpoint
from mmtrain.checkpoint.retention import Entry, RetirePolicy
from mmtrain.checkpoint.sharding import collect, spread
from mmtrain.checkpoint.topology.disks import Disks, find_disks
from mmtrain.checkpoint.topology.newest import manifest_hash, names_to_delete, newest_on_all
from mmtrain.checkpoint.topology.parts import state_of_main, write_replicas_here
from mmtrain.checkpoint.topology.ranks import Ranks
from mmtrain.checkpoint.write import storage
from mmtrain.checkpoint.write.saver import Job, PendingSave, Plan, Saver, failed
from mmtrain.checkpoint.write.staging import Stager
from mmtrain.checkpoint.write.storage import Transaction
from mmtrain.dtensor import is_dtensor
from mmtrain.errors import CheckpointError
from mmtrain.files import Files, LocalFiles, hash_bytes

Sections = Mapping[str, Mapping[str, Tensor]]
Writer = Callable[[Path], None]
_SECTION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class CheckpointStore:
    """The checkpoints of one work directory.

    Every rank makes one, at the same place of the program (with several ranks it is a collective), and every rank calls
    `save` and `newest_good` together. One save is in flight at a time; the next one waits for it.

    * ``fs``: the file system; tests hand in one that fails;
    * ``step_sections``: sections that only the optimizer's step changes, and changes alike on all ranks. They may
      still be copied during the next forward and backward, and their whole tensors are spread over the ranks that
      write;
    * ``exclusive``: the caller holds the lock of the work directory, so leftovers of any other process are dead;
    * ``disks``: which ranks see the same ``root``; found out where it is not said. Ranks with disks of their own keep
      a part each of every checkpoint (`mmtrain.checkpoint.topology.parts`), and one is good if all of its parts are.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        fs: Files | None = None,
        step_sections: Iterable[str] = ("optimizer",),
        exclusive: bool = False,
        threads: int = 2,
        disks: Disks | None = None,
    ) -> None:
        self.root = Path(root)
        self.exclusive = exclusive
        self._fs = fs or LocalFiles()
        self._step_sections = frozenset(step_sections)
        self._ranks = Ranks(disks or find_disks(self.root))
        self._stager = Stager(threads)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mmtrain-write")
        self._saver = Saver(self.root, self._fs, self._pool, self._ranks)
        self._last: PendingSave | None = None
        self._device = storage.device_of(self.root.absolute())

    @property
    def disks(self) -> Disks:
        """Which ranks see the same ``root``."""
        return self._ranks.disks

    @property
    def divided(self) -> bool:
        """Whether ranks have disks of their own, so that each holds a part of every checkpoint."""
        return not self.disks.one

    @property
    def leads(self) -> bool:
        """Whether this rank clears up on its disk: rank 0, or the lowest of those that share a disk with it."""
        return self._ranks.leader

    # ---- saving

    def save(
        self,
        name: str,
        tensors: Sections,
        *,
        state: Any = None,
        rng: Any = None,
        manifest_fields: Mapping[str, Any] | None = None,
        extra_writers: Sequence[Writer] = (),
        blocking: bool = False,
        retire: RetirePolicy | None = None,
    ) -> PendingSave:
        """Save under ``name`` (``iter_500.pth``); a collective.

        ``tensors`` are sections of tensors by name, whole or sharded (DTensor); ``state`` is a nested plain value (rank
        0's counts), ``rng`` another one, of which every rank's own is kept. ``manifest_fields`` are fields of
        `Manifest`. ``extra_writers`` are called with the open directory on every rank, here and now, and what they
        leave there becomes part of the checkpoint. ``blocking`` writes from the live tensors and returns when all is
        durable. ``retire`` says which older checkpoints the save deletes as its last step.

        Raises CheckpointError where the save cannot begin, where it fails and is blocking, and where the one before it
        failed and nobody has been told. The older checkpoints are untouched in every case.
        """
        begin = time.perf_counter()
        if self._last is not None:
            self._last.join()
        manifest = Manifest(**{**(manifest_fields or {}), "name": name, "world_size": self._ranks.size})
        manifest.sections = sorted(tensors)
        writers = self._agree(name, tensors)
        pending = PendingSave(name, self.root / name)
        token = self._begin_all(pending)
        if self.divided:  # parts of one checkpoint have one manifest
            manifest = self._ranks.on_main(lambda: manifest)
        transaction = Transaction(self.root, name, self._fs, token)
        job = Job(pending, transaction, manifest, retire, adopt=bool(extra_writers))
        try:
            job.plan = self._plan(tensors, writers, state=state, rng=rng)
            if not blocking:
                job.staged = self._stager.stage(job.plan.large, overlapped=self._step_sections)
            for writer in extra_writers:
                writer(job.transaction.directory)
        except Exception as error:  # the other ranks wait for this one's word: the job gives it to them
            job.failure = error
        self._last = pending
        return self._run(job, begin, in_thread=not blocking)

    def wait(self) -> None:
        """Return once no save is in flight. Raises CheckpointError where the last one failed and nobody was told."""
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
            self._ranks.close()

    # ---- looking

    def entries(self, *, verify: Verify = "size") -> list[Entry]:
        """The complete checkpoints in ascending order of iteration, found by looking at the directory."""
        return catalog.scan(self.root, verify=verify)[0]

    def names(self) -> list[str]:
        """The names of `entries`."""
        return [entry.name for entry in self.entries()]

    def pointer(self) -> str | None:
        """What ``last_checkpoint`` says; a hint for people and other tools, never used here."""
        return storage.read_pointer(self.root)

    def newest_good(self, verify: Verify = "full") -> tuple[Checkpoint | None, list[Problem]]:
        """Return the newest checkpoint that verifies, or None, and the faults of those passed over; a collective.

        Leftovers of killed runs are cleared away first. Rank 0 looks and decides; where ranks have disks of their own
        each disk's leader looks, and what is good on all of them counts.
        """
        if self._last is not None:
            self._last.join()
        if self.divided:
            self._ranks.on_leaders(self.recover)
            name, problems = newest_on_all(self.root, self._ranks, verify=verify)
            return (None if name is None else self.open(name, verify="none")), problems

        def look() -> tuple[Entry | None, list[Problem]]:
            self.recover()
            return catalog.newest_good(self.root, verify=verify)

        entry, problems = self._ranks.on_main(look)
        return (None if entry is None else self.open(entry.name, verify="none")), problems

    def newest_entry(self) -> Entry | None:
        """The newest checkpoint that is complete on any disk, its hashes unread; a collective."""
        own = self._ranks.on_leaders(lambda: self.entries()[-1:])
        found = own if self.disks.one else [entry for held in self._ranks.gather(own) for entry in held]
        return max(found, key=catalog.age, default=None)

    def open(self, name_or_path: str | Path, verify: Verify = "full") -> Checkpoint:
        """Open one checkpoint by its name here or by a path. Raises CheckpointError naming every file that is wrong."""
        return open_checkpoint(name_or_path, root=self.root, verify=verify)

    def open_on_all(self, name_or_path: str | Path, verify: Verify = "full") -> Checkpoint:
        """Open one checkpoint on every rank; a collective. Each disk's leader verifies it, the others see that it is
        there.

        Raises CheckpointError, on every rank, where one of them cannot open it or sees another save of that name.
        """
        word: tuple[str, Exception | None] = ("", None)
        checkpoint = None
        try:
            checkpoint = self.open(name_or_path, verify if self._ranks.leader else "size")
            word = (manifest_hash(checkpoint.path), None)
        except (CheckpointError, OSError) as error:
            word = ("", error)
        words = self._ranks.gather(word)
        for rank, (digest, failure) in enumerate(words):
            if failure is not None:
                raise self._ranks.disks.named(rank, failure)
            if digest != words[0][0]:
                raise CheckpointError(
                    f"{name_or_path}: rank {rank} sees another save of this name than rank 0; "
                    "copy the same checkpoint to all nodes"
                )
        assert checkpoint is not None
        return checkpoint

    def own_rng(self, checkpoint: Checkpoint) -> Any:
        """What this rank saved as its generators, from whichever disk has it; None where none has. A collective."""
        rank = self._ranks.rank
        if not self.divided:
            return checkpoint.rng(rank)
        held: dict[int, Any] = {}
        if self._ranks.leader:
            found = {other: checkpoint.rng(other) for other in range(self._ranks.size)}
            held = {other: value for other, value in found.items() if value is not None}
        return next((others[rank] for others in self._ranks.gather(held) if rank in others), None)

    # ---- clearing up

    def recover(self) -> list[str]:
        """Clear away what killed runs left and put back what they were replacing; return a notice for each."""
        return storage.recover(self.root, self._fs, exclusive=self.exclusive)

    def prune(self, retire: RetirePolicy) -> list[str]:
        """Delete what ``retire`` does not keep; return the names. Raises OSError where one cannot be deleted.

        On a shared disk rank 0 alone calls this. With several disks it is a collective: each leader deletes on its own.
        """
        names = names_to_delete(self.root, self._ranks, retire)
        for name in names:
            storage.delete_checkpoint(self.root, name, self._fs)
        return names

    # ---- the steps of a save

    def _agree(self, name: str, tensors: Sections) -> dict[str, dict[str, int]]:
        """Say whether all can begin, and which rank writes each whole tensor, by section and name."""
        sizes: dict[str, dict[str, int]] = {}
        trouble, digest = None, ""
        try:
            _check_names(name, tensors)
            sizes = {s: {n: t.nbytes for n, t in part.items() if not is_dtensor(t)} for s, part in tensors.items()}
            digest = hash_bytes(repr(sorted((s, sorted(n.items())) for s, n in sizes.items())).encode())
            if self._last is not None and self._last.error is not None and not self._last.reported:
                self._last.reported = True
                trouble = str(self._last.error)
        except (CheckpointError, AttributeError) as error:
            trouble = str(error)
        words = self._ranks.gather((digest, trouble))
        for _, other in words:
            if other is not None:
                raise CheckpointError(other)
        own = self._ranks.own  # each disk gets every whole tensor, from one of its own ranks
        if len({said for said, _ in words}) == 1:
            shares = {s: spread(sizes[s], len(own)) for s in self._step_sections & sizes.keys()}
            return {
                section: {name: own[shares[section][name] if section in shares else 0] for name in names}
                for section, names in sizes.items()
            }
        # some ranks hold what others do not: the first that holds a tensor writes it
        everyone = self._ranks.gather(sizes)
        return {section: {n: r for r in reversed(own) for n in everyone[r].get(section, {})} for section in sizes}

    def _begin(self, pending: PendingSave) -> str:
        if storage.device_of(self.root.absolute()) != self._device:  # else the save would go to the disk beneath
            problem = f"{self.root} is on another disk than at the start; its mount has gone"
            raise failed(pending.path, OSError(problem))
        pending.notices += self.recover()
        transaction = Transaction(self.root, pending.name, self._fs)
        try:
            transaction.begin()
        except OSError as error:
            transaction.abort()
            raise failed(pending.path, error) from error
        return transaction.token

    def _begin_all(self, pending: PendingSave) -> str:
        """Begin on every disk, or on none."""
        try:
            return self._ranks.on_leaders(lambda: self._begin(pending))
        except CheckpointError:
            if self.divided and self._ranks.leader:
                self.recover()  # of what this process itself has begun, too
            raise

    def _plan(self, tensors: Sections, writers: Mapping[str, Mapping[str, int]], *, state: Any, rng: Any) -> Plan:
        plan, rank = Plan(), self._ranks.rank
        if self.divided:
            state = state_of_main(state, self._ranks)
        for section, named in tensors.items():
            held = collect(section, named, writers=writers.get(section, {}), rank=rank)
            if self.divided:
                write_replicas_here(held, named, self._ranks)
            plan.add_section(section, held, rank=rank)
        if self._ranks.leader:
            plan.add_tree("state", state)
        plan.add_tree(f"rng/rank_{rank:05d}", rng)
        return plan

    def _run(self, job: Job, begin: float, *, in_thread: bool) -> PendingSave:
        pending, staged = job.pending, job.staged

        def work() -> None:
            try:
                self._saver.run(job)
            finally:
                pending.total_seconds = time.perf_counter() - begin

        if in_thread:
            pending.start(work, staged)
        else:
            work()
        pending.stall_seconds = time.perf_counter() - begin
        if not in_thread:
            pending.raise_error()
        return pending


def open_checkpoint(name_or_path: str | Path, *, root: Path | None = None, verify: Verify = "full") -> Checkpoint:
    """Open a checkpoint directory. A plain name is looked for in ``root`` first.

    Raises CheckpointError, naming every faulty file, where it is missing, damaged or no checkpoint of mmtrain.
    """
    path = Path(name_or_path)
    if root is not None and not path.is_absolute() and (root / path).exists():
        path = root / path
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such checkpoint" + (f", nor in {root}" if root is not None else ""))
    if not path.is_dir():
        raise CheckpointError(
            f"{path}: a file cannot be resumed from, it holds weights at most; to start from its weights set "
            "load_from to it and resume=False"
        )
    manifest = read_manifest(path)
    problems = find_problems(path, manifest, verify=verify)
    if problems:
        raise CheckpointError(f"{path} is damaged: " + "; ".join(f"{p.file}: {p.fault}" for p in problems))
    return Checkpoint(path, manifest)


def _check_names(name: str, tensors: Sections) -> None:
    if not name or name.startswith(".") or "/" in name or "\\" in name or name == storage.POINTER:
        raise CheckpointError(f"{name!r} cannot be the name of a checkpoint")
    for section in tensors:
        if not _SECTION.fullmatch(section) or section in ("state", "rng"):
            raise CheckpointError(f"{section!r} cannot be the name of a section of tensors")
