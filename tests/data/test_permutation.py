"""The order of one epoch."""

import numpy as np
import pytest
import torch

from mmtrain.data.permutation import ComputedOrder, epoch_order


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 100, 255, 256, 257, 1000, 5000])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 3)])
def test_computed_order_is_a_permutation(size, seed, epoch):
    order = ComputedOrder(size, seed, epoch)
    assert sorted(order.take(0, size)) == list(range(size))


def test_computed_order_is_the_same_however_it_is_divided():
    full = ComputedOrder(3000, 5, 1).take(0, 3000)
    order = ComputedOrder(3000, 5, 1)
    pieces = [order.take(start, min(start + 7, 3000)) for start in range(0, 3000, 7)]
    assert [index for piece in pieces for index in piece] == full
    assert ComputedOrder(3000, 5, 1).take(2990, 3000) == full[2990:]


@pytest.mark.parametrize(("batch", "ranks"), [(8, 1), (8, 3), (1, 7), (5, 100), (2000, 1)])
def test_computed_order_is_the_same_for_a_rank_that_takes_its_part_of_every_batch(batch, ranks):
    full = ComputedOrder(3000, 5, 1).take(0, 3000)
    for rank in {0, ranks - 1}:
        order = ComputedOrder(3000, 5, 1)
        for start in range(rank * batch, 3000 + batch, batch * ranks):
            assert order.take(start, start + batch) == full[start : start + batch]


def test_computed_order_is_computed_for_many_batches_at_a_time(monkeypatch):
    calls = []
    sound = ComputedOrder._permute
    monkeypatch.setattr(ComputedOrder, "_permute", lambda self, p: calls.append(len(p)) or sound(self, p))
    order = ComputedOrder(10**10, 5, 1)
    for number in range(1024):  # a batch of 8 on each of 4096 ranks
        order.take(number * 32768, number * 32768 + 8)
    assert len(calls) <= 10
    assert max(calls) <= 1024


def test_computed_order_of_ten_billion_samples_takes_no_memory_and_looks_random():
    size = 10_000_000_000
    order = epoch_order(size, 3, 0, shuffle=True)
    assert isinstance(order, ComputedOrder)
    values = np.array(order.take(9_999_000_000, 9_999_020_000))
    assert len(np.unique(values)) == len(values)
    assert values.min() >= 0
    assert values.max() < size
    # Uniform over [0, size): the mean of 20,000 has a standard error of 0.002 of the size; neighbours are unrelated.
    assert abs(values.mean() / size - 0.5) < 0.01
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03
    counts = np.histogram(values, bins=20, range=(0, size))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi squared, 19 degrees of freedom


def test_orders_differ_between_epochs_and_seeds_and_repeat_for_the_same():
    orders = {
        (limit, seed, epoch): tuple(epoch_order(50, seed, epoch, shuffle=True, stored_limit=limit).take(0, 50))
        for limit in (0, 100)
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 8
    for (limit, seed, epoch), order in orders.items():
        assert tuple(epoch_order(50, seed, epoch, shuffle=True, stored_limit=limit).take(0, 50)) == order
        assert sorted(order) == list(range(50))


def test_order_is_independent_of_the_global_generators():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = epoch_order(50, 1, 0, shuffle=True).take(0, 50)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert epoch_order(50, 1, 0, shuffle=True).take(0, 50) == first


def test_without_shuffling_the_order_is_that_of_the_data():
    assert epoch_order(50, 1, 3, shuffle=False).take(10, 14) == [10, 11, 12, 13]
