"""A wait for data is left only where the run can be saved as it is."""

import os
import signal
import threading

import pytest
import torch
from torch.utils.data import IterableDataset

from mmtrain.data import IterableStream, TrainStream
from mmtrain.interruption import Interrupted, wait
from mmtrain.runner.signals import Signals


@pytest.fixture(autouse=True)
def _clean():
    yield
    wait.at_save_point = wait.waiting = wait.requested = False


class SignalsItself:
    """A sample that gets a signal while it is read, and would take a minute more."""

    def __init__(self, seconds=60):
        self.seconds = seconds

    def __len__(self):
        return 10

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(self.seconds)
        return index


def test_a_wait_at_a_save_point_is_left_at_once():
    read = TrainStream(SignalsItself(), 2, seed=1)
    wait.at_save_point = True
    with Signals() as signals, pytest.raises(Interrupted):
        next(read)
    assert signals.received == signal.SIGTERM
    assert not wait.waiting
    assert not wait.requested


def test_elsewhere_the_batch_is_read_to_its_end():
    read = TrainStream(SignalsItself(seconds=0), 1, seed=1)
    with Signals() as signals:
        assert next(read).samples == 1
    assert signals.received == signal.SIGTERM


def test_a_signal_before_the_wait_is_not_forgotten():
    read = TrainStream(list(range(10)), 2, seed=1, num_workers=1)
    wait.at_save_point = True
    with Signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            next(read)
    read.close()


def test_a_signal_is_announced_at_once():
    said, heard = [], threading.Event()

    def announce(sentence):
        said.append(sentence)
        heard.set()

    with Signals(announce=announce):
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard.wait(60)
    assert said == ["SIGUSR1 received: saving after this update and leaving; a second signal leaves at once"]


class Interrupting(IterableDataset):
    """Keeps its position; the sample ``at`` sends a signal while it is read, once."""

    def __init__(self, at):
        self.at, self.start, self.read = at, 0, 0

    def __iter__(self):
        start, self.start = self.start, 0
        for number in range(start, 12):
            if number == self.at:
                self.at = None
                os.kill(os.getpid(), signal.SIGTERM)
            self.read = number + 1
            yield torch.tensor(number) + torch.rand(())

    def state_dict(self):
        return {"read": self.read}

    def load_state_dict(self, state):
        self.start = self.read = state["read"]


def take(read, count):
    return [next(read).data.tolist() for _ in range(count)]


@pytest.mark.parametrize("at", range(12))
def test_the_state_of_an_iterable_dataset_is_that_of_the_last_batch_that_was_taken(at):
    """Also when the interrupted read was the one that looks ahead."""
    whole = take(IterableStream(Interrupting(None), 3, seed=1), 9)
    read = IterableStream(Interrupting(at), 3, seed=1)
    taken = []
    wait.at_save_point = True
    with Signals(), pytest.raises(Interrupted):
        taken.extend(iter(read))
    wait.at_save_point = False
    position = (0, 3 * len(taken))
    assert len(taken) == max(0, at // 3 - 1)  # the batch before was read, and not taken yet
    resumed = IterableStream(Interrupting(None), 3, seed=1)
    resumed.load_state_dict(read.state_dict())
    assert resumed.seek(*position) == position
    assert [batch.data.tolist() for batch in taken] + take(resumed, 9 - len(taken)) == whole
