"""The arithmetic of positions."""

from itertools import islice, product

import pytest

from mmtrain.data import PositionSampler
from mmtrain.errors import ConfigError

CASES = list(product([1, 2, 7, 24, 25], [1, 3, 4], [1, 2, 3, 4], [False, True]))


def samplers(size, batch_size, world_size, drop_last, seed=3):
    return [
        PositionSampler(size, batch_size, seed=seed, drop_last=drop_last, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]


def consumed(draw):
    """The samples of a draw that count; a stand-in of a rank that has none does not."""
    return draw.indices if draw.weight else []


def one_pass(all_ranks, offset=0):
    """Read one epoch on all ranks: a list of iterations, each the draws of all ranks."""
    iterations = []
    for draws in zip(*(sampler.batch_indices(0, offset) for sampler in all_ranks), strict=True):
        iterations.append(draws)
        if draws[0].epoch_end:
            return iterations
    raise AssertionError("endless")


@pytest.mark.parametrize(("size", "batch_size", "world_size", "drop_last"), CASES)
def test_an_epoch_gives_every_sample_once_over_all_ranks(size, batch_size, world_size, drop_last):
    if drop_last and size < batch_size * world_size:
        with pytest.raises(ConfigError):
            samplers(size, batch_size, world_size, drop_last)
        return
    ranks = samplers(size, batch_size, world_size, drop_last)
    iterations = one_pass(ranks)
    seen = [index for draws in iterations for draw in draws for index in consumed(draw)]
    assert len(seen) == len(set(seen)) == ranks[0].samples
    assert len(iterations) == ranks[0].iterations_per_epoch
    if not drop_last:
        assert sorted(seen) == list(range(size))
    for draws in iterations:
        sizes = [len(consumed(draw)) for draw in draws]
        assert [draw.weight * draw.samples for draw in draws] == pytest.approx([world_size * size for size in sizes])
        assert sum(sizes) == draws[0].samples
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)
        assert len({(draw.epoch, draw.offset, draw.samples, draw.epoch_end) for draw in draws}) == 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_the_samples_of_an_iteration_do_not_depend_on_the_world(world_size):
    alone = one_pass(samplers(50, 12, 1, False))
    shared = one_pass(samplers(50, 12 // world_size, world_size, False))
    for (one,), many in zip(alone, shared, strict=True):
        assert [index for draw in many for index in consumed(draw)] == one.indices


@pytest.mark.parametrize(("size", "batch_size", "world_size", "drop_last"), CASES)
def test_starting_at_any_position_continues_the_same_order(size, batch_size, world_size, drop_last):
    if drop_last and size < batch_size * world_size:
        return
    for sampler in samplers(size, batch_size, world_size, drop_last):
        run = list(islice(sampler.batch_indices(0, 0), 3 * sampler.iterations_per_epoch + 2))
        for position, draw in enumerate(run):
            fresh = PositionSampler(
                size,
                batch_size,
                seed=3,
                drop_last=drop_last,
                rank=sampler.rank,
                world_size=world_size,
            )
            assert list(islice(fresh.batch_indices(draw.epoch, draw.offset), len(run) - position)) == run[position:]


def test_a_changed_batch_size_continues_in_the_middle_of_an_epoch():
    before = samplers(50, 8, 1, False)
    taken = [index for draw in islice(before[0].batch_indices(2, 0), 3) for index in draw.indices]
    after = samplers(50, 5, 2, False)
    rest = []
    for draws in zip(*(sampler.batch_indices(2, 24) for sampler in after), strict=True):
        rest += [index for draw in draws for index in draw.indices]
        if draws[0].epoch_end:
            break
    assert sorted(taken + rest) == list(range(50))


@pytest.mark.parametrize(
    ("offset", "drop_last", "where"), [(50, False, (4, 0)), (49, False, (3, 49)), (43, True, (4, 0))]
)
def test_a_position_with_nothing_left_is_in_the_next_epoch(offset, drop_last, where):
    sampler = PositionSampler(50, 8, seed=1, drop_last=drop_last)
    assert sampler.normalise(3, offset) == where
    first = next(sampler.batch_indices(3, offset))
    assert (first.epoch, first.offset) == where


def test_a_rank_may_get_nothing_of_the_last_batch():
    draws = one_pass(samplers(9, 2, 4, False))[-1]
    assert [draw.weight for draw in draws] == [4.0, 0.0, 0.0, 0.0]
    assert [draw.indices for draw in draws] == [draws[0].indices] * 4
    assert all(draw.samples == 1 and draw.epoch_end for draw in draws)


@pytest.mark.parametrize(
    ("size", "batch_size", "drop_last", "words"),
    [
        (0, 4, False, ["dataset", "empty"]),
        (3, 4, True, ["batch_size 4", "has 3", "drop_last=False", "batch_size=3"]),
        (3, 0, False, ["batch_size", "0", "at least 1"]),
        (3, -1, False, ["batch_size", "-1"]),
        (3, 2.0, False, ["batch_size", "2.0"]),
        (3, True, False, ["batch_size", "True"]),
    ],
)
def test_errors_name_the_remedy(size, batch_size, drop_last, words):
    with pytest.raises(ConfigError) as caught:
        PositionSampler(size, batch_size, seed=1, drop_last=drop_last)
    for word in words:
        assert word in str(caught.value)
