"""Jobs of ranks that do not share a disk: each node has its own directory, under the same relative name."""

import contextlib
import os
import signal
import sys
from pathlib import Path

import strategy_parts
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mmtrain import dist
from mmtrain.checkpoint import CheckpointStore, LocalFiles
from mmtrain.checkpoint.topology.find import find_disks
from mmtrain.errors import MMTrainError


@contextlib.contextmanager
def in_node_directory(folder, nodes):
    """Change to the directory of this rank's node; ``nodes`` gives each rank's node."""
    home, before = Path(folder) / f"node{nodes[dist.rank()]}", Path.cwd()
    home.mkdir(parents=True, exist_ok=True)
    os.chdir(home)
    try:
        yield
    finally:
        os.chdir(before)


def train(folder, nodes, **options):
    """`strategy_parts.train` in the work dir ``work`` of each node. A refusal is returned as text."""
    with in_node_directory(folder, nodes):
        try:
            return strategy_parts.train("work", world=len(nodes), **options)
        except MMTrainError as error:
            return f"{type(error).__name__}: {error}"


def train_until_killed(folder, nodes, name, rank, **options):
    """As `train`, but ``rank`` is killed before it renames ``name`` into place."""
    rename = LocalFiles.rename

    def deadly(self, old, new):
        if new.name == name and dist.rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(self, old, new)

    LocalFiles.rename = deadly
    return train(folder, nodes, **options)


def disks(folder, nodes):
    with in_node_directory(folder, nodes):
        found = find_disks(Path("work"))
        dist.barrier()
        return [list(found.leaders), sorted(path.name for path in Path("work").iterdir())]


def refused(folder, nodes, write=None):
    """What `find_disks` raises if rank 1's directory cannot be made."""
    with in_node_directory(folder, nodes):
        if dist.rank() == 1:
            Path("work").write_text("a file")
        try:
            find_disks(Path("work"))
        except OSError as error:
            return str(error)
        return "nothing"


def sweep(folder, nodes, faulty_rank, error=28):
    """Let each call of one rank's save fail once; returns each save's result, and what is good on all disks afterwards."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "faults"))
    from faulty_files import FaultyFiles

    from mmtrain.checkpoint import Retention, RetirePolicy

    found, at, calls = [], 0, 1
    with in_node_directory(folder, nodes):
        while at <= calls:  # at 0 nothing fails
            mine = dist.rank() == faulty_rank
            files = FaultyFiles("once" if mine else "count", at if mine else 0, error)
            store = CheckpointStore("work", fs=files, threads=1)
            message = ""
            try:
                fields = {"position": {"iteration": at + 1}}
                retire = RetirePolicy(Retention(max_keep_ckpts=2))
                options = {"rng": at, "manifest_fields": fields, "blocking": True, "retire": retire}
                store.save(f"iter_{at + 1}.pth", tensors(at + 1), **options)
            except MMTrainError as failure:
                message = str(failure)
            calls = dist.gather_objects(len(files.calls))[faulty_rank] if at == 0 else calls
            good, problems = store.newest_good()
            found.append([at, message, good and good.name, [str(problem) for problem in problems]])
            store.close()
            at += 1
    return found


class Faulty(LocalFiles):
    """Rank 1's disk: the first call ``call`` for a path that contains ``text`` fails."""

    def __init__(self, call=None, text=""):
        self.call, self.text = call, text

    def _check(self, call, path):
        if call == self.call and self.text in path.name and dist.rank() == 1:
            self.call = None
            raise OSError(5, "Input/output error", str(path))

    def mkdir(self, path):
        self._check("mkdir", path)
        super().mkdir(path)

    def open(self, path):
        self._check("open", path)
        return super().open(path)

    def rename(self, old, new):
        self._check("rename", new)
        super().rename(old, new)


def tensors(iteration):
    """A full tensor, an aliased one, a replicated shard, a shard, and moments that are spread."""
    base = torch.arange(24.0).reshape(6, 4) + iteration
    size = dist.world_size()
    replicas = init_device_mesh("cpu", (size, 1))
    shards = init_device_mesh("cpu", (size,))
    model = {
        "full": base,
        "tied": base,
        "replicated": distribute_tensor(base * 2, replicas, [Replicate(), Shard(0)]),
        "sharded": distribute_tensor(base * 3, shards, [Shard(0)]),
    }
    return {"model": model, "optimizer": {"full/exp_avg": base * 4, "other/exp_avg": base * 5}}


def save(folder, nodes, iterations, call=None, text="", extra=(), blocking=True):
    """Save; return the error message of each save, or "". Rank 0's state must be on all disks."""
    with in_node_directory(folder, nodes):
        store = CheckpointStore("work", fs=Faulty(call, text))
        messages = []
        for iteration in iterations:
            rank = dist.rank()
            state = {"rank": rank, "own": torch.tensor([rank]), "same": torch.arange(5)}
            try:
                store.save(
                    f"iter_{iteration}.pth", tensors(iteration), state=state, rng={"rank": rank},
                    manifest_fields={"position": {"iteration": iteration}}, blocking=blocking,
                    extra_writers=[lambda directory, name=name: write(directory, name) for name in extra],
                ).wait()  # fmt: skip
                messages.append("")
            except MMTrainError as error:
                messages.append(str(error))
        store.close()
        return messages


def write(directory, name):
    (directory / name.format(dist.rank())).write_text(f"rank {dist.rank()}")


def load(folder, nodes, verify="full"):
    """The newest good one: its name, what was skipped, and whether its contents are what was saved."""
    with in_node_directory(folder, nodes):
        store = CheckpointStore("work")
        checkpoint, problems = store.newest_good(verify)
        messages = sorted(str(problem).replace("\n", " ") for problem in problems)
        if checkpoint is None:
            store.close()
            return [None, messages, None]
        iteration = checkpoint.manifest.iteration
        faults = []
        for section, expected in tensors(iteration).items():
            into = {name: tensor.clone().zero_() for name, tensor in expected.items()}
            checkpoint.load(section, into)
            faults += [name for name in into if not torch.equal(_local(into[name]), _local(expected[name]))]
        state = checkpoint.state()
        if (state["rank"], state["own"].tolist(), state["same"].tolist()) != (0, [0], [0, 1, 2, 3, 4]):
            faults.append(f"state {state}")
        own = store.own_rng(checkpoint)
        store.close()
        return [checkpoint.name, messages, faults or [own and own["rank"]]]


def _local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def open_exactly(folder, nodes, name):
    with in_node_directory(folder, nodes):
        store = CheckpointStore("work")
        try:
            return store.open_on_all(name).name
        except MMTrainError as error:
            return str(error)
        finally:
            store.close()


def facts(values):
    """The error if the ranks have different facts."""
    from mmtrain import launch

    try:
        launch.refuse_difference({"data set in train_dataloader (fingerprint)": values[dist.rank()]}, "do so")
    except MMTrainError as error:
        return str(error)
    return ""
