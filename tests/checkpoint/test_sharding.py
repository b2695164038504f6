import itertools

import pytest
import torch

from mmtrain.checkpoint.format.index import ShardEntry
from mmtrain.checkpoint.sharding import collect, overlap, spread
from mmtrain.dtensor import narrow_to_box


def test_spread_is_even_and_does_not_depend_on_the_order():
    sizes = {f"p{i}": (i * 37) % 50 + 1 for i in range(100)}
    writers = spread(sizes, 3)
    assert writers == spread(dict(reversed(sizes.items())), 3)
    loads = [sum(sizes[n] for n, r in writers.items() if r == rank) for rank in range(3)]
    assert max(loads) - min(loads) <= max(sizes.values())


def test_any_sharding_is_rebuilt_from_any_other():
    full = torch.arange(7 * 5).reshape(7, 5)

    def grid(rows, columns):
        for (a, b), (c, d) in itertools.product(itertools.pairwise(rows), itertools.pairwise(columns)):
            yield (a, c), (b - a, d - c)

    saved = list(grid([0, 2, 3, 7], [0, 4, 5]))
    for offsets, shape in grid([0, 4, 4, 5, 7], [0, 1, 5]):
        target = torch.full(shape, -1)
        for piece_offsets, piece_shape in saved:
            shared = overlap((offsets, shape), ShardEntry("f", 0, piece_offsets, piece_shape))
            if shared is not None:
                source = narrow_to_box(full, (0, 0), (piece_offsets, piece_shape))
                narrow_to_box(target, offsets, shared).copy_(narrow_to_box(source, piece_offsets, shared))
        assert torch.equal(target, narrow_to_box(full, (0, 0), (offsets, shape)))


def test_scalars_overlap_and_empty_boxes_do_not():
    assert overlap(((), ()), ShardEntry("f", 0, (), ())) == ((), ())
    assert overlap(((0,), (0,)), ShardEntry("f", 0, (0,), (3,))) is None


def test_one_memory_under_two_names_is_written_once():
    w = torch.randn(3, 3)
    local = collect("model", {"b": w, "a": w, "t": w.t(), "c": w.clone(), "row": w[0]}, writers={}, rank=0)
    assert local.aliases == {"b": "a"}
    assert [shard.name for shard in local.written()] == ["a", "c", "row", "t"]


@pytest.mark.parametrize(("rank", "expected"), [(0, ["x"]), (1, ["y"])])
def test_full_tensors_have_one_writer(rank, expected):
    local = collect("m", {"x": torch.ones(1), "y": torch.ones(1)}, writers={"y": 1}, rank=rank)
    assert [shard.name for shard in local.written()] == expected
