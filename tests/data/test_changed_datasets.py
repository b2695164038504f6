"""What the main process changes in a dataset takes effect at the next epoch."""

import functools

import numpy as np
import pytest
import torch
from _data_sets import Words
from torch.utils.data import DataLoader, get_worker_info

from mmtrain.data import EvalLoader, ForeignStream, IterableStream, TrainStream, build_train_stream
from mmtrain.data.workers.snapshot import Snapshot

PER_EPOCH = 5  # iterations


class Pipeline:
    def __init__(self, scale=1):
        self.scale = scale

    def __call__(self, index):
        return index * self.scale


class Staged:
    """A dataset as MMEngine's: a pipeline and attributes that hooks change."""

    def __init__(self, size=10):
        self.size = size
        self.pipeline = Pipeline()
        self.level = 0
        self.epoch = 0
        self.annotations = [{"id": index} for index in range(20_000)]

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        worker = get_worker_info()
        return {
            "value": self.pipeline(index),
            "level": self.level,
            "epoch": self.epoch,
            "noise": torch.rand((), dtype=torch.float64),
            "worker": -1 if worker is None else worker.seed,
        }

    def set_epoch(self, epoch):
        self.epoch = epoch


def stream(dataset=None, **options):
    return TrainStream(dataset or Staged(), 2, **{"seed": 3, "num_workers": 2} | options)


def bits(batch):
    return {key: value.tolist() for key, value in batch.data.items() if key != "worker"}


def epochs(read, before_epoch, count, start=0):
    """Take epochs; ``before_epoch`` is called as a hook's before_train_epoch."""
    batches = []
    for epoch in range(start, count):
        before_epoch(read, epoch)
        for batch in read:
            batches.append(bits(batch))
            if batch.epoch_end:
                break
    return batches


def set_level(read, epoch):
    read.dataset.level = epoch


def set_epoch(read, epoch):
    read.dataset.set_epoch(epoch)


def close_mosaic(read, epoch):
    if epoch >= 2:
        read.dataset.pipeline = Pipeline(scale=100)


def change_in_place(read, epoch):
    if epoch >= 1:
        read.dataset.pipeline.scale = 1000


def scaled_collate(factor, samples):
    batch = torch.utils.data.default_collate(samples)
    return batch | {"value": batch["value"] * factor}


def replace_collate(read, epoch):
    if epoch >= 1:
        read.collate_fn = functools.partial(scaled_collate, 7)


def mmdetection(read, epoch):
    """PipelineSwitchHook and YOLOXModeSwitchHook of mmdetection."""
    if epoch == 2:
        read.dataset.annotations[11] = {"id": -1}  # nobody would see this
        read.dataset.pipeline = Pipeline(scale=100)
        if hasattr(read, "persistent_workers") and read.persistent_workers is True:
            read._DataLoader__initialized = False
            read._iterator = None


HOOKS = [set_level, set_epoch, close_mosaic, change_in_place, replace_collate, mmdetection]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("persistent_workers", [None, False, True])
def test_a_change_takes_effect_at_the_next_epoch(hook, persistent_workers):
    reference = epochs(stream(num_workers=0), hook, 4)
    assert reference != epochs(stream(num_workers=0), lambda read, epoch: None, 4)
    read = stream(persistent_workers=persistent_workers)
    assert epochs(read, hook, 4) == reference
    read.close()


@pytest.mark.parametrize("hook", [set_level, close_mosaic])
@pytest.mark.parametrize("persistent_workers", [False, True])
@pytest.mark.parametrize("at", [3, 5, 7, 10, 13, 15])
def test_a_run_that_resumes_anywhere_reads_the_same(hook, persistent_workers, at):
    read = stream(persistent_workers=persistent_workers)
    whole = epochs(read, hook, 4)
    read.close()
    epoch, place = divmod(at, PER_EPOCH)
    resumed = stream(persistent_workers=persistent_workers)
    resumed.seek(epoch, place * 2)
    assert epochs(resumed, hook, 4, start=epoch) == whole[at:]
    resumed.close()


@pytest.mark.parametrize("persistent_workers", [False, True])
def test_a_change_in_the_middle_of_an_epoch_waits_for_the_next(persistent_workers):
    read = stream(persistent_workers=persistent_workers)
    levels = []
    for number in range(15):
        levels.append(set(next(read).data["level"].tolist()))
        if number == 7:
            read.dataset.level = 9
    read.close()
    assert levels == [{0}] * 10 + [{9}] * 5


def workers_of(read, batches):
    return [set(next(read).data["worker"].tolist()) for _ in range(batches)]


@pytest.mark.parametrize("idiom", ["_iterator", "_dataloader"])
def test_persistent_workers_live_on_until_something_changes_or_new_ones_are_asked_for(idiom):
    class Living(Staged):
        calls = 0

        def __getitem__(self, index):
            self.calls += 1
            return {"calls": self.calls}

    def most_calls(batches):
        return max(int(next(read).data["calls"].max()) for _ in range(batches))

    read = stream(Living(), persistent_workers=True)
    assert read.persistent_workers is True
    assert most_calls(50) >= 40
    if idiom == "_iterator":
        read._iterator = None
    else:
        read._dataloader._iterator = None
    assert most_calls(50) < 60
    read.close()
    assert stream().persistent_workers is False


class StagedWords(Words):
    level = 0

    def __iter__(self):
        for sample in super().__iter__():
            yield sample | {"level": self.level}


@pytest.mark.parametrize("persistent_workers", [None, True])
def test_an_iterable_dataset_gets_changes_and_keeps_its_place(persistent_workers):
    def made():
        return IterableStream(StagedWords(10), 2, seed=3, num_workers=2, persistent_workers=persistent_workers)

    whole = made()
    run, states = [], []
    for number in range(18):
        whole.dataset.level = number // 6
        states.append((whole.state_dict(), whole.dataset.level))
        run.append(bits(next(whole)))
    whole.close()
    assert [set(batch["level"]) for batch in run] == [{0}] * 6 + [{1}] * 6 + [{2}] * 6
    for start in (6, 12):
        state, level = states[start]
        resumed = made()
        resumed.dataset.level = level
        resumed.load_state_dict(state)
        resumed.seek(state["epoch"], state["offset"])
        assert [bits(next(resumed)) for _ in range(6)] == run[start : start + 6]
        resumed.close()


@pytest.mark.parametrize("persistent_workers", [None, True])
def test_a_validation_reads_the_dataset_as_it_is_at_its_start(persistent_workers):
    dataset = Staged()
    read = EvalLoader(dataset, 2, seed=3, num_workers=2, persistent_workers=persistent_workers)
    for level in range(3):
        dataset.level = level
        assert {value for data in read for value in data["level"].tolist()} == {level}
    read.close()


def test_a_short_epochs_wrapper_passes_changes_on():
    read = build_train_stream(dict(dataset=Staged(), batch_size=2, num_batch_per_epoch=2), seed=3)
    read.dataset.pipeline = Pipeline(scale=100)
    assert read.dataset.dataset.pipeline.scale == 100
    assert int(next(read).data["value"].max()) >= 100


def test_a_ready_made_loader_gets_the_idiom():
    loader = DataLoader(Staged(), batch_size=2, num_workers=1, persistent_workers=True)
    read = ForeignStream(loader, seed=3)
    assert read.persistent_workers is True
    levels = []
    for number in range(15):
        if number % 5 == 0:
            loader.dataset.level = number
            read._iterator = None
        levels.append(int(next(read).data["level"][0]))
    read.close()
    assert levels == [0] * 5 + [5] * 5 + [10] * 5


def test_the_dataset_itself_cannot_be_replaced():
    with pytest.raises(AttributeError, match="dataset"):
        stream().dataset = Staged()


# -- snapshots


def closure(level):
    return lambda index: index * level


class Slotted:
    __slots__ = ("level", "unset")

    def __init__(self, level):
        self.level = level


CHANGES = {
    "attribute": lambda one: setattr(one, "level", 3),
    "new attribute": lambda one: setattr(one, "fresh", 3),
    "deep": lambda one: setattr(one.pipeline, "scale", 9),
    "element": lambda one: one.steps.append(closure(3)),
    "closure": lambda one: one.steps.__setitem__(0, closure(5)),
    "partial": lambda one: setattr(one, "function", functools.partial(scaled_collate, 3)),
    "slot": lambda one: setattr(one.slotted, "level", 3),
    "tensor in place": lambda one: one.tensor.add_(1),
    "small array in place": lambda one: one.array.__setitem__(0, 5),
    "long list": lambda one: one.annotations.append(1),
    "long list replaced": lambda one: setattr(one, "annotations", [*one.annotations[:-1], {"id": 5}]),
    "method": lambda one: setattr(one, "read", one.slotted.__init__),
    "set": lambda one: one.skipped.add("mosaic"),
    "class": lambda one: setattr(one, "kind", Words),
}


def rich():
    one = Staged()
    one.steps = [closure(2), Pipeline(), str.lower]
    one.function = functools.partial(scaled_collate, 2)
    one.slotted = Slotted(1)
    one.tensor = torch.zeros(5000)
    one.array = np.zeros(10)
    one.big = np.zeros(100_000)
    one.read = one.pipeline.__call__
    one.skipped = {"mixup"}
    one.kind = Staged
    one.itself = one
    return one


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_snapshot_sees_what_a_hook_does(change):
    one = rich()
    before = Snapshot(one, None)
    assert before == Snapshot(one, None)
    change(one)
    assert before != Snapshot(one, None)
