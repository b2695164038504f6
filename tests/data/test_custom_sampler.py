"""Samplers: MMEngine's names, and a user's own."""

import random
import tracemalloc
from itertools import count

import pytest
import torch
from _data_sets import Counting, Noisy, global_states, take
from mmengine.dataset import DefaultSampler as MMEngineDefaultSampler
from torch.utils.data import WeightedRandomSampler

from mmtrain.data import TrainStream
from mmtrain.data.custom_sampler import CustomSampler
from mmtrain.data.options import LoaderContext
from mmtrain.errors import ConfigError
from mmtrain.registry import DATA_SAMPLERS


def stream(sampler=None, dataset=None, batch_size=3, **options):
    return TrainStream(dataset or Noisy(11), batch_size, sampler=sampler, seed=5, **options)


class Backwards:
    """Yields this rank's indices from the end, rotated by the epoch."""

    def __init__(self, dataset, seed=None):
        self.size = len(dataset)
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.size

    def __iter__(self):
        return iter([(index + self.epoch) % self.size for index in reversed(range(self.size))])


class Endless:
    """Draws from the global generators without end."""

    def __init__(self, dataset):
        self.size = len(dataset)

    def __len__(self):
        return self.size

    def __iter__(self):
        for _ in count():
            yield from random.sample(range(self.size), self.size)


@pytest.mark.parametrize(
    "name", ["DefaultSampler", "InfiniteSampler", "mmengine.DefaultSampler", MMEngineDefaultSampler]
)
def test_mmengine_names_mean_the_stream_itself(name):
    assert take(stream(dict(type=name, shuffle=True)), 9) == take(stream(shuffle=True), 9)
    assert take(stream(dict(type=name, shuffle=False)), 9) == take(stream(shuffle=False), 9)
    assert take(stream(), 9) == take(stream(shuffle=True), 9)


def test_a_seed_of_the_sampler_affects_only_the_order():
    own, other = (take(stream(dict(type="DefaultSampler", shuffle=True, seed=seed)), 4) for seed in (5, 6))
    assert own == take(stream(), 4)
    assert [indices for indices, *_ in own] != [indices for indices, *_ in other]
    noise = {index: value for indices, values, *_ in own for index, value in zip(indices, values[::3], strict=True)}
    for indices, values, *_ in other:
        assert [noise[index] for index in indices] == values[::3]


def test_the_drawn_seed_of_a_sampler_object_of_mmengine_has_no_effect():
    dataset = Noisy(11)
    ready = MMEngineDefaultSampler(dataset, shuffle=True)
    assert take(stream(ready, dataset), 9) == take(stream(), 9)


def test_shuffle_together_with_a_sampler_is_refused():
    with pytest.raises(ConfigError, match=r"train_dataloader\.shuffle"):
        stream(dict(type="DefaultSampler"), shuffle=True)


def test_a_registered_sampler_gets_the_epoch():
    DATA_SAMPLERS.register_module(name="BackwardsForTest", module=Backwards, force=True)
    indices = [batch[0] for batch in take(stream(dict(type="BackwardsForTest")), 8)]
    assert indices[:4] == [[10, 9, 8], [7, 6, 5], [4, 3, 2], [1, 0]]
    assert indices[4:] == [[0, 10, 9], [8, 7, 6], [5, 4, 3], [2, 1]]


@pytest.mark.parametrize("kind", ["weighted", "weighted_drop", "backwards", "endless"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_starting_at_any_position_continues_the_same_order(kind, num_workers):
    def make():
        dataset = Noisy(11)
        samplers = {
            "weighted": lambda: WeightedRandomSampler(torch.ones(11), 11),
            "weighted_drop": lambda: WeightedRandomSampler(torch.ones(11), 11),
            "backwards": lambda: dict(type=Backwards),
            "endless": lambda: dict(type=Endless),
        }
        return stream(samplers[kind](), dataset, num_workers=num_workers, drop_last=kind == "weighted_drop")

    uninterrupted = make()
    run = take(uninterrupted, 12)
    assert len(uninterrupted) == (3 if kind == "weighted_drop" else 4)
    epoch = offset = 0
    uninterrupted.close()
    for position, (_, _, samples, epoch_end) in enumerate(run):
        if position in (0, 2, 5, 9):
            entered = make()
            entered.seek(epoch, offset)
            assert take(entered, 12 - position) == run[position:]
            entered.close()
        epoch, offset = (epoch + 1, 0) if epoch_end else (epoch, offset + samples)


def test_a_sampler_that_draws_does_not_change_the_global_generators():
    sampled = stream(WeightedRandomSampler(torch.ones(11), 11))
    before = global_states()
    sampled.seek(0, 6)
    assert global_states() == before


def test_skipping_with_a_sampler_reads_nothing():
    dataset = Counting(40)
    entered = stream(dict(type=Backwards), dataset)
    entered.seek(3, 30)
    assert dataset.reads.value == 0
    assert next(entered).data["index"].tolist() == [12, 11, 10]
    assert dataset.reads.value == 3


def test_a_sampler_without_a_length_is_refused():
    with pytest.raises(ConfigError, match="no length"):
        stream(iter(range(11)))


class Large:
    """Half a million indices beyond those that Python keeps."""

    def __init__(self, dataset):
        pass

    def __len__(self):
        return 500_000

    def __iter__(self):
        return (index * 1_000 for index in range(500_000))


def test_the_indices_of_an_epoch_take_eight_bytes_each():
    source = CustomSampler(lambda: Large(None), 4, context=LoaderContext(seed=5), drop_last=False)
    tracemalloc.start()
    batch = next(source.batch_indices(0, 400_000))
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert batch.indices == [400_000_000, 400_001_000, 400_002_000, 400_003_000]
    assert all(type(index) is int for index in batch.indices)  # as data sets expect
    assert size < 500_000 * 9
    assert peak < 500_000 * 24
