"""Seeds are functions of the position, and generator states are restored bit-for-bit."""

import random

import numpy as np
import torch

from mmtrain.randomness import capture, draw_seed, mix, restore, seed_generators, seed_step


def draws():
    return (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.randn(3).tolist())


def test_mix_never_changes():
    # A changed value would change every run that is resumed with a newer version.
    assert mix() == 0x9E3779B97F4A7C15
    assert mix(0, 0, 0) == 9271759356047530030
    assert mix(2, 7, 0, 1234) == 12436225635806866723


def test_mix_differs_for_neighbours_and_orders():
    values = {mix(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(values) == 8000
    assert mix(1, 2) != mix(2, 1)
    ones = [bin(mix(7, i) ^ mix(7, i + 1)).count("1") for i in range(500)]
    assert 28 < sum(ones) / len(ones) < 36  # half of 64 bits flip


def test_a_step_is_seeded_only_by_its_position():
    seed_step(1, 0, 10)
    first = draws()
    seed_step(1, 0, 11)
    second = draws()
    torch.randn(100)
    seed_step(1, 0, 10)
    assert draws() == first
    assert second != first


def test_states_are_restored_in_the_middle_of_a_stream():
    seed_generators(5)
    draws()
    state = capture()
    expected = [draws(), draws()]
    restore(state)
    assert [draws(), draws()] == expected


def test_a_drawn_seed_fits_every_generator():
    seeds = {draw_seed() for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**31 for seed in seeds)
