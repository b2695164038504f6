"""Reading samples as if all generators were seeded for each of them, at the cost of those that the dataset uses.

Seeding Python's and numpy's generators takes 4 and 1.7 microseconds, torch's 1.1. Tiny samples are read faster than
that, and few datasets draw from all three. So only generators that are *used* are seeded for every sample:

* torch's is always seeded.
* In a process's first `WARM_UP` samples all are seeded, and whichever a sample draws from is used from then on.
* Later, an unused generator is seeded for the first sample of each batch and then left alone. Before the last sample,
  its next number is compared with that of a twin. If they differ, samples in between drew from a generator that was not
  seeded for them: they are dropped and read again with all generators seeded, and whatever they draw from is used from
  then on. So a process reads samples twice in two batches at most, and only if the dataset draws from a generator that
  none of the first samples drew from.
* For the last sample of each batch all are seeded, because ``collate_fn`` and what follows continue from its state.

So the samples are bit-for-bit those of seeding everything each time, with any number of workers and after any resume,
whatever the process has read before. One thing is not seen: a sample that depends on the *state* of an unused generator
without changing it, by ``numpy.random.get_state()`` or by drawing and setting the old state again. What it finds there
belongs to the first sample of the batch. (``torch.initial_seed()`` is always the sample's own.)
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmtrain.randomness import fold, seed_generators, seed_numpy, seed_torch

WARM_UP = 256
SMALL_BATCH = 4  # a smaller one has a first and a last sample, and too little in between


class _Generator:
    """A global generator and a private twin, which tells whether anyone else drew from the global one.

    Seeded alike and drawn from equally often, the two give the same numbers; after a draw of someone else they differ
    (two draws of 53 random bits are equal once in 10^16).
    """

    def __init__(
        self, seed: Callable[[int], None], draw: Callable[[], float], seed_twin: Any, draw_twin: Callable[[], float]
    ) -> None:
        self.seed = seed
        self.draw = draw
        self.seed_twin: Callable[[int], None] = seed_twin
        self.draw_twin = draw_twin


def _python() -> _Generator:
    twin = random.Random(0)
    return _Generator(random.seed, random.random, twin.seed, twin.random)


def _numpy() -> _Generator:
    twin = np.random.RandomState(0)
    return _Generator(seed_numpy, np.random.random, lambda value: seed_numpy(value, twin), twin.random)


class SampleSeeder:
    """Reads samples of a dataset under the rule of this module. What it learns belongs to its process."""

    def __init__(self) -> None:
        self._unused = [_python(), _numpy()]
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
        observed = 1 if self._warm_up <= 0 else len(indices) - 1
        self._read_observed(dataset, indices[:observed], prefix, samples)
        self._read_lean(dataset, indices[observed:-1], prefix, samples)
        self._warm_up -= observed
        seed_generators(fold(prefix, indices[-1]))
        samples.append(dataset[indices[-1]])

    def _read_lean(self, dataset: Any, indices: Sequence[int], prefix: int, samples: list[Any]) -> None:
        """Read samples with only the used generators seeded, and again if that was not enough."""
        before, seeds = len(samples), self._seeds
        try:
            for index in indices:
                value = fold(prefix, index)
                for seed in seeds:
                    seed(value)
                samples.append(dataset[index])
        except Exception:
            if self._untouched():
                raise
        else:
            if self._untouched():
                return
        del samples[before:]
        self._read_observed(dataset, indices, prefix, samples)

    def _read_observed(self, dataset: Any, indices: Sequence[int], prefix: int, samples: list[Any]) -> None:
        """Read samples with all generators seeded, and note which ones they draw from."""
        for index in indices:
            value = fold(prefix, index)
            seed_generators(value)
            for generator in self._unused:
                generator.seed_twin(value)
            samples.append(dataset[index])
            for generator in [one for one in self._unused if one.draw() != one.draw_twin()]:
                self._unused.remove(generator)
                self._seeds.append(generator.seed)

    def _untouched(self) -> bool:
        return all([generator.draw() == generator.draw_twin() for generator in self._unused])
