import pytest
from mmengine import hooks as theirs

import mmtrain.hooks as ours
from mmtrain.hooks import Hook
from mmtrain.registry import HOOKS
from mmtrain.runner.hook_points import HookList

SAME_NAME = [name for name in ours.__all__ if name != "Hook" and hasattr(theirs, name)]
NEEDED = {"EarlyStoppingHook": {"monitor": "loss"}, "LedgerHook": {"ledger": None}}


def test_every_hook_derives_from_the_one_base():
    for name in ours.__all__:
        assert issubclass(getattr(ours, name), Hook)


@pytest.mark.parametrize("name", SAME_NAME)
def test_priorities_are_mmengines(name):
    assert getattr(ours, name).priority == getattr(theirs, name).priority


@pytest.mark.parametrize("name", [name for name in ours.__all__ if name != "Hook"])
def test_every_hook_is_registered(name):
    assert HOOKS.get(name) is getattr(ours, name)


def test_no_hook_has_a_point_that_does_not_exist():
    HookList([(name, getattr(ours, name)(**NEEDED.get(name, {}))) for name in ours.__all__ if name != "Hook"])


def test_named_hooks_do_nothing():
    for name in ("ParamSchedulerHook", "IterTimerHook", "RuntimeInfoHook", "DistSamplerSeedHook"):
        points = HookList([(name, getattr(ours, name)())]).points
        assert not any(points.values())
