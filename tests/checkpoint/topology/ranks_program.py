"""What the ranks of test_ranks.py run: ``python ranks_program.py save|load ROOT``."""

import errno
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mmtrain import dist
from mmtrain.checkpoint import CheckpointStore, LocalFiles
from mmtrain.errors import CheckpointError


def whole_values() -> dict[str, torch.Tensor]:
    """The same model on every rank; 7 rows do not divide evenly, and 1 row leaves ranks with nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 1), nn.BatchNorm1d(1))
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def sharded_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(3, 1), nn.BatchNorm1d(1))
    model.load_state_dict(whole_values())
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.world_size(),)))
    return model


def sections(model: nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    state = model.state_dict()
    moments = {f"{name}/exp_avg": tensor * 2 for name, tensor in state.items() if isinstance(tensor, DTensor)}
    steps = {f"{name}/step": torch.tensor(float(i)) for i, name in enumerate(state)}
    return {"model": state, "optimizer": moments | steps}


class FullDisk(LocalFiles):
    """A disk that is full for one write of one rank, when the test asks for it."""

    full = False

    def write(self, handle, data):
        if self.full:
            self.full = False
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(handle, data)


def save(root: Path) -> None:
    rank = dist.rank()
    files = FullDisk()
    store = CheckpointStore(root, fs=files)
    model = sharded_model()
    with torch.no_grad():  # as under DDP between two forwards: rank 0's count
        model[3].running_mean.fill_(rank + 1)
    for iteration, blocking in ((1, True), (2, False)):
        pending = store.save(
            f"iter_{iteration}.pth",
            sections(model),
            state={"rank": rank},
            rng={"rank": torch.tensor(rank)},
            manifest_fields={"position": {"iteration": iteration}, "strategy": "FSDPStrategy"},
            blocking=blocking,
        )
        works = torch.ones(3)
        for _ in range(20):  # collectives of training continue at the same time
            torch.distributed.all_reduce(works)
        pending.wait_staged()
        pending.wait()
    files.full = rank == 1
    with pytest.raises(CheckpointError, match=r"rank 1: \[Errno 28\] No space left"):
        store.save("iter_3.pth", sections(model), blocking=True)
    files.full = rank == 1
    store.save("iter_3.pth", sections(model), blocking=False).join()
    with pytest.raises(CheckpointError, match="No space left"):
        store.save("iter_4.pth", sections(model))
    grid = init_device_mesh("cpu", (2, 1))  # hybrid sharding: two replicas of one shard
    table = distribute_tensor(torch.arange(6.0).reshape(2, 3), grid, [Replicate(), Shard(0)])
    odd = {"table": table, **({"only here": torch.full((2,), 7.0)} if rank == 1 else {})}
    store.save("iter_5.pth", {"model": odd}, manifest_fields={"position": {"iteration": 5}}, blocking=True)
    checkpoint, problems = store.newest_good()
    assert (checkpoint.name, problems) == ("iter_5.pth", [])
    assert torch.equal(checkpoint.read("model", "table"), torch.arange(6.0).reshape(2, 3))
    assert torch.equal(checkpoint.read("model", "only here"), torch.full((2,), 7.0))
    store.close()


def load(root: Path) -> None:
    store = CheckpointStore(root)
    checkpoint = store.open("iter_2.pth")
    model = sharded_model()
    target = model.state_dict()
    with torch.no_grad():
        for tensor in target.values():
            tensor.zero_()
    checkpoint.load("model", target)
    expected = whole_values() | {"3.running_mean": torch.ones(1)}
    for name, tensor in target.items():
        got = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(got, expected[name]), name
    assert checkpoint.rng(dist.rank()) == ({"rank": torch.tensor(dist.rank())} if dist.rank() < 2 else None)
    store.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init("gloo")
    {"save": save, "load": load}[sys.argv[1]](Path(sys.argv[2]))
    dist.shutdown()
