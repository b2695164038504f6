"""DTensors and plain tensors through the same functions, on a mesh of one process and by boxes of several."""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mmtrain import dtensor


@pytest.fixture
def sharded():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distribute_tensor(torch.arange(12.0).reshape(4, 3), init_device_mesh("cpu", (1,)), [Shard(0)])
    distributed.destroy_process_group()


def test_a_plain_tensor_is_the_full_tensor():
    plain = torch.nn.Parameter(torch.ones(2, 3))
    assert not dtensor.is_dtensor(plain)
    assert dtensor.local_tensor(plain) is plain
    assert dtensor.full_tensor(plain) is plain
    assert dtensor.mesh_of(plain) is None
    local, box = dtensor.local_box(plain)
    assert (local.data_ptr(), local.requires_grad, box) == (plain.data_ptr(), False, ((0, 0), (2, 3)))


def test_a_dtensor(sharded):
    assert dtensor.is_dtensor(sharded)
    assert dtensor.mesh_of(sharded) is sharded.device_mesh
    local, box = dtensor.local_box(sharded)
    assert not isinstance(local, DTensor)
    assert box == ((0, 0), (4, 3))
    dtensor.copy_from_full(sharded, torch.ones(4, 3))
    assert torch.equal(dtensor.full_tensor(sharded), torch.ones(4, 3))
    assert dtensor.ranks_with_same_shard(sharded) == [0]


def test_nested_state_has_full_tensors(sharded):
    state = dtensor.full_state({"averages": {"w": sharded}, "steps": 3, "both": [sharded, torch.ones(1)], "empty": []})
    assert not any(isinstance(value, DTensor) for value in (state["averages"]["w"], *state["both"]))
    assert (state["steps"], state["empty"]) == (3, [])


def test_a_box_without_elements_may_begin_beyond_the_end():
    full = torch.arange(6.0).reshape(2, 3)
    assert dtensor.narrow_to_box(full, (0, 0), ((5, 0), (0, 3))).shape == (0, 3)
    assert dtensor.narrow_to_box(full, (0, 0), ((1, 1), (1, 2))).tolist() == [[4.0, 5.0]]
