"""The loaders of validation: every sample once, in order."""

import pytest
from _data_sets import Counting, Noisy, Words, global_states

from mmtrain.data import EvalLoader, IterableEvalLoader
from mmtrain.errors import ConfigError, RunError


def loader(dataset=None, batch_size=4, **options):
    return EvalLoader(Noisy(23) if dataset is None else dataset, batch_size, **{"seed": 5} | options)


def one_pass(read):
    return [None if data is None else (data["index"].tolist(), data["noise"].tolist()) for data in read]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 9, 23, 24])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_every_sample_once_over_all_ranks_in_mmengines_order(world_size, size, batch_size):
    ranks = [loader(Noisy(size), batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    passes = [one_pass(read) for read in ranks]
    assert {len(batches) for batches in passes} == {len(ranks[0])}
    parts = [[index for batch in batches if batch for index in batch[0]] for batches in passes]
    for rank, part in enumerate(parts):
        assert part == list(range(rank, size, world_size))
    if world_size == 1:
        assert None not in passes[0]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_evaluation_is_bit_for_bit_the_same(num_workers):
    reference = one_pass(loader())
    assert one_pass(loader()) == reference
    read = loader(num_workers=num_workers)
    before = global_states()
    assert one_pass(read) == reference
    begun = iter(read)
    next(begun)
    assert one_pass(read) == reference
    with pytest.raises(RuntimeError, match="another pass over the loader has started"):
        next(begun)
    assert global_states() == before
    read.close()
    assert one_pass(read) == reference
    read.close()


def test_randomness_does_not_depend_on_batch_size_or_rank():
    def by_sample(*reads):
        batches = [batch for read in reads for batch in one_pass(read) if batch]
        return {index: tuple(noise) for rows in batches for index, noise in zip(*rows, strict=True)}

    reference = by_sample(loader())
    assert len(set(reference.values())) == 23
    assert by_sample(loader(batch_size=7)) == reference
    assert by_sample(*(loader(rank=rank, world_size=3) for rank in range(3))) == reference


@pytest.mark.parametrize("keep", [True, False])
def test_persistent_workers_stay_between_evaluations(keep):
    read = loader(Counting(12), num_workers=2, persistent_workers=keep)
    first, second = ({pid for data in read for pid in data["pid"].tolist()} for _ in range(2))
    assert len(first) == 2
    assert (first == second) == keep
    read.close()


def test_a_dataset_that_raises_is_named():
    class Faulty(Noisy):
        def __getitem__(self, index):
            raise OSError("gone")

    with pytest.raises(RunError, match=r"val_dataloader\.dataset: dataset\[0\] of Faulty raised OSError: gone"):
        list(loader(Faulty()))


@pytest.mark.parametrize(
    "options",
    [
        dict(shuffle=True),
        dict(drop_last=True),
        dict(sampler=dict(type="DefaultSampler", shuffle=True)),
        dict(batch_size=0),
    ],
)
def test_options_that_lose_the_order_or_a_sample_are_refused(options):
    with pytest.raises(ConfigError, match="val_dataloader"):
        loader(**options)


def test_samplers():
    reference = one_pass(loader())
    assert one_pass(loader(sampler=dict(type="DefaultSampler", shuffle=False))) == reference
    assert one_pass(loader(sampler=dict(type="DefaultSampler"))) == reference
    own = loader(sampler=[3, 1, 2], batch_size=2)
    assert [batch[0] for batch in one_pass(own)] == [[3, 1], [2]]
    assert len(own) == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_iterable_dataset_is_read_once_per_evaluation(num_workers):
    read = IterableEvalLoader(Words(11), 4, seed=5, num_workers=num_workers)
    first, second = one_pass(read), one_pass(read)
    assert first == second
    assert sorted(index for batch in first for index in batch[0]) == list(range(11))
    begun = iter(read)
    next(begun)
    assert one_pass(read) == first
    read.close()
