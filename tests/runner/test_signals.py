"""Signals are recorded once, handlers are restored, and a second signal exits at once."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from mmtrain.runner.signals import Signals, starting


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_is_noted_and_gives_its_status(number, status):
    before = signal.getsignal(number)
    with Signals() as signals:
        assert signals.exit_status == 0
        os.kill(os.getpid(), number)
        assert signals.received == number
        assert signals.name == signal.Signals(number).name
    assert signals.exit_status == status
    assert signal.getsignal(number) is before


def test_outside_the_main_thread_signals_are_not_handled():
    entered = []

    def body():
        with Signals() as signals:
            entered.append(signals.received)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert entered == [0]


def test_a_second_signal_leaves_at_once():
    code = (
        "import os, signal; from mmtrain.runner.signals import Signals\n"
        "with Signals():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM); print('still here')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 128 + signal.SIGTERM
    assert result.stdout == ""


def test_a_forked_worker_survives_the_first_signal():
    with Signals() as signals:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os.write(write, b"alive")
            os.kill(os.getpid(), signal.SIGTERM)
            os.write(write, b"too long")
            os._exit(0)
        os.close(write)
        _, status = os.waitpid(pid, 0)
        assert os.read(read, 100) == b"alive"
        assert os.waitstatus_to_exitcode(status) == 1
        assert signals.received == 0
        os.close(read)


def test_a_child_of_a_starting_run_is_ended_by_a_signal():
    with starting():
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
