"""Datasets and helpers that the tests of this folder share."""

import os
import random
from multiprocessing import get_context

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info


class Noisy:
    """Every sample draws from all three generators."""

    def __init__(self, size=23):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        noise = [float(torch.rand(())), float(np.random.rand()), random.random()]
        return {"index": index, "noise": torch.tensor(noise, dtype=torch.float64)}


class Counting:
    """Counts its reads over all processes and records which process read a sample."""

    def __init__(self, size=40):
        self.size = size
        self.reads = get_context("fork").Value("i", 0)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        with self.reads.get_lock():
            self.reads.value += 1
        return {"index": index, "pid": os.getpid()}


class Words(IterableDataset):
    """Numbers, sharded over workers, with noise; keeps its position."""

    def __init__(self, size=11):
        self.size = size
        self.at = 0

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        numbers = range(worker, self.size, workers)
        while self.at < len(numbers):
            self.at += 1
            yield {"index": numbers[self.at - 1], "noise": torch.rand((), dtype=torch.float64)}
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Usual(Words):
    """The pattern of most tutorials: a loaded position is used by the next `iter` only, and stays at the end."""

    start = 0

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        numbers = range(worker, self.size, workers)
        start, self.start = self.start, 0
        for self.at in range(start + 1, len(numbers) + 1):
            yield {"index": numbers[self.at - 1], "noise": torch.rand((), dtype=torch.float64)}

    def load_state_dict(self, state):
        self.start = self.at = state["at"]


class WithPasses(Usual):
    """Counts its passes, and shuffles by their number."""

    passes = 0

    def __iter__(self):
        for sample in super().__iter__():
            yield sample | {"index": sample["index"] + 1000 * self.passes}
        self.passes += 1

    def state_dict(self):
        return {"at": self.at, "passes": self.passes}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.passes = state["passes"]


class Remainder(Usual):
    """Its state at the end is that of a beginning."""

    def state_dict(self):
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        return {"at": self.at % len(range(worker, self.size, workers))}


class WithEpoch(Usual):
    """Uses a loaded position only in the epoch that it is of, as Hugging Face's datasets do."""

    epoch = 0
    loaded = None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        if self.loaded is not None and self.loaded["epoch"] == self.epoch:
            self.start = self.loaded["at"]
        self.loaded = None
        for sample in super().__iter__():
            yield sample | {"index": sample["index"] + 1000 * self.epoch}

    def state_dict(self):
        return {"at": self.at, "epoch": self.epoch}

    def load_state_dict(self, state):
        self.loaded = state


class PlainWords(IterableDataset):
    """The same without a position."""

    def __init__(self, size=11):
        self.size = size

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(worker, self.size, workers):
            yield {"index": index, "noise": torch.rand((), dtype=torch.float64)}


def take(stream, count):
    """Take batches as comparable values: sample indices, the bits of the noise, samples, epoch end."""
    return [plain(next(stream)) for _ in range(count)]


def plain(batch):
    data = batch.data
    if data is None:
        return (None, None, batch.samples, batch.epoch_end)
    noise = data["noise"].reshape(-1).tolist() if "noise" in data else None
    return (data["index"].tolist(), noise, batch.samples, batch.epoch_end)


def global_states():
    """The states of the global generators in a comparable form."""
    state = np.random.get_state()
    return (torch.get_rng_state().tolist(), state[1].tolist(), state[2], random.getstate())
