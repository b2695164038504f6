"""Streams over data that can only be iterated over."""

import itertools
import random
import threading
import time
from multiprocessing import active_children

import pytest
import torch
from _data_sets import Noisy, PlainWords, Remainder, Usual, WithEpoch, WithPasses, Words, take
from torch.utils.data import DataLoader, DistributedSampler

from mmtrain.data import ForeignStream, IterableStream
from mmtrain.errors import ConfigError, RunError


def stream(dataset=None, batch_size=2, **options):
    return IterableStream(dataset or Words(), batch_size, **{"seed": 5} | options)


def indices(batches):
    return [batch[0] for batch in batches]


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [4, 11, 12])
def test_an_epoch_gives_every_sample_once_and_marks_its_end(num_workers, drop_last, size):
    read = stream(Words(size), num_workers=num_workers, drop_last=drop_last)
    for _ in range(3):
        seen = []
        for batch in read:
            seen += batch.data["index"].tolist()
            assert batch.samples == len(batch.data["index"])
            if batch.epoch_end:
                break
        workers = max(1, num_workers)
        shares = [len(range(worker, size, workers)) for worker in range(workers)]
        assert len(seen) == len(set(seen)) == sum(share - share % 2 * drop_last for share in shares)
    read.close()


def run_with_states(uninterrupted, count=16):
    """Take batches; return them, and the position and state before each."""
    run, states = [], []
    epoch = offset = 0
    for _ in range(count):
        states.append((epoch, offset, uninterrupted.state_dict()))
        (batch,) = take(uninterrupted, 1)
        run.append(batch)
        epoch, offset = (epoch + 1, 0) if batch[3] else (epoch, offset + batch[2])
    assert epoch >= 2
    uninterrupted.close()
    return run, states


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize("seek_first", [False, True])
def test_a_stateful_dataset_continues_bit_for_bit_from_any_position(num_workers, seek_first):
    run, states = run_with_states(stream(num_workers=num_workers))
    for position, (epoch, offset, state) in list(enumerate(states))[:: max(1, num_workers)]:
        resumed = stream(num_workers=num_workers)
        if seek_first:
            resumed.seek(epoch, offset)
            resumed.load_state_dict(state)
        else:
            resumed.load_state_dict(state)
            resumed.seek(epoch, offset)
        assert take(resumed, 16 - position) == run[position:]
        resumed.close()


def resumes_everywhere(made, positions=range(16)):
    run, states = run_with_states(made())
    for position in positions:
        epoch, offset, state = states[position]
        resumed = made()
        resumed.load_state_dict(state)
        assert resumed.seek(epoch, offset) == (epoch, offset)
        assert take(resumed, 16 - position) == run[position:], position
        resumed.close()


@pytest.mark.parametrize("kind", [Words, Usual, WithPasses, Remainder, WithEpoch])
@pytest.mark.parametrize(("batch_size", "size"), [(2, 12), (2, 11), (4, 11)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_any_kind_of_state_continues_from_any_batch_also_where_a_pass_ends(kind, batch_size, size, drop_last):
    resumes_everywhere(lambda: stream(kind(size), batch_size, drop_last=drop_last))


@pytest.mark.parametrize("kind", [Usual, WithPasses, WithEpoch])
@pytest.mark.parametrize(("num_workers", "batch_size", "size"), [(2, 4, 11), (3, 2, 11)])
def test_workers_whose_passes_end_at_different_batches_lose_nothing(kind, num_workers, batch_size, size):
    made = lambda: stream(kind(size), batch_size, num_workers=num_workers)  # noqa: E731
    resumes_everywhere(made, range(2, 10))


@pytest.mark.parametrize("kind", [Words, Usual, Remainder, WithEpoch])
def test_an_epoch_of_one_incomplete_batch_is_followed_by_the_next(kind):
    run, states = run_with_states(stream(kind(3), 4), 6)
    for position, (epoch, offset, state) in enumerate(states):
        resumed = stream(kind(3), 4)
        resumed.load_state_dict(state)
        resumed.seek(epoch, offset)
        assert take(resumed, 6 - position) == run[position:]


@pytest.mark.parametrize("kind", [Words, Usual])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_state_of_an_end_that_an_earlier_version_saved_is_followed_by_the_next_epoch(kind, num_workers):
    run, states = run_with_states(stream(kind(12), num_workers=num_workers))
    position = next(number for number, (epoch, *_) in enumerate(states) if epoch == 1)
    epoch, offset, state = states[position]
    for reader in state["readers"]:
        reader.pop("reread")
        reader["dataset"] = {"at": 0 if kind is Words else 12 // max(1, num_workers)}  # captured after the end
    resumed = stream(kind(12), num_workers=num_workers)
    resumed.load_state_dict(state)
    resumed.seek(epoch, offset)
    assert take(resumed, 16 - position) == run[position:]
    resumed.close()


def test_zero_and_one_worker_are_the_same():
    one = stream(num_workers=1)
    run = take(one, 14)
    state = one.state_dict()
    one.close()
    none = stream(num_workers=0)
    assert take(none, 14) == run
    assert none.state_dict() == state


def test_another_number_of_workers_is_refused():
    state = stream(num_workers=0).state_dict()
    with pytest.raises(ConfigError, match=r"num_workers.*1 worker.*found 2"):
        stream(num_workers=2).load_state_dict(state)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_closed_stream_continues(num_workers):
    uninterrupted = stream(num_workers=num_workers)
    run = take(uninterrupted, 9)
    uninterrupted.close()
    read = stream(num_workers=num_workers)
    assert take(read, 4) == run[:4]
    read.close()
    assert take(read, 5) == run[4:]
    read.close()


def test_seek_to_the_beginning_starts_again():
    read = stream()
    run = take(read, 9)
    read.seek(0, 0)
    assert take(read, 9) == run


def test_without_a_state_an_epoch_starts_again_with_a_notice():
    read = stream(PlainWords())
    run = take(read, 8)
    assert read.state_dict() == {}
    assert "position cannot be saved" in read.notices[0]
    resumed = stream(PlainWords())
    resumed.load_state_dict({})
    assert resumed.seek(1, 4) == (1, 0)  # its real position
    assert indices(take(resumed, 2)) == indices(run[:2])
    assert stream().notices == []
    assert "shard by rank" in stream(world_size=2).notices[0]


def test_lengths():
    assert stream().iterations_per_epoch is None
    with pytest.raises(TypeError):
        len(stream())

    class Sized(PlainWords):
        def __len__(self):
            return 11

    assert (len(stream(Sized())), stream(Sized()).samples) == (6, 11)
    assert (len(stream(Sized(), drop_last=True)), stream(Sized(), drop_last=True).samples) == (5, 10)
    assert stream(Sized(), num_workers=2).iterations_per_epoch is None


def test_a_dataset_without_data_is_an_error():
    with pytest.raises(RunError, match="no batch in epoch 1"):
        next(stream(Words(0)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataset_that_raises_is_named(num_workers):
    class Faulty(PlainWords):
        def __iter__(self):
            yield {"index": 0}
            raise ValueError("boom")

    read = stream(Faulty(), num_workers=num_workers)
    with pytest.raises(RunError, match=r"train_dataloader\.dataset: Faulty raised ValueError: boom at .* of epoch 1"):
        take(read, 9)
    read.close()


class BufferShuffledExamplesIterable:
    """Named as the part of Hugging Face's datasets that shuffles."""


class Shuffled(PlainWords):
    """Shuffles through a buffer that its state does not hold, as Hugging Face's datasets do."""

    _ex_iterable = BufferShuffledExamplesIterable()

    def __init__(self, size=11):
        super().__init__(size)
        self.shared_epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch):
        self.shared_epoch += epoch - self.shared_epoch

    def __iter__(self):
        order = random.Random(int(self.shared_epoch))
        buffer = list(super().__iter__())
        order.shuffle(buffer)
        for sample in buffer:
            yield sample | {"noise": sample["noise"] + torch.rand((), dtype=torch.float64)}

    def state_dict(self):
        return {"read": self.size}

    def load_state_dict(self, state):
        raise AssertionError("its state cannot be loaded")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_buffer_that_no_state_holds_is_filled_again(num_workers):
    resumes_everywhere(lambda: stream(Shuffled(), num_workers=num_workers), range(0, 16, 2))
    assert "shuffles in a buffer" in stream(Shuffled()).notices[0]
    assert "shuffles in a buffer" in ForeignStream(DataLoader(Shuffled(), batch_size=2), seed=5).notices[0]


def test_the_epoch_is_told_to_the_main_process_before_a_worker_reads_it():
    dataset = Shuffled()
    read = stream(dataset, num_workers=2)
    epochs = []
    for batch in read:
        epochs.append(int(dataset.shared_epoch))
        if len(epochs) == 14:
            break
        assert batch.epoch_end == (len(epochs) in (6, 12))
    read.close()
    assert epochs == [0] * 6 + [1] * 6 + [2] * 2


# -- objects that the user has built


class LoaderWithState:
    """A loader with state, as torchdata's StatefulDataLoader has it."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while self.at < 5:
            self.at += 1
            yield {"index": torch.tensor([self.at, 0]), "noise": torch.rand(2)}
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def loader():
    return DataLoader(Noisy(11), batch_size=3, shuffle=True)


@pytest.mark.parametrize("make", [loader, LoaderWithState])
def test_a_foreign_loader_continues_from_any_position(make):
    uninterrupted = ForeignStream(make(), seed=5)
    run, positions = [], []
    epoch = offset = 0
    for _ in range(11):
        positions.append((epoch, offset, uninterrupted.state_dict()))
        (batch,) = take(uninterrupted, 1)
        run.append(batch)
        epoch, offset = (epoch + 1, 0) if batch[3] else (epoch, offset + batch[2])
    assert epoch == 2
    for position, (epoch, offset, state) in enumerate(positions):
        resumed = ForeignStream(make(), seed=5)
        resumed.load_state_dict(state)
        resumed.seek(epoch, offset)
        assert take(resumed, 11 - position) == run[position:]
    assert bool(uninterrupted.notices) == (make is loader)


def test_a_foreign_loader_shuffles_every_epoch_and_has_its_length():
    read = ForeignStream(loader(), seed=5)
    first, second = (list(itertools.chain(*indices(take(read, 4)))) for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second
    assert len(read) == 4


def test_the_epoch_reaches_a_foreign_loaders_sampler():
    dataset = Noisy(8)
    sampler = DistributedSampler(dataset, num_replicas=2, rank=0)
    read = ForeignStream(DataLoader(dataset, batch_size=4, sampler=sampler), seed=5, world_size=2)
    assert next(read).samples == 8
    assert sampler.epoch == 0  # the end of the epoch is known, the next one has not begun
    sampler.set_epoch(7)
    next(read)
    assert sampler.epoch == 1


def test_a_one_shot_iterator_is_reported_at_its_second_epoch():
    read = ForeignStream(iter([{"index": torch.tensor([1])}]), seed=5)
    assert next(read).epoch_end
    with pytest.raises(RunError, match="generator does so only once"):
        next(read)


class Stuck(Noisy):
    """Its samples from the eighth on take two minutes."""

    def __getitem__(self, index):
        if index >= 8:
            threading.Event().wait(120)
        return super().__getitem__(index)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("persistent_workers", [True, False])
def test_the_stuck_workers_of_a_ready_made_loader_end_together(persistent_workers):
    ready = DataLoader(Stuck(40), batch_size=2, num_workers=4, persistent_workers=persistent_workers)
    read = ForeignStream(ready, seed=5)
    take(read, 3)
    workers = [child for child in active_children() if child.is_alive()]
    assert len(workers) == 4
    began = time.monotonic()
    read.close()
    assert time.monotonic() - began < 15  # one after another they would take 20 seconds
    assert not any(worker.is_alive() for worker in workers)
