"""Samples read with few seedings are the bits that seeding everything gives."""

import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from _data_sets import global_states

from mmtrain.data import TrainStream, sample_seeder
from mmtrain.data.sample_seeder import SampleSeeder
from mmtrain.randomness import fold, seed_generators
from mmtrain.types import Batch

PREFIX = 12345


@pytest.fixture(autouse=True)
def _short_warm_up(monkeypatch):
    monkeypatch.setattr(sample_seeder, "WARM_UP", 20)


def draw_python(index):
    return random.random()


def draw_gauss(index):
    return random.gauss(0, 1), np.random.randn()  # both keep a second number for the next call


def draw_numpy(index):
    return np.random.rand()


def draw_torch(index):
    return float(torch.rand(())), torch.initial_seed()


def draw_all(index):
    return draw_python(index), draw_numpy(index), draw_torch(index)


def draw_nothing(index):
    return index


def late_python(index):
    return draw_torch(index), random.random() if index >= 40 else 0.0


def late_both(index):
    return np.random.rand() if index % 37 == 36 else 0.0, random.random() if index % 53 == 52 else 0.0


def python_now_and_then(index):
    return random.random() if torch.rand(()) < 0.03 else 0.0


def reseeding(index):
    if index >= 60:
        random.seed(index)
        np.random.seed(index)
    return random.random() if index >= 60 else 0.0


def own_stream(index):
    """Uses the global generator for numbers of its own, and leaves it as it was."""
    state = random.getstate()
    random.seed(index)
    number = random.random()
    random.setstate(state)
    return number, draw_torch(index)


class Draws:
    """Samples of a function, whose calls are counted."""

    def __init__(self, draw, size=230):
        self.draw = draw
        self.size = size
        self.reads = Counter()

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.reads[index] += 1
        return self.draw(index)


def batches(size):
    """Batches of different sizes, the short last one among them."""
    numbers = list(range(230))
    return [numbers[start : start + size] for start in range(0, 230, size)]


def seeded_fully(dataset, size):
    """The samples, and the states of the generators after each batch."""
    for indices in batches(size):
        samples = []
        for index in indices:
            seed_generators(fold(PREFIX, index))
            samples.append(dataset[index])
        yield samples, global_states()


def read(dataset, size, seeder):
    for indices in batches(size):
        samples = []
        seeder.read(dataset, indices, PREFIX, samples)
        yield samples, global_states()
        seed_generators(7)  # as a training step does


ALL = [draw_python, draw_gauss, draw_numpy, draw_torch, draw_all, draw_nothing, late_python, late_both,
       python_now_and_then, reseeding, own_stream]  # fmt: skip


@pytest.mark.parametrize("draw", ALL)
@pytest.mark.parametrize("size", [1, 3, 4, 7, 32, 230])
def test_samples_and_what_follows_a_batch_are_those_of_full_seeding(draw, size):
    found = list(read(Draws(draw), size, SampleSeeder()))
    assert found == list(seeded_fully(Draws(draw), size))


@pytest.mark.parametrize("draw", ALL)
def test_what_a_process_has_read_before_does_not_matter(draw):
    seeder = SampleSeeder()
    list(read(Draws(draw), 32, seeder))
    assert list(read(Draws(draw), 9, seeder)) == list(seeded_fully(Draws(draw), 9))


@pytest.mark.parametrize("draw", [draw_nothing, draw_python, draw_gauss, draw_numpy, draw_torch, draw_all, own_stream])
def test_a_sample_is_read_once_where_the_first_samples_show_what_is_used(draw):
    dataset = Draws(draw)
    list(read(dataset, 32, SampleSeeder()))
    assert set(dataset.reads.values()) == {1}


def test_samples_are_read_twice_in_two_batches_at_most():
    dataset = Draws(late_both)
    list(read(dataset, 10, SampleSeeder()))
    twice = {index // 10 for index, count in dataset.reads.items() if count > 1}
    assert 1 <= len(twice) <= 2
    assert max(dataset.reads.values()) == 2


def test_a_generator_that_is_not_used_is_seeded_for_each_batch_and_a_used_one_for_each_sample(monkeypatch):
    seeds = []
    monkeypatch.setattr(random, "seed", lambda value, seed=random.seed: (seeds.append(value), seed(value)))

    def count(draw):
        seeder = SampleSeeder()
        list(read(Draws(draw), 32, seeder))
        seeds.clear()
        list(read(Draws(draw), 32, seeder))
        return len(seeds)

    batches, step, last = 8, 8, 8  # `read` seeds as a training step does
    assert count(draw_torch) <= batches + step + last + sample_seeder.STATES
    assert count(draw_python) == 230 + step


@pytest.mark.parametrize("failing", [25, 57, 63, 229])
def test_an_error_is_raised_where_full_seeding_raises_it(failing):
    def draw(index):
        number = random.random() if index > 50 else 0.0
        if index == failing:
            raise ValueError(f"bad {index} {number}")
        return number

    def until_error(iterator):
        found = []
        with pytest.raises(ValueError, match=f"bad {failing}") as error:
            found.extend(iterator)
        return str(error.value)

    assert until_error(read(Draws(draw), 32, SampleSeeder())) == until_error(seeded_fully(Draws(draw), 32))


def test_an_error_that_only_a_wrong_seed_causes_is_not_raised():
    numbers = {}
    for index in range(230):
        seed_generators(fold(PREFIX, index))
        numbers[index] = random.random()

    def strict(index):
        if index >= 50 and random.random() != numbers[index]:
            raise ValueError("not the number of this sample")
        return index

    assert [sample for samples, _ in read(Draws(strict), 32, SampleSeeder()) for sample in samples] == list(range(230))


def test_an_error_that_has_nothing_to_do_with_seeds_costs_no_second_read():
    class Faulty(Draws):
        def __getitem__(self, index):
            self.reads[index] += 1
            if index == 100:
                raise ValueError("bad")

    dataset, found = Faulty(draw_nothing), []
    with pytest.raises(ValueError, match="bad"):
        found.extend(read(dataset, 32, SampleSeeder()))
    assert len(found) == 3
    assert dataset.reads[100] == 1


def test_another_process_learns_for_itself():
    seeder = SampleSeeder()
    list(read(Draws(draw_nothing), 32, seeder))
    copy = pickle.loads(pickle.dumps(seeder))
    assert list(read(Draws(late_python), 32, copy)) == list(seeded_fully(Draws(late_python), 32))


def mix_up(samples):
    """Draws from the generators after the last sample, as a mixup in a collate function does."""
    return list(samples), random.random(), np.random.rand(), float(torch.rand(()))


@pytest.mark.parametrize("draw", [draw_nothing, late_both, python_now_and_then, draw_all])
def test_workers_and_resuming_anywhere_give_the_same_bits(draw):
    def stream(num_workers):
        return TrainStream(Draws(draw), 16, seed=3, num_workers=num_workers, collate_fn=mix_up)

    def data(read, count):
        return [batch.data for batch in (next(read) for _ in range(count)) if isinstance(batch, Batch)]

    alone = data(stream(0), 40)
    for num_workers in (1, 3):
        workers = stream(num_workers)
        assert data(workers, 40) == alone
        workers.close()
    for start in (3, 14, 27):
        resumed = stream(2)
        resumed.seek(start // 15, start % 15 * 16)
        assert data(resumed, 40 - start) == alone[start:]
        resumed.close()
