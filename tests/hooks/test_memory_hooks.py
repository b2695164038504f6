import pytest
import torch
from torch import nn

from mmtrain.hooks import EmptyCacheHook, SyncBuffersHook


@pytest.mark.parametrize("options", [{}, {"before_epoch": True, "after_epoch": False, "after_iter": True}])
def test_the_cache_is_emptied_on_request(make_runner, monkeypatch, options):
    emptied = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(point))
    runner, hook = make_runner(), EmptyCacheHook(**options)
    for point in ("before_train_epoch", "before_val_epoch", "after_train_epoch", "after_val_epoch"):
        getattr(hook, point)(runner)
    for point in ("before_train_iter", "after_train_iter", "after_val_iter"):
        getattr(hook, point)(runner, batch_idx=0)
    assert emptied == (
        ["before_train_epoch", "before_val_epoch", "after_train_iter", "after_val_iter"]
        if options
        else ["after_train_epoch", "after_val_epoch"]
    )


def test_buffers_are_synchronised_once_per_position(make_runner, monkeypatch):
    calls = []
    monkeypatch.setattr("mmtrain.dist.world_size", lambda: 2)
    monkeypatch.setattr("mmtrain.hooks.memory.average_buffers", calls.append)
    runner, hook = make_runner(), SyncBuffersHook()
    for _ in range(5):
        runner.step(hook)  # the fifth ends an epoch
    hook.before_val_epoch(runner)
    assert len(calls) == 1
    runner.step(hook)
    hook.before_val_epoch(runner)
    assert len(calls) == 2


def test_one_process_does_not_change_its_buffers(make_runner, monkeypatch):
    model = nn.BatchNorm1d(3)
    model(torch.randn(4, 3))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    monkeypatch.setattr("mmtrain.hooks.memory.average_buffers", None)  # to call it would be an error
    SyncBuffersHook().after_train_epoch(make_runner(model=model))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
