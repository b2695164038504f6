"""The training stream: the same bits however it is read."""

import itertools
import random

import numpy as np
import pytest
import torch
from _data_sets import Counting, Noisy, global_states, plain, take
from torch.utils.data import Subset

from mmtrain.data import TrainStream
from mmtrain.errors import ConfigError, RunError


def stream(dataset=None, batch_size=4, seed=5, **options):
    return TrainStream(Noisy(23) if dataset is None else dataset, batch_size, seed=seed, **options)


@pytest.mark.parametrize("per_sample", [True, False])
def test_any_number_of_workers_gives_the_same_bits(per_sample):
    runs = []
    for num_workers in (0, 1, 2, 4):
        read = stream(num_workers=num_workers, per_sample=per_sample)
        runs.append(take(read, 20))
        read.close()
    assert all(run == runs[0] for run in runs[1:])
    noise = [tuple(values) for _, values, *_ in runs[0]]
    assert len(set(noise)) == len(noise)


def test_per_sample_randomness_depends_only_on_seed_epoch_and_index():
    def by_sample(read, passes=2):
        found, epoch = {}, 0
        for batch in read:
            rows = zip(batch.data["index"].tolist(), batch.data["noise"].tolist(), strict=True)
            found.update({(epoch, index): tuple(noise) for index, noise in rows})
            epoch += batch.epoch_end
            if epoch == passes:
                return found
        raise AssertionError("endless")

    reference = by_sample(stream())
    assert len(reference) == len(set(reference.values())) == 46
    assert by_sample(stream(batch_size=7)) == reference
    assert by_sample(stream(shuffle=False)) == reference
    sharded = {}
    for rank in range(3):
        sharded.update(by_sample(stream(batch_size=2, rank=rank, world_size=3)))
    assert sharded == reference
    assert by_sample(stream(seed=6)) != reference


def test_batch_randomness_differs_between_ranks():
    ranks = [stream(per_sample=False, rank=rank, world_size=2) for rank in range(2)]
    first, second = (next(rank).data["noise"] for rank in ranks)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("per_sample", [True, False])
def test_seek_to_any_position_continues_the_same_batches(num_workers, per_sample):
    for size, batch_size, drop_last in itertools.product((7, 12), (1, 5), (False, True)):
        options = dict(drop_last=drop_last, per_sample=per_sample)
        run = take(stream(Noisy(size), batch_size, **options), 12)
        entered = stream(Noisy(size), batch_size, num_workers=num_workers, **options)
        epoch = offset = 0
        for position, (_, _, samples, epoch_end) in enumerate(run):
            if position % 3 == 0:
                assert entered.seek(epoch, offset) == (epoch, offset)
                assert take(entered, 12 - position) == run[position:]
            epoch, offset = (epoch + 1, 0) if epoch_end else (epoch, offset + samples)
        entered.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_seek_reads_no_sample_before_the_position(num_workers):
    dataset = Counting(40)
    entered = stream(dataset, num_workers=num_workers, prefetch_factor=2 if num_workers else None)
    entered.seek(1_000_000, 32)
    assert dataset.reads.value == 0
    assert next(entered).samples == 4
    # Workers hold at most prefetch_factor batches each, and one is requested when one is returned.
    assert dataset.reads.value <= 4 * (1 if num_workers == 0 else 2 * 2 + 1)
    entered.close()


def test_persistent_workers_stay_over_epochs_and_seeks():
    read = stream(Counting(8), num_workers=2, persistent_workers=True)
    pids = {pid for _ in range(9) for pid in next(read).data["pid"].tolist()}
    read.seek(4, 4)
    pids |= {pid for _ in range(5) for pid in next(read).data["pid"].tolist()}
    assert len(pids) == 2
    read.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_position_advances_when_a_batch_is_returned(num_workers):
    read = stream(Noisy(10), num_workers=num_workers)
    positions = []
    for _ in range(5):
        positions.append(read.position)
        next(read)
    assert positions == [(0, 0), (0, 4), (0, 8), (1, 0), (1, 4)]
    rest = take(read, 3)
    read.seek(1, 8)
    assert take(read, 3) == rest
    read.close()


def test_a_closed_stream_continues():
    read = stream(num_workers=2)
    run = take(stream(), 8)
    assert take(read, 3) == run[:3]
    read.close()
    assert take(read, 5) == run[3:]
    read.close()
    read.close()


def test_with_workers_the_global_generators_of_the_main_process_are_not_drawn_from():
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    before = global_states()
    read = stream(num_workers=2)
    take(read, 8)
    read.seek(0, 4)
    take(read, 2)
    read.close()
    assert global_states() == before


def test_a_rank_without_samples_gets_a_stand_in_without_weight():
    assert [next_of_last(rank)[0][0] for rank in range(4)] == [[8], [8], [8], [8]]
    assert [next_of_last(rank)[1] for rank in range(4)] == [4.0, 0.0, 0.0, 0.0]
    assert all(next_of_last(rank)[0][2:] == (1, True) for rank in range(4))


def next_of_last(rank, num_workers=0):
    read = stream(Noisy(9), 2, rank=rank, world_size=4, shuffle=False, num_workers=num_workers)
    read.seek(0, 8)
    batch = next(read)
    read.close()
    return plain(batch), batch.weight


def test_a_rank_without_samples_gets_a_stand_in_from_workers_too():
    assert next_of_last(3, num_workers=1) == next_of_last(3)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_weights_of_all_ranks_are_their_shares(world_size):
    ranks = [stream(Noisy(23), 12 // world_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    weights = [[next(read).weight for read in ranks] for _ in range(2)]
    assert weights[0] == [1.0] * world_size
    last = [11 // world_size + (rank < 11 % world_size) for rank in range(world_size)]
    assert weights[1] == [own * world_size / 11 for own in last]


def test_length_and_samples():
    assert (len(stream(Noisy(10))), stream(Noisy(10)).samples) == (3, 10)
    assert (len(stream(Noisy(10), drop_last=True)), stream(Noisy(10), drop_last=True).samples) == (2, 8)
    assert (len(stream(Noisy(10), world_size=2)), bool(stream())) == (2, True)


class Rows(Noisy):
    """Reads a batch in one call."""

    def __getitems__(self, indices):
        return [{"index": index, "noise": torch.rand(3, dtype=torch.float64)} for index in indices]


def test_a_dataset_that_reads_batches_is_seeded_per_batch_with_a_notice():
    runs = []
    for num_workers in (0, 2):
        read = stream(Rows(23), num_workers=num_workers)
        runs.append(take(read, 9))
        read.close()
        assert any("Rows" in notice for notice in read.notices)
    assert runs[0] == runs[1]
    assert runs[0] == take(stream(Rows(23), per_sample=False), 9)


def test_a_subset_is_seeded_per_sample():
    dataset = Noisy(30)
    assert stream(Subset(dataset, range(23))).notices == []
    assert take(stream(Subset(dataset, range(23))), 9) == take(stream(), 9)
    assert stream(Subset(Rows(30), range(23))).notices != []


class Faulty(Noisy):
    """Fails at one index, in a way of the test's choice."""

    def __init__(self, fault):
        super().__init__(23)
        self.fault = fault

    def __getitem__(self, index):
        return self.fault() if index == 6 else super().__getitem__(index)


class UnpicklableError(Exception):
    """Cannot be made from its message alone, so it cannot be pickled."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def fail_plainly():
    raise ValueError("boom\n  on two lines")


def fail_unpicklably():
    raise UnpicklableError("one", "two")


def end_iteration():
    raise StopIteration


def message(read, error=RunError):
    with pytest.raises(error) as caught:
        take(read, 9)
    read.close()
    text = str(caught.value)
    assert "\n" not in text
    return text, caught.value.__cause__


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_dataset_that_raises_is_named_with_index_and_cause(num_workers):
    text, cause = message(stream(Faulty(fail_plainly), num_workers=num_workers, shuffle=False))
    assert all(
        word in text for word in ("train_dataloader.dataset", "dataset[6] of Faulty", "epoch 1", "ValueError: boom on")
    )
    assert isinstance(cause, ValueError)
    if num_workers:
        assert "fail_plainly" in str(cause.__cause__)
    text, cause = message(stream(Faulty(fail_unpicklably), num_workers=num_workers))
    assert "UnpicklableError: one and two" in text
    assert isinstance(cause, RuntimeError if num_workers else UnpicklableError)
    text, _ = message(stream(Faulty(end_iteration), num_workers=num_workers))
    assert "dataset[6]" in text
    assert "StopIteration" in text


def test_an_interrupt_in_the_dataset_passes_through():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take(stream(Faulty(interrupt)), 9)


def test_none_is_refused_unless_the_users_collate_function_accepts_it():
    text, _ = message(stream(Faulty(lambda: None)))
    assert "dataset[6] of Faulty returned None" in text

    def without_none(samples):
        return torch.utils.data.default_collate([sample for sample in samples if sample is not None])

    indices = [batch[0] for batch in take(stream(Faulty(lambda: None), collate_fn=without_none), 6)]
    assert sorted(index for batch in indices for index in batch) == sorted(set(range(23)) - {6})


def test_a_failing_collate_function_is_named():
    def uneven():
        return {"index": 6, "noise": torch.zeros(2, dtype=torch.float64)}

    text, cause = message(stream(Faulty(uneven), shuffle=False))
    assert "collate_fn" in text
    assert "[4, 5, 6, 7]" in text
    assert "pad_collate" in text
    assert isinstance(cause, RuntimeError)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(num_worker=2), ["train_dataloader.num_worker", "'num_workers'"]),
        (dict(num_workers=-1), ["num_workers", "-1"]),
        (dict(prefetch_factor=0), ["prefetch_factor"]),
        (dict(timeout=-3), ["timeout"]),
        (dict(worker_init_fn=3), ["worker_init_fn"]),
        (dict(batch_size=0), ["train_dataloader.batch_size", "0"]),
        (dict(dataset=Noisy(3), drop_last=True), ["train_dataloader.batch_size", "has 3"]),
        (dict(dataset=Noisy(0)), ["train_dataloader.dataset", "empty"]),
        (dict(dataset=iter([1])), ["is iterable-style"]),
        (dict(dataset=object()), ["object", "__getitem__"]),
        (dict(collate_fn=3), ["collate_fn", "3"]),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ConfigError) as caught:
        stream(**options)
    for word in words:
        assert word in str(caught.value)
