"""Positional seeding: every random number is a function of where the run stands, never of how it got there.

`mix` folds integers (seed, rank, iteration, ...) into one 64-bit seed; `seed_generators` puts it into the generators of
Python, numpy, torch and the current device. Seeding all of them takes about 9 microseconds, because the generators
themselves are called and not ``torch.manual_seed``, which visits every device type (89 microseconds).
"""

import random
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch

_MASK64 = (1 << 64) - 1
_MASK32 = (1 << 32) - 1

# Streams keep draws of different purposes apart though they stand at the same numbers.
STREAM_STEP = 1  # dropout and whatever else the training step draws in the main process
STREAM_SAMPLE = 2  # augmentation of one sample
STREAM_BATCH = 3  # augmentation seeded once a batch
STREAM_SHUFFLE = 4  # the order of an epoch
STREAM_BUILD = 5  # construction of the model
STREAM_VAL = 6  # validation and test


def mix(*numbers: int) -> int:
    """Fold integers into one well-mixed unsigned 64-bit integer (the SplitMix64 finaliser of Steele et al., 2014)."""
    h = 0x9E3779B97F4A7C15
    for number in numbers:
        h = fold(h, number)
    return h


def fold(h: int, number: int) -> int:
    """``mix(*numbers, number)`` from ``h = mix(*numbers)``: a loop keeps what does not change and folds in the rest."""
    h = ((h ^ (number & _MASK64)) + 0x9E3779B97F4A7C15) & _MASK64
    h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & _MASK64
    return h ^ (h >> 31)


def seed_generators(value: int) -> None:
    """Seed the default generators of Python, numpy, torch and the current CUDA device with one 64-bit value."""
    torch.default_generator.manual_seed(value)
    np.random.seed(value & _MASK32)
    random.seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(value)


def seed_step(seed: int, rank: int, iteration: int) -> None:
    """Seed the main process for one training iteration."""
    seed_generators(fold(_step_prefix(seed, rank), iteration))


@lru_cache(maxsize=4)
def _step_prefix(seed: int, rank: int) -> int:
    return mix(STREAM_STEP, seed, rank)


def draw_seed() -> int:
    """Draw a seed for a run that was given none, in [0, 2**31), from the system's entropy."""
    return random.SystemRandom().randrange(1 << 31)


def set_deterministic(enabled: bool) -> None:
    """Ask torch and cuDNN for deterministic algorithms; an operation that has none then raises."""
    torch.backends.cudnn.deterministic = enabled
    if enabled:
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(enabled)


def capture() -> dict[str, Any]:
    """Return the state of every default generator: plain Python values and uint8 tensors."""
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
    """Put back what `capture` returned; the device's state is left alone where this process has no such device."""
    python, numpy_state = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["internal"]), python["gauss_next"]))
    keys = numpy_state["keys"].numpy().astype(np.uint32)
    np.random.set_state(
        (numpy_state["algorithm"], keys, numpy_state["position"], numpy_state["has_gauss"], numpy_state["gauss"])
    )
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
