"""The order of the samples in one epoch, as a pure function of (size, seed, epoch)."""

from typing import Protocol

import numpy as np
import torch

from mmtrain.randomness import STREAM_SHUFFLE, mix

# Up to this size the permutation is stored (4 bytes per sample, at most 64 MiB, drawn in half a second). Above it,
# positions are computed on demand. Checkpoints rely on this limit: it decides the order of an epoch.
STORED_LIMIT = 1 << 24

_ROUNDS = 6  # even, so that the two halves end with the widths they started with
_CHUNK = 1024  # positions computed at a time, to spread the cost of a numpy call


class EpochOrder(Protocol):
    """The order of one epoch: `take` returns the sample indices at positions start <= p < stop."""

    def take(self, start: int, stop: int) -> list[int]: ...


class SequentialOrder:
    """0, 1, 2, ..."""

    def take(self, start: int, stop: int) -> list[int]:
        return list(range(start, stop))


class StoredOrder:
    """A permutation drawn by ``torch.randperm`` from a separate generator."""

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        generator = torch.Generator()
        generator.manual_seed(mix(STREAM_SHUFFLE, seed, epoch))
        self._order = torch.randperm(size, generator=generator, dtype=torch.int32).numpy()

    def take(self, start: int, stop: int) -> list[int]:
        return self._order[start:stop].tolist()  # type: ignore[no-any-return]


class ComputedOrder:
    """A pseudo-random permutation of ``range(size)`` that is computed position by position and stores nothing.

    A Feistel network of six rounds (Luby and Rackoff, 1988) permutes the numbers of the bit length of ``size - 1``;
    a result outside the range is sent through again until it is inside ("cycle walking", Black and Rogaway, 2002), on
    average less than twice. The two halves may differ by one bit, and change sides after every round.
    """

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        self._size = size
        bits = max(2, (size - 1).bit_length())
        self._widths = (bits // 2, bits - bits // 2)
        self._keys = [np.uint64(mix(STREAM_SHUFFLE, seed, epoch, round_)) for round_ in range(_ROUNDS)]
        self._last_start = 0
        self._ahead: dict[tuple[int, int], list[int]] = {}

    def take(self, start: int, stop: int) -> list[int]:
        stop = min(stop, self._size)
        if start >= stop:
            return []
        if (start, stop) not in self._ahead:
            self._compute_ahead(start, stop, step=start - self._last_start)
        self._last_start = start
        return self._ahead[start, stop]

    def _compute_ahead(self, start: int, stop: int, *, step: int) -> None:
        """Compute these positions, and those of the next calls if they continue in the same steps."""
        count, rows = stop - start, 1
        if step >= count:  # one of several ranks takes part of every step
            rows = max(1, min(_CHUNK // count, (self._size - stop) // step + 1))
        starts = start + step * np.arange(rows, dtype=np.int64)
        positions = (starts[:, None] + np.arange(count)).astype(np.uint64)
        values = self._permute(positions.ravel()).reshape(rows, count).tolist()
        self._ahead = {(first, first + count): row for first, row in zip(starts.tolist(), values, strict=True)}

    def _permute(self, positions: np.ndarray) -> np.ndarray:
        values = self._network(positions)
        while (outside := np.flatnonzero(values >= np.uint64(self._size))).size:
            values[outside] = self._network(values[outside])
        return values

    def _network(self, values: np.ndarray) -> np.ndarray:
        left_bits, right_bits = self._widths
        for key in self._keys:
            right = values & np.uint64((1 << right_bits) - 1)
            left = values >> np.uint64(right_bits)
            left ^= scramble(right ^ key) >> np.uint64(64 - left_bits)
            values = (right << np.uint64(left_bits)) | left
            left_bits, right_bits = right_bits, left_bits
        return values


def scramble(x: np.ndarray) -> np.ndarray:
    """Scramble every number with the SplitMix64 finalizer (Steele et al., 2014); uint64 arithmetic wraps around."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def epoch_order(size: int, seed: int, epoch: int, *, shuffle: bool, stored_limit: int = STORED_LIMIT) -> EpochOrder:
    """Return the order of epoch ``epoch`` over ``size`` samples.

    No global generator is used. Above ``stored_limit`` samples the permutation takes no memory.
    """
    if not shuffle:
        return SequentialOrder()
    if size <= stored_limit:
        return StoredOrder(size, seed, epoch)
    return ComputedOrder(size, seed, epoch)
