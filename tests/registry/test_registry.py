"""The registries: how a name or class is found, how an object is built, and how each mistake is reported."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from mmengine import registry as mmengine_registry
from mmengine.config.lazy import LazyObject
from mmengine.registry import DefaultScope
from mmengine.utils import ManagerMixin

from mmtrain.errors import ConfigError
from mmtrain.registry import (
    DATASETS,
    HOOKS,
    METRICS,
    MODELS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    REGISTRIES,
    TASK_UTILS,
    VISUALIZERS,
    build,
    resolve,
)
from mmtrain.registry.arguments import arguments_of, check_arguments

# mmtrain.hooks imports MMEngine's base class, and with it a module that torch finds old.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@pytest.fixture
def registered():
    """Registers classes for one test and removes them again."""
    done = []

    def register(registry, cls, **options):
        registry.register_module(module=cls, **options)
        done.append((registry, options.get("name") or cls.__name__))
        return cls

    yield register
    for registry, name in done:
        registry.module_dict.pop(name, None)


class Thing:
    def __init__(self, size, colour="red"):
        self.size, self.colour = size, colour


def error(function, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


# -- resolve


def test_every_root_of_mmengine_has_a_child_of_scope_mmtrain():
    roots = {n: v for n, v in vars(mmengine_registry).items() if isinstance(v, mmengine_registry.Registry)}
    assert set(REGISTRIES) == set(roots)
    for name, root in roots.items():
        assert REGISTRIES[name].parent is root
        assert REGISTRIES[name].scope == "mmtrain"


def test_a_class_registered_in_either_registry_is_found(registered):
    ours = registered(TASK_UTILS, type("OurTool", (), {}))
    theirs = registered(mmengine_registry.TASK_UTILS, type("TheirTool", (), {}))
    assert resolve(TASK_UTILS, "OurTool", path="x") is ours
    assert resolve(TASK_UTILS, "mmtrain.OurTool", path="x") is ours
    assert resolve(TASK_UTILS, "TheirTool", path="x") is theirs
    assert resolve(TASK_UTILS, "mmengine.TheirTool", path="x") is theirs


def test_ours_comes_first_and_replaces_mmengines_class_of_the_same_name(registered):
    from mmengine.dataset import ConcatDataset

    assert resolve(DATASETS, "ConcatDataset", path="x") is ConcatDataset
    ours = registered(DATASETS, type("ConcatDataset", (), {}))
    for form in ("ConcatDataset", "mmengine.ConcatDataset", "mmengine.dataset.ConcatDataset", ConcatDataset):
        assert resolve(DATASETS, form, path="x") is ours
    assert resolve(DATASETS, LazyObject("mmengine.dataset", "ConcatDataset"), path="x") is ours


def test_a_class_of_xtuner_is_replaced_without_xtuner_being_installed(registered):
    ours = registered(TASK_UTILS, type("EvaluateThing", (), {}))
    assert resolve(TASK_UTILS, LazyObject("xtuner.engine.hooks", "EvaluateThing"), path="x") is ours
    message = error(resolve, TASK_UTILS, LazyObject("xtuner.engine", "Other", "c.py, line 3"), path="t")
    assert "xtuner" in message
    assert "c.py, line 3" in message


def test_a_users_class_and_a_function_are_taken_as_they_are(registered):
    registered(TASK_UTILS, type("Thing", (), {}))
    assert resolve(TASK_UTILS, Thing, path="x") is Thing
    assert resolve(TASK_UTILS, len, path="x") is len
    assert "found 3" in error(resolve, TASK_UTILS, 3, path="x.type")


def test_a_dotted_path_is_imported():
    assert resolve(MODELS, "torch.nn.Linear", path="x") is torch.nn.Linear
    assert resolve(OPTIMIZERS, "torch.optim.adamw.AdamW", path="x") is torch.optim.AdamW
    assert resolve(MODELS, "torch.nn.Embedding.from_pretrained", path="x") == torch.nn.Embedding.from_pretrained
    assert "did you mean 'Linear'" in error(resolve, MODELS, "torch.nn.Linaer", path="x")
    assert "no module 'nosuchpackage'" in error(resolve, MODELS, "nosuchpackage.Net", path="x")
    assert "no model named '..'" in error(resolve, MODELS, "..", path="x")


def test_an_import_error_inside_a_dotted_module_is_reported(tmp_path, monkeypatch):
    (tmp_path / "half_broken.py").write_text("import nosuchdependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = error(resolve, MODELS, "half_broken.Net", path="model.type")
    assert "half_broken cannot be imported" in message
    assert "nosuchdependency" in message


def test_the_default_scope_is_searched(registered):
    from mmengine.registry import Registry

    child = Registry("task util", parent=mmengine_registry.TASK_UTILS, scope="scope_of_test", locations=[])
    before = list(DefaultScope._instance_dict)
    try:
        cls = registered(child, type("Scoped", (), {}))
        assert resolve(TASK_UTILS, "scope_of_test.Scoped", path="x") is cls
        assert "'scope_of_test.Scoped'" in error(resolve, TASK_UTILS, "scope_of_test.Scopd", path="x")
        error(resolve, TASK_UTILS, "Scoped", path="x")
        DefaultScope.get_instance("test", scope_name="scope_of_test")
        assert resolve(TASK_UTILS, "Scoped", path="x") is cls
        assert build(TASK_UTILS, dict(type="Scoped", _scope_="scope_of_test"), path="x").__class__ is cls
        assert resolve(OPTIMIZERS, "SGD", path="x", scope="scope_of_test") is torch.optim.SGD
    finally:
        mmengine_registry.TASK_UTILS.children.pop("scope_of_test")
        for name in set(DefaultScope._instance_dict) - set(before):
            DefaultScope._instance_dict.pop(name)


def test_an_unknown_name_lists_near_names_where_they_are_and_the_missing_import(registered, tmp_path, monkeypatch):
    registered(METRICS, type("TokenAccuracy", (), {"__module__": "lib.metrics"}))
    message = error(resolve, METRICS, "TokenAcuracy", path="val_evaluator.type")
    assert message.startswith(
        "`val_evaluator.type`: there is no metric named 'TokenAcuracy'; did you mean 'TokenAccuracy' (lib.metrics)"
    )
    assert "@METRICS.register_module()" in message
    assert "custom_imports = dict(imports=['your_module'])" in message

    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_metrics.py").write_text("import os\n\nclass Perplexity2:\n    pass\n")
    message = error(resolve, METRICS, "Perplexity2", path="val_evaluator.type")
    assert "my_metrics.py defines it" in message
    assert "custom_imports = dict(imports=['my_metrics'])" in message


def test_a_name_of_another_registry_is_reported(registered):
    registered(TASK_UTILS, type("MisplacedTool", (), {}))
    assert "registered in TASK_UTILS" in error(resolve, METRICS, "MisplacedTool", path="x")


def test_a_name_taken_twice_is_an_error_at_the_users_decorator_unless_forced():
    first = resolve(PARAM_SCHEDULERS, "CosineAnnealingLR", path="x")
    mine = type("CosineAnnealingLR", (), {"__module__": "my_schedules"})
    with pytest.raises(KeyError, match="already registered"):
        PARAM_SCHEDULERS.register_module(module=mine)
    try:
        PARAM_SCHEDULERS.register_module(module=mine, force=True)
        assert resolve(PARAM_SCHEDULERS, "CosineAnnealingLR", path="x") is mine
    finally:
        PARAM_SCHEDULERS.register_module(module=first, force=True)


def test_torchs_optimizers_are_found_without_the_slow_imports_of_mmengine():
    code = (
        "import sys\n"
        "from mmtrain.registry import HOOKS, OPTIMIZERS, resolve\n"
        "from mmengine.config.lazy import LazyObject\n"
        "assert 'torch' not in sys.modules\n"
        "print(resolve(OPTIMIZERS, 'AdamW', path='x').__module__)\n"
        "HOOKS._locations.clear()\n"
        "HOOKS.register_module(module=type('LoggerHook', (), {}))\n"
        "resolve(HOOKS, LazyObject('mmengine.hooks', 'LoggerHook'), path='x')\n"
        "print([name for name in ('optim', 'hooks', 'model', 'visualization') if f'mmengine.{name}' in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Only what mmtrain.optim itself imports may be there, and it imports none of them.
    assert done.stdout.split("\n")[:2] == ["torch.optim.adamw", "[]"]


# -- build and arguments


def test_build_makes_the_object_and_does_not_change_the_config(registered):
    registered(TASK_UTILS, Thing)
    cfg = dict(type="Thing", size=3)
    made = build(TASK_UTILS, cfg, path="tool", colour="blue", unknown_default=1)
    assert (made.size, made.colour) == (3, "blue")
    assert cfg == dict(type="Thing", size=3)
    assert build(TASK_UTILS, dict(type=Thing, size=1, colour="green"), path="t", colour="blue").colour == "green"
    assert build(TASK_UTILS, dict(size=1), path="t", type=Thing).size == 1
    assert build(TASK_UTILS, made, path="tool") is made
    assert "`type` is missing" in error(build, TASK_UTILS, dict(size=1), path="tool")


def test_an_unknown_and_a_missing_argument_are_reported():
    message = error(build, TASK_UTILS, dict(type=Thing, size=1, color="x"), path="tool")
    assert message == "`tool.color`: Thing has no argument 'color'; did you mean 'colour'? Its arguments: size, colour"
    assert "Thing requires the argument 'size'" in error(build, TASK_UTILS, dict(type=Thing), path="tool")
    check_arguments(Thing, {}, path="tool", reserved=("size",))
    check_arguments(Thing, {}, path="tool", reserved=None)
    check_arguments(Thing, {"size": 1, "priority": 2}, path="tool", extra=("priority",))


def test_an_error_of_the_constructor_about_its_arguments_names_path_and_line():
    class Picky:
        def __init__(self, size):
            if size < 0:
                raise ValueError("size must not be negative")
            raise RuntimeError("a failure of its own")

    message = error(build, TASK_UTILS, dict(type=Picky, size=-1), path="tool")
    assert message.startswith("`tool`: ")
    assert "`tool`: Picky cannot be built: ValueError: size must not be negative" in message
    assert "test_registry.py, line" in message
    with pytest.raises(RuntimeError, match="of its own"):
        build(TASK_UTILS, dict(type=Picky, size=1), path="tool")


class Base:
    def __init__(self, base_option=1):
        self.base_option = base_option


class HandsOn(Base):
    def __init__(self, own, **kwargs):
        super().__init__(**kwargs)


class Keeps(Base):
    def __init__(self, **kwargs):
        super().__init__()
        self.options = kwargs


class Net(torch.nn.Module):
    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)


def test_a_name_that_kwargs_accepts_and_nothing_inside_does_is_refused():
    message = error(build, TASK_UTILS, dict(type=HandsOn, own=1, base_opton=2), path="x")
    assert message == (
        "`x.base_opton`: HandsOn has no argument 'base_opton'; did you mean 'base_option'? "
        "Its arguments: own, base_option"
    )
    assert build(TASK_UTILS, dict(type=HandsOn, own=1, base_option=2), path="x").base_option == 2
    assert "`m.widht`: Net has no argument 'widht'" in error(build, MODELS, dict(type=Net, width=1, widht=2), path="m")
    assert "HandsOn requires the argument 'own'" in error(check_arguments, HandsOn, {}, path="x")


def test_kwargs_that_a_class_keeps_accept_any_name():
    check_arguments(Keeps, {"base_opton": 2}, path="x")
    assert build(TASK_UTILS, dict(type=Keeps, base_opton=2), path="x").options == {"base_opton": 2}


def test_a_default_is_left_out_if_the_class_does_not_accept_it():
    made = build(TASK_UTILS, dict(type=HandsOn, own=1), path="x", base_option=5, other=6)
    assert vars(made) == {"base_option": 5}


def test_arguments_of_builtins_partials_functions_and_classes_without_init():
    check_arguments(dict, {"whatever": 1}, path="x")
    check_arguments(partial(Thing, colour="x"), {"size": 1}, path="x")
    assert "no argument 'x'" in error(check_arguments, type("Empty", (), {}), {"x": 1}, path="p")
    assert arguments_of(torch.optim.AdamW).required == ("params",)
    assert "did you mean 'weight_decay'" in error(
        check_arguments, torch.optim.AdamW, {"weight_deca": 1}, path="o", reserved=("params",)
    )


def test_registry_build_also_checks_arguments(registered):
    registered(MODELS, Thing)
    assert MODELS.build(dict(type="Thing", size=2)).size == 2
    assert MODELS.build(dict(type="Thing"), default_args=dict(size=4)).size == 4
    assert "MODELS.build().sise" in error(MODELS.build, dict(type="Thing", sise=2))


def test_a_managed_class_is_built_again_in_every_run():
    class Managed(ManagerMixin):
        def __init__(self, name="", level=0):
            super().__init__(name)
            self.level = level

    first = build(VISUALIZERS, dict(type=Managed, level=1), path="visualizer", name="run")
    assert Managed.get_instance("run") is first
    second = build(VISUALIZERS, dict(type=Managed, level=2), path="visualizer", name="run")
    assert (first.level, second.level) == (1, 2)
    assert build(VISUALIZERS, dict(type=Managed), path="visualizer").instance_name == "Managed"


def test_a_decorator_is_all_a_class_needs(tmp_path, monkeypatch):
    (tmp_path / "hook_of_a_user.py").write_text(
        "from mmtrain.registry import HOOKS\n@HOOKS.register_module()\nclass HookOfAUser:\n    priority = 'LOW'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    __import__("hook_of_a_user")
    try:
        assert build(HOOKS, dict(type="HookOfAUser"), path="custom_hooks[0]").priority == "LOW"
    finally:
        HOOKS.module_dict.pop("HookOfAUser")
