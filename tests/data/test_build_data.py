"""From a config to the objects of the data."""

from typing import ClassVar

import pytest
import torch
from _data_sets import Noisy, PlainWords, Words, take
from mmengine.config import ConfigDict
from mmengine.dataset import BaseDataset, worker_init_fn
from torch.utils.data import DataLoader, get_worker_info

from mmtrain.data import (
    EvalLoader,
    ForeignStream,
    IterableEvalLoader,
    IterableStream,
    TrainStream,
    build_eval_loader,
    build_train_stream,
)
from mmtrain.errors import ConfigError


def test_a_dict_builds_the_dataset_and_the_stream():
    cfg = ConfigDict(
        dataset=dict(type=Noisy, size=10),
        batch_size=4,
        num_workers=2,
        persistent_workers=True,
        pin_memory=True,
        sampler=dict(type="InfiniteSampler", shuffle=True),
        batch_sampler=None,
        collate_fn=dict(type="default_collate"),
        drop_last=True,
    )
    before = cfg.to_dict()
    read = build_train_stream(cfg, seed=5)
    assert isinstance(read, TrainStream)
    assert isinstance(read.dataset, Noisy)
    assert take(read, 5) == take(TrainStream(Noisy(10), 4, seed=5, drop_last=True), 5)
    assert cfg.to_dict() == before
    read.close()


def test_kinds():
    assert isinstance(build_train_stream(dict(dataset=Words(), batch_size=2), seed=1), IterableStream)
    ready = build_train_stream(DataLoader(Noisy(4)), seed=1)
    assert isinstance(ready, ForeignStream)
    assert build_train_stream(ready, seed=1) is ready
    assert isinstance(build_eval_loader(dict(dataset=Noisy(4), batch_size=2), seed=1), EvalLoader)
    assert isinstance(build_eval_loader(dict(dataset=PlainWords(), batch_size=2), seed=1), IterableEvalLoader)
    batches = [1, 2]
    assert build_eval_loader(batches, seed=1) is batches


class Lazy(BaseDataset):
    METAINFO: ClassVar = dict(classes=("a",))

    def load_data_list(self):
        return [dict(value=value) for value in range(5)]


def test_an_mmengine_dataset_is_read_before_workers_start():
    cfg = dict(dataset=dict(type=Lazy, lazy_init=True), batch_size=2, num_batch_per_epoch=1, shuffle=False)
    read = build_train_stream(cfg, seed=1)
    assert read.dataset._fully_initialized
    assert len(read) == 1
    assert read.dataset.metainfo == dict(classes=("a",))
    assert next(read).data["value"].tolist() == [0, 1]


class ReportsStartMethod(Noisy):
    def __getitem__(self, index):
        return torch.tensor(self.started)


def note_start(worker_id, num_workers, seed, offset):
    get_worker_info().dataset.started = [worker_id, num_workers, seed, offset]


def test_worker_init_fn_gets_the_same_arguments_as_in_mmengine():
    cfg = dict(
        dataset=ReportsStartMethod(4), batch_size=1, num_workers=1, worker_init_fn=dict(type=note_start, offset=9)
    )
    read = build_train_stream(cfg, seed=5)
    assert next(read).data.tolist() == [[0, 1, 5, 9]]
    read.close()
    cfg["worker_init_fn"] = dict(type=worker_init_fn)
    cfg["dataset"] = Noisy(4)
    read = build_train_stream(cfg, seed=5)
    assert take(read, 4) == take(TrainStream(Noisy(4), 1, seed=5), 4)
    read.close()


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (dict(batch_size=2), ["train_dataloader.dataset", "missing"]),
        (dict(dataset=Noisy(4)), ["train_dataloader.batch_size", "missing"]),
        (dict(dataset=Noisy(4), batch_sise=2), ["train_dataloader.batch_sise", "'batch_size'"]),
        (dict(dataset=Noisy(4), batch_size=2, batch_sampler=dict(type="X")), ["train_dataloader.batch_sampler"]),
        (dict(dataset=dict(type="NoSuchDataset"), batch_size=2), ["train_dataloader.dataset.type", "NoSuchDataset"]),
        (dict(dataset=dict(type=Noisy, sise=2), batch_size=2), ["train_dataloader.dataset.sise", "'size'"]),
        (dict(dataset=Words(), batch_size=2, shuffle=True), ["train_dataloader.shuffle", "Words"]),
        (dict(dataset=Noisy(4), batch_size=8, drop_last=True), ["train_dataloader.batch_size", "has 4"]),
        (3, ["train_dataloader", "3"]),
        ("loader", ["train_dataloader", "'loader'"]),
    ],
)
def test_wrong_configs_are_refused(cfg, words):
    with pytest.raises(ConfigError) as caught:
        build_train_stream(cfg, seed=1)
    for word in words:
        assert word in str(caught.value)
