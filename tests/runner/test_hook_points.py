"""Which hooks run at which point, in which order, and what is refused."""

import pytest
from mmengine.hooks import Hook as MMEngineHook

from mmtrain.errors import ConfigError
from mmtrain.hooks import Hook
from mmtrain.runner.hook_points import POINTS, HookList, priority_of


class Recorder(Hook):
    def __init__(self, log, name="recorder", priority="NORMAL"):
        self.log, self.name, self.priority = log, name, priority

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.log.append((self.name, batch_idx))


def test_every_point_of_mmengine_is_there():
    assert set(MMEngineHook.stages) <= set(POINTS)


def test_an_unused_point_has_nothing_to_call():
    hooks = HookList([("recorder", Recorder([]))])
    assert [point for point in POINTS if hooks.points[point]] == ["after_train_iter"]


def test_hooks_run_by_priority_and_equal_ones_in_the_order_given():
    log = []
    hooks = HookList(
        [
            ("low", Recorder(log, "low", "LOW")),
            ("first", Recorder(log, "first")),
            ("second", Recorder(log, "second")),
            ("numeric", Recorder(log, "numeric", 5)),
        ]
    )
    hooks.call("after_train_iter", None, batch_idx=0)
    assert [name for name, _ in log] == ["numeric", "first", "second", "low"]


@pytest.mark.parametrize("base", [MMEngineHook, Hook])
def test_a_generic_method_serves_training_validation_and_test(base):
    log = []

    class Old(base):
        def _after_iter(self, runner, batch_idx, data_batch=None, outputs=None, mode="train"):
            log.append((mode, batch_idx))

    hooks = HookList([("old", Old())])
    hooks.call("after_train_iter", None, batch_idx=3)
    hooks.call("after_val_iter", None, batch_idx=4)
    assert log == [("train", 3), ("val", 4)]
    assert not hooks.points["before_train_iter"]


def test_a_misspelt_point_is_refused_with_the_near_name():
    class Wrong(Hook):
        def after_train_itr(self, runner):
            raise AssertionError("never runs")

    with pytest.raises(ConfigError, match=r"'after_train_itr'.*did you mean 'after_train_iter'"):
        HookList([("wrong", Wrong())])


def test_an_unknown_priority_is_refused():
    with pytest.raises(ConfigError, match="SOMETIMES"):
        priority_of(Recorder([], priority="SOMETIMES"))


def test_two_hooks_of_one_name_have_two_names():
    hooks = HookList([("EMAHook", Recorder([])), ("EMAHook", Recorder([]))])
    assert list(hooks.named) == ["EMAHook", "EMAHook_2"]


def test_a_method_set_on_the_instance_counts():
    hook = Hook()
    seen = []
    hook.before_run = seen.append
    HookList([("hook", hook)]).call("before_run", "runner")
    assert seen == ["runner"]
