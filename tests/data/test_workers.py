"""The worker processes: how they start, what they survive, how they end."""

import faulthandler
import os
import random
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from contextlib import suppress

import pytest
import torch
from _data_sets import Counting, Noisy, plain, take
from torch.utils.data import get_worker_info

from mmtrain.data import TrainStream
from mmtrain.data.workers import group, pool
from mmtrain.errors import RunError

linux = pytest.mark.skipif(sys.platform != "linux", reason="pidfd is Linux's")
LIMIT = 120  # seconds after which something hangs


@pytest.fixture(autouse=True)
def _a_hang_ends():
    """A hang in one of these tests must not hold up all others."""
    faulthandler.dump_traceback_later(2 * LIMIT, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def accelerator(monkeypatch):
    """A pretended accelerator: the thread that pins memory runs, and marks what it would pin."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    monkeypatch.setattr(torch.accelerator, "set_device_index", devices.append)
    for module in (pool, group):
        monkeypatch.setattr(module, "pin_memory", lambda data: ("pinned", data))
    devices.clear()


devices = []  # set in the thread


def stream(dataset, **options):
    return TrainStream(dataset, 2, **{"seed": 1, "num_workers": 2, "shuffle": False} | options)


def pids_of(read, batches=4):
    return {pid for _ in range(batches) for pid in next(read).data["pid"].tolist()}


def ended(descriptors):
    """Wait until the processes behind pidfds have ended; return whether they did."""
    waiting = set(descriptors)
    poller = select.poll()
    for descriptor in waiting:
        poller.register(descriptor, select.POLLIN)
    while waiting:
        ready = poller.poll(LIMIT * 1000)
        if not ready:
            return False
        for descriptor, _ in ready:
            poller.unregister(descriptor)
            waiting.discard(descriptor)
    return True


class Deadly(Noisy):
    """Kills its worker at index 0, or lets it exit."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def __getitem__(self, index):
        if index == 0:
            self.how()
        return super().__getitem__(index)


def test_a_worker_that_exits_while_the_main_process_waits_is_reported():
    read = stream(Deadly(lambda: os._exit(3)), num_workers=1)
    with pytest.raises(RunError, match=r"train_dataloader\.num_workers: .* pid \d+ exited with status 3\. .*memory"):
        take(read, 5)
    read.close()


@pytest.mark.parametrize("kills", range(2))
def test_a_worker_that_is_killed_between_batches_is_reported(kills):
    read = stream(Counting(100_000), num_workers=2)
    os.kill(next(read).data["pid"][0].item(), signal.SIGKILL)
    with pytest.raises(RunError, match="SIGKILL"):
        take(read, 1000)
    read.close()


@linux
def test_a_dead_worker_is_reported_when_a_batch_is_taken_and_nowhere_else():
    read = stream(Counting(100_000), num_workers=2)
    pid = next(read).data["pid"][0].item()
    descriptor = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert ended([descriptor])
    assert sum(range(100_000)) > 0  # a SIGCHLD handler as torch's would raise in here
    with pytest.raises(RunError, match="SIGKILL"):
        take(read, 1000)
    read.close()


def die_in_the_middle_of_a_message():
    """The rest of the message never comes."""
    send = socket.socket.send

    def send_most(end, data):
        send(end, bytes(data)[:-1])
        os.kill(os.getpid(), signal.SIGKILL)

    socket.socket.send = send_most


@linux
@pytest.mark.parametrize("pinned", [False, True])
def test_a_worker_that_is_killed_in_the_middle_of_a_message_is_reported(accelerator, pinned):
    read = stream(Deadly(die_in_the_middle_of_a_message), num_workers=2, pin_memory=pinned)
    with pytest.raises(RunError, match="SIGKILL"):
        take(read, 5)
    read.close()


def kill_and_close(cycles):
    """Start workers, kill one after a random time, take batches until that is reported or not, and close."""
    choice = random.Random(1)
    for cycle in range(cycles):
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        read = stream(Counting(100_000), num_workers=3)
        descriptors = [os.pidfd_open(pid) for pid in pids_of(read, 3)]
        take(read, choice.randrange(5))
        killer = threading.Timer(choice.random() * 0.005, kill, [choice.choice(descriptors)])
        killer.start()
        if cycle % 3:
            with pytest.raises(RunError, match="SIGKILL"):
                take(read, 100_000)
        read.close()
        killer.join()
        assert ended(descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def kill(descriptor):
    with suppress(ProcessLookupError):  # it has ended
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)


@linux
def test_closing_never_waits_for_a_killed_worker():
    kill_and_close(cycles=12)


@linux
@pytest.mark.slow
def test_closing_never_waits_for_a_killed_worker_in_600_cycles():
    kill_and_close(cycles=600)


def test_a_late_batch_is_reported():
    never = torch.multiprocessing.get_context("fork").Event()
    read = stream(Deadly(lambda: never.wait(LIMIT)), num_workers=1, timeout=0.2)
    with pytest.raises(RunError, match=r"train_dataloader\.timeout"):
        take(read, 5)
    never.set()
    read.close()


def test_a_batch_that_cannot_be_sent_is_an_error_and_not_a_hang():
    read = stream(Noisy(), collate_fn=lambda samples: [(sample, lambda: 1) for sample in samples])
    with pytest.raises(RunError, match="cannot be sent"):
        next(read)
    read.close()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("wanted", "pinned"), [(None, False), (True, True), (False, False)])
def test_memory_is_pinned_on_request_with_an_accelerator(accelerator, monkeypatch, num_workers, wanted, pinned):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    read = stream(Noisy(), num_workers=num_workers, pin_memory=wanted)
    batches = [next(read).data for _ in range(30)]
    read.close()
    assert [isinstance(data, tuple) for data in batches] == [pinned] * 30
    assert set(devices) == ({3} if num_workers and pinned else set())  # once for each epoch, in the thread
    assert [data[1]["index"][0] if pinned else data["index"][0] for data in batches[:12]] == list(range(0, 23, 2))


def test_a_late_batch_is_reported_where_memory_is_pinned(accelerator):
    never = torch.multiprocessing.get_context("fork").Event()
    read = stream(Deadly(lambda: never.wait(LIMIT)), num_workers=1, timeout=0.2, pin_memory=True)
    with pytest.raises(RunError, match=r"train_dataloader\.timeout"):
        take(read, 5)
    never.set()
    read.close()


def test_more_workers_than_processors_is_reported():
    assert "4096 workers" in stream(Noisy(), num_workers=4096).notices[0]


@linux
def test_workers_survive_the_signals_that_stop_a_run_and_end_at_close():
    read = stream(Counting(100))
    pids = pids_of(read)
    descriptors = [os.pidfd_open(pid) for pid in pids]
    for pid in pids:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, number)
    assert pids_of(read, 12) == pids
    read.close()
    assert ended(descriptors)


@linux
@pytest.mark.parametrize(
    ("end", "starter"), [("kill", "main thread"), ("exit", "main thread"), ("kill", "other thread")]
)
def test_workers_end_with_the_main_process(end, starter):
    script = textwrap.dedent(
        """
        import os, sys, threading, numpy as np
        from mmtrain.data import TrainStream
        class Big:
            def __len__(self): return 1000
            def __getitem__(self, index): return os.getpid(), np.zeros(100_000)  # more than a pipe holds
        read = TrainStream(Big(), 2, num_workers=2, seed=1, collate_fn=lambda samples: samples)
        def report(): print(*{pid for _ in range(4) for pid, _ in next(read).data}, flush=True)
        if sys.argv[1] == "main thread":
            report()
        else:
            thread = threading.Thread(target=report)
            thread.start()
            thread.join()
        sys.stdin.readline()
        """
    )
    command = [sys.executable, "-c", script, starter]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 2
        descriptors = [os.pidfd_open(pid) for pid in pids]
        if end == "kill":
            process.kill()
        else:
            process.stdin.close()
        assert ended(descriptors)
        assert process.wait(LIMIT) == (-signal.SIGKILL if end == "kill" else 0)


def test_a_stream_that_is_started_from_a_thread_outlives_it():
    read = stream(Counting(100))
    seen = []
    starter = threading.Thread(target=lambda: seen.extend(pids_of(read)))
    starter.start()
    starter.join()
    assert pids_of(read, 12) == set(seen)
    read.close()


class ShowsWorker(Noisy):
    """Returns what the user's code sees of its worker."""

    def __getitem__(self, index):
        info = get_worker_info()
        return {
            "index": index,
            "started": self.started,
            "same": info.dataset is self,
            "threads": torch.get_num_threads(),
        }


def mark(worker_id):
    get_worker_info().dataset.started = worker_id + 10


def test_worker_init_fn_gets_the_users_dataset():
    read = stream(ShowsWorker(), worker_init_fn=mark)
    batches = [next(read).data for _ in range(2)]
    read.close()
    assert [batch["started"].tolist() for batch in batches] == [[10, 10], [11, 11]]
    assert all(batch["same"].all() and (batch["threads"] == 1).all() for batch in batches)


def test_a_failing_worker_init_fn_is_named():
    def fail(worker_id):
        raise OSError("no disk")

    read = stream(Noisy(), worker_init_fn=fail)
    with pytest.raises(RunError, match=r"train_dataloader\.worker_init_fn.*OSError: no disk"):
        next(read)
    read.close()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_ways_to_start_workers(method):
    read = stream(Noisy(), multiprocessing_context=method, shuffle=True)
    run = take(read, 5)
    read.close()
    assert run == take(stream(Noisy(), num_workers=0, shuffle=True), 5)


def test_a_worker_exits_whose_main_process_ended_before_it_started():
    """The main process was killed while a fork server started the worker: nothing else would ever end it."""
    code = (
        "import subprocess, sys\n"
        "from mmtrain.data.workers.worker import _die_with_parent\n"
        "gone = subprocess.Popen([sys.executable, '-c', ''])\n"
        "gone.wait()\n"
        "_die_with_parent(gone.pid)\n"
        "print('still there')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr


def test_a_process_ends_whose_second_worker_could_not_be_started():
    script = textwrap.dedent(
        """
        import os
        from mmtrain.data import TrainStream
        fork, calls = os.fork, []
        def fork_once():
            calls.append(1)
            if len(calls) > 1: raise OSError(11, "Resource temporarily unavailable")
            return fork()
        os.fork = fork_once
        class Zeros:
            def __len__(self): return 1000
            def __getitem__(self, index): return 0
        try: next(TrainStream(Zeros(), 2, num_workers=2, seed=1))
        except OSError as error: kept = error  # and with it the frames, and in them the first worker
        print("failed", flush=True)
        """
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    assert (done.returncode, done.stdout) == (0, "failed\n"), done.stderr


@pytest.mark.parametrize("num_workers", [0, 2])
def test_new_workers_after_close_continue_with_the_next_batch_and_the_dataset_as_it_is_now(num_workers):
    class Growing(Noisy):
        level = 0

        def __getitem__(self, index):
            return super().__getitem__(index) | {"level": self.level}

    expected = take(stream(Growing(), shuffle=True, num_workers=0), 30)
    dataset = Growing()
    read = stream(dataset, shuffle=True, num_workers=num_workers)
    batches = []
    for level, count in enumerate([5, 7, 18]):  # in the middle of epochs and at an edge: an epoch has 12 iterations
        dataset.level = level
        parts = [next(read) for _ in range(count)]
        assert {value for part in parts for value in part.data["level"].tolist()} == {level}
        batches += [plain(part) for part in parts]
        read.close()
    assert batches == expected


def no_room(samples):
    """What torch raises where default_collate cannot get shared memory."""
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_7_1_0>: No space left on device (28)")


def test_full_shared_memory_is_not_blamed_on_collate_fn():
    read = stream(Noisy(), collate_fn=no_room, prefetch_factor=3)
    message = (
        r"train_dataloader: /dev/shm.* has no room .*batches of 2 samples.*up to 6 .*num_workers=2 x "
        r"prefetch_factor=3.*--shm-size.*batch_size"
    )
    with pytest.raises(RunError, match=message) as error:
        next(read)
    read.close()
    assert "collate_fn" not in str(error.value)


def test_in_the_main_process_the_same_error_is_one_of_collate_fn():
    with pytest.raises(RunError, match=r"collate_fn: no_room raised RuntimeError"):
        next(stream(Noisy(), collate_fn=no_room, num_workers=0))


def in_a_small_place(prefix, limit):
    """Read many tensors of 240 kB in a process with a small limit; return what it reports."""
    script = textwrap.dedent(
        """
        import torch
        from mmtrain.data import TrainStream
        class Big:
            def __len__(self): return 1000
            def __getitem__(self, index): return torch.ones(60_000)
        read = TrainStream(Big(), 4, seed=1, num_workers=2, collate_fn=lambda samples: samples)
        try: kept = [next(read).data for _ in range(30)]
        except Exception as error: print(type(error).__name__, error)
        read.close()
        """
    )
    shell = f'{limit} && exec "$0" -c "$1"'
    command = [*prefix, "sh", "-c", shell, sys.executable, script]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT).stdout


def test_too_many_open_files_are_named():
    found = in_a_small_place([], "ulimit -n 40")
    assert found.startswith("RunError train_dataloader.num_workers: too many open files")


@linux
def test_a_full_dev_shm_is_named_with_its_size():
    mount = "mount -t tmpfs -o size=3m tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small /dev/shm")
    found = in_a_small_place(["unshare", "-m"], mount)
    assert found.startswith("RunError train_dataloader: /dev/shm (3 MB, 0 MB free) has no room")
