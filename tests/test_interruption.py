"""A wait for data is left only where the run can be saved as it is."""

import os
import signal
import threading

import pytest

from mmtrain.data import TrainStream
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
