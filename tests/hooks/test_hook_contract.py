from pathlib import Path

import pytest
from mmengine import hooks as theirs

import mmtrain.hooks as ours
from mmtrain.hooks import Hook
from mmtrain.registry import HOOKS

SAME_NAME = [name for name in ours.__all__ if name != "Hook" and hasattr(theirs, name)]


def test_every_hook_derives_from_ours_and_ours_from_mmengines():
    assert issubclass(Hook, theirs.Hook)
    for name in ours.__all__:
        assert issubclass(getattr(ours, name), Hook)


@pytest.mark.parametrize("name", SAME_NAME)
def test_priorities_are_mmengines(name):
    assert getattr(ours, name).priority == getattr(theirs, name).priority


@pytest.mark.parametrize("name", [name for name in ours.__all__ if name != "Hook"])
def test_every_hook_is_registered(name):
    assert HOOKS.get(name) is getattr(ours, name)


def test_no_hook_has_a_point_that_does_not_exist():
    points = {*Hook.stages}
    assert {"after_save_checkpoint", "on_exception"} < points
    for name in ours.__all__:
        for attribute in dir(getattr(ours, name)):
            if attribute.startswith(("before_", "after_")):
                assert attribute in points


def test_named_hooks_do_nothing():
    for name in ("ParamSchedulerHook", "IterTimerHook", "RuntimeInfoHook", "DistSamplerSeedHook"):
        assert getattr(ours, name)().get_triggered_stages() == []


def test_only_the_base_imports_mmengines_hooks():
    folder = Path(ours.__file__).parent
    users = [path.name for path in folder.glob("*.py") if "mmengine.hooks" in path.read_text().replace("``", "")]
    assert users == ["base.py"]
