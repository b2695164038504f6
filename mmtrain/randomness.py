"""Positional seeding: every random number is a function of the run's position, not of how the run got there.

`mix` folds integers (seed, rank, iteration, ...) into one 64-bit seed, and `seed_generators` seeds the generators of
Python, numpy, torch and the current device with it. Seeding all of them takes about 7 microseconds, because it calls
the generators themselves; ``torch.manual_seed``, which visits every device type, takes 89 microseconds.

A training step is always seeded in full. A sample is read *as if* it were: `mmtrain.data.sample_seeder` leaves out the
generators that a dataset does not use, under the rule that is written there.
"""

import random
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch

_MASK64 = (1 << 64) - 1
_MASK32 = (1 << 32) - 1

# Streams separate random numbers of different purposes at the same position.
STREAM_STEP = 1  # dropout and everything else that the training step draws in the main process
STREAM_SAMPLE = 2  # augmentation of one sample
STREAM_BATCH = 3  # augmentation, if seeded once per batch
STREAM_SHUFFLE = 4  # the order of an epoch
STREAM_BUILD = 5  # construction of the model
STREAM_VAL = 6  # validation and test


def mix(*numbers: int) -> int:
    """Fold integers into one unsigned 64-bit integer with the SplitMix64 finalizer (Steele et al., 2014)."""
    h = 0x9E3779B97F4A7C15
    for number in numbers:
        h = fold(h, number)
    return h


def fold(h: int, number: int) -> int:
    """Return ``mix(*numbers, number)`` from ``h = mix(*numbers)``, so that a loop mixes only what changes."""
    h = ((h ^ (number & _MASK64)) + 0x9E3779B97F4A7C15) & _MASK64
    h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & _MASK64
    return h ^ (h >> 31)


def seed_generators(value: int) -> None:
    """Seed the default generators of Python, numpy, torch and the current CUDA device with one 64-bit value."""
    seed_torch(value)
    seed_numpy(value)
    random.seed(value)


def seed_torch(value: int) -> None:
    """Seed the default generators of torch and the current CUDA device."""
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(value)


def seed_numpy(value: int) -> None:
    """Seed numpy's default generator, which takes 32 bits of the value."""
    np.random.seed(value & _MASK32)


def seed_step(seed: int, rank: int, iteration: int) -> None:
    """Seed the main process for one training iteration."""
    seed_generators(fold(_step_prefix(seed, rank), iteration))


@lru_cache(maxsize=4)
def _step_prefix(seed: int, rank: int) -> int:
    return mix(STREAM_STEP, seed, rank)


def draw_seed() -> int:
    """Draw a seed in [0, 2**31) from the system's entropy, for a run whose config has none."""
    return random.SystemRandom().randrange(1 << 31)


def set_deterministic(enabled: bool) -> None:
    """Make torch and cuDNN use deterministic algorithms; an operation without one then raises an error."""
    torch.backends.cudnn.deterministic = enabled
    if enabled:
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(enabled)


def capture() -> dict[str, Any]:
    """Return the states of all default generators as plain Python values and uint8 tensors."""
    algorithm, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    state: dict[str, Any] = {
        "python": {"version": version, "internal": list(internal), "gauss_next": gauss_next},
        "numpy": {
            "algorithm": str(algorithm),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: Mapping[str, Any]) -> None:
    """Restore what `capture` returned. The state of the device is ignored in a process without CUDA."""
    python, numpy_state = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["internal"]), python["gauss_next"]))
    keys = numpy_state["keys"].numpy().astype(np.uint32)
    np.random.set_state(
        (numpy_state["algorithm"], keys, numpy_state["position"], numpy_state["has_gauss"], numpy_state["gauss"])
    )
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
