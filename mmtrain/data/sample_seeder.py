"""Reading samples as if all generators were seeded for each of them, at the cost of those that the dataset uses.

Seeding Python's and numpy's generators takes 4 and 1.7 microseconds, torch's 1.1. Tiny samples are read faster than
that, and few datasets draw from all three. So only generators that are *used* are seeded for every sample:

* torch's is always seeded.
* In a process's first `WARM_UP` samples all are seeded, and whichever a sample draws from is used from then on.
* Later, an unused generator is put into a known state at the start of each batch and then left alone. Before the last
  sample, its next number is compared with the one that follows that state. If they differ, samples drew from a
  generator that was not seeded for them: they are dropped and read again with all generators seeded, and whatever they
  draw from is used from then on. So a process reads samples twice in two batches at most, and only if the dataset draws
  from a generator that none of the first samples drew from.
* For the last sample of each batch all are seeded, because ``collate_fn`` and what follows continue from its state.

So the samples are bit-for-bit those of seeding everything each time, with any number of workers and after any resume,
whatever the process has read before. One thing is not seen: a sample that depends on the *state* of an unused generator
without changing it, by ``numpy.random.get_state()`` or by drawing and setting the old state again. What it finds there
is one of `STATES` states that the batch's first sample chooses. (``torch.initial_seed()`` is always the sample's own.)
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmtrain.randomness import fold, seed_generators, seed_numpy, seed_torch

WARM_UP = 256
STATES = 64
SMALL_BATCH = 3  # a smaller one has nothing to save


class _Generator:
    """A global generator, and whether anyone has drawn from it since it was seeded.

    It is drawn from to find out, and compared with the number that follows the seed (two draws of 53 random bits are
    equal once in 10^16).
    """

    def __init__(self, seed: Callable[[int], None], draw: Callable[[], float]) -> None:
        self.seed = seed
        self._draw = draw
        self._expected = 0.0
        self._known: dict[int, float] = {}  # the first numbers of the `STATES` states

    def watch(self, value: int) -> None:
        """Seed it, and expect that no one draws from it."""
        self.seed(value)
        self._expected = self._draw()
        self.seed(value)

    def watch_known(self, value: int) -> None:
        """Put it into one of `STATES` states, whose first number is known, and expect that no one draws from it."""
        state = value % STATES
        if state not in self._known:
            self.watch(state)
            self._known[state] = self._expected
            return
        self.seed(state)
        self._expected = self._known[state]

    def is_touched(self) -> bool:
        """Return whether anyone has drawn from it. To be asked once."""
        return self._draw() != self._expected


class SampleSeeder:
    """Reads samples of a dataset under the rule of this module. What it learns belongs to its process."""

    def __init__(self) -> None:
        self._unused = [_Generator(random.seed, random.random), _Generator(seed_numpy, np.random.random)]
        self._seeds: list[Callable[[int], None]] = [seed_torch]  # of the generators that are used
        self._warm_up = WARM_UP

    def __reduce__(self) -> tuple[type["SampleSeeder"], tuple[()]]:
        return SampleSeeder, ()  # another process has global generators of its own, and knows nothing yet

    def read(self, dataset: Any, indices: Sequence[int], prefix: int, samples: list[Any]) -> None:
        """Append ``dataset[index]`` for each index, as if all generators were seeded by ``fold(prefix, index)``.

        What ``dataset[index]`` raises is raised here; ``samples`` holds those before it.
        """
        if not self._unused or len(indices) < SMALL_BATCH:
            for index in indices:
                seed_generators(fold(prefix, index))
                samples.append(dataset[index])
            return
        if self._warm_up > 0:
            self._warm_up -= len(indices)
            self._read_observed(dataset, indices[:-1], prefix, samples)
        else:
            self._read_lean(dataset, indices[:-1], prefix, samples)
        seed_generators(fold(prefix, indices[-1]))
        samples.append(dataset[indices[-1]])

    def _read_lean(self, dataset: Any, indices: Sequence[int], prefix: int, samples: list[Any]) -> None:
        """Read samples with only the used generators seeded, and again if that was not enough."""
        seeds = self._seeds
        for generator in self._unused:
            generator.watch_known(fold(prefix, indices[0]))
        try:
            for index in indices:
                value = fold(prefix, index)
                for seed in seeds:
                    seed(value)
                samples.append(dataset[index])
        except Exception:
            if not self._is_any_touched():
                raise
        else:
            if not self._is_any_touched():
                return
        samples.clear()
        self._read_observed(dataset, indices, prefix, samples)

    def _read_observed(self, dataset: Any, indices: Sequence[int], prefix: int, samples: list[Any]) -> None:
        """Read samples with all generators seeded, and note which ones they draw from."""
        for index in indices:
            value = fold(prefix, index)
            seed_generators(value)
            for generator in self._unused:
                generator.watch(value)
            samples.append(dataset[index])
            for generator in [one for one in self._unused if one.is_touched()]:
                self._unused.remove(generator)
                self._seeds.append(generator.seed)

    def _is_any_touched(self) -> bool:
        return any([generator.is_touched() for generator in self._unused])
