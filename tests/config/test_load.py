"""Loading a config: both of MMEngine's styles, plain Python inside, overrides, custom imports, and every bad input."""

import sys

import pytest
from mmengine.config import Config

from mmtrain.config import load_config, parse_overrides
from mmtrain.errors import ConfigError


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes files into a fresh working directory and gives the path of the last."""
    monkeypatch.chdir(tmp_path)

    def files(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.py").write_text(text)
        return tmp_path / f"{name}.py"

    return files


def error(path, overrides=None):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- the two styles


def test_a_plain_config_with_a_base_list(write):
    file = write(
        base="lr = 0.1\nmodel = dict(type='Net', width=1, depth=2)\n",
        child="_base_ = ['base.py']\nmodel = dict(width=5)\nother = '{{ fileBasenameNoExtension }}'\n",
    )
    cfg = load_config(file)
    assert isinstance(cfg, Config)
    assert cfg.model.to_dict() == dict(type="Net", width=5, depth=2)
    assert (cfg.lr, cfg.other, cfg.filename) == (0.1, "child", str(file))
    assert "width=5" in cfg.text


def test_a_path_may_be_a_string_and_json_and_yaml_work(write, tmp_path):
    write(c="a = 1\n")
    assert load_config("c.py").a == 1
    (tmp_path / "c.json").write_text('{"model": {"type": "Net"}, "max_epochs": 2}')
    (tmp_path / "c.yaml").write_text("model:\n  type: Net\n")
    assert load_config("c.json", {"model.width": 3}).model.width == 3
    assert load_config("c.yaml").model.type == "Net"


# -- what stays


def test_helpers_of_the_file_are_dropped_and_values_stay(write):
    cfg = load_config(
        write(
            c=(
                "import os\nfrom os import environ\n"
                "def twice(x):\n    return 2 * x\n"
                "class Helper:\n    pass\n"
                "helper = Helper()\nwidth = twice(3)\nfor i in range(2):\n    pass\n"
            )
        )
    )
    assert set(cfg) == {"width", "i"}


# -- overrides


def test_overrides_are_merged_by_dotted_path(write):
    file = write(c="lr = 1\nmodel = dict(type='Net', layers=[dict(w=1), dict(w=2)])\n")
    cfg = load_config(file, {"model.layers.1.w": 5, "work_dir": "w", "optim_wrapper.optimizer.lr": 0.1})
    assert [layer.w for layer in cfg.model.layers] == [1, 5]
    assert (cfg.work_dir, cfg.optim_wrapper.optimizer.lr) == ("w", 0.1)


@pytest.mark.parametrize(
    ("name", "value"), [("lr.x", 1), ("model.layers.7.w", 1), ("model.layers.first.w", 1), ("empty.x", 1)]
)
def test_an_override_that_does_not_fit_is_reported(write, name, value):
    message = error(write(c="lr = 1\nempty = None\nmodel = dict(layers=[dict(w=1)])\n"), {name: value})
    assert message.startswith(f"`{name}` (--cfg-options) does not fit the config: ")
    assert "reserved by MMEngine" in error(write(c="a = 1\n"), {"text": "x"})


def test_parse_overrides_reads_values_as_mmengine_does():
    given = ["a.b=1", "c=[1,2.5,(x,y)]", "d=True", "e=None", "f=1e-3", "g=a=b", "h=1,2", "name='my run'", "i="]
    assert parse_overrides(given) == {
        "a.b": 1, "c": [1, 2.5, ("x", "y")], "d": True, "e": None, "f": 1e-3, "g": "a=b", "h": [1, 2],
        "name": "my run", "i": "",
    }  # fmt: skip


@pytest.mark.parametrize("option", ["a.b", "=3", "a..b=3", "a=[1,(2]", "a=[1,2),3]]", "a=[dict(b=1,c=2)]"])
def test_a_malformed_override_is_reported(option):
    with pytest.raises(ConfigError) as caught:
        parse_overrides([option])
    assert "--cfg-options" in str(caught.value)
    assert repr(option) in str(caught.value)


# -- custom_imports

HOOK = "from mmtrain.registry import TASK_UTILS\n@TASK_UTILS.register_module(force=True)\nclass {}:\n    pass\n"


@pytest.mark.parametrize("lazy", [False, True])
def test_custom_imports_work_in_both_styles_from_the_working_directory_and_next_to_the_config(
    write, tmp_path, monkeypatch, lazy
):
    from mmtrain.registry import TASK_UTILS

    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / f"beside_{lazy}.py").write_text(HOOK.format(f"Beside{lazy}"))
    (tmp_path / f"from_cwd_{lazy}.py").write_text(HOOK.format(f"FromCwd{lazy}"))
    lines = [f"custom_imports = dict(imports=['from_cwd_{lazy}', 'beside_{lazy}'])"]
    (tmp_path / "configs" / "c.py").write_text("\n".join((["from torch.nn import Linear"] if lazy else []) + lines))
    load_config("configs/c.py")
    for name in (f"Beside{lazy}", f"FromCwd{lazy}"):
        assert TASK_UTILS.module_dict.pop(name).__name__ == name


def test_a_custom_import_that_fails_is_reported(write, monkeypatch):
    path = list(sys.path)
    file = write(c="custom_imports = dict(\n    imports=['no_such_module_here'])\n")
    message = error(file)
    assert message.startswith("`custom_imports.imports[0]` (c.py, line 2): there is no module 'no_such_module_here'")
    assert sys.path == path
    write(raises_at_import="x = 1\nraise ValueError('broken on purpose')\n", needs_other="import no_such_other\n")
    message = error(write(c="custom_imports = dict(imports='raises_at_import')\n"))
    assert "raised ValueError: broken on purpose (raises_at_import.py, line 2)" in message
    assert "cannot import needs_other" in error(write(c="custom_imports = dict(imports='needs_other')\n"))
    assert "expected dict(imports=" in error(write(c="custom_imports = dict(imports=3)\n"))
    assert "expected dict(imports=" in error(write(c="custom_imports = ['x']\n"))
    with pytest.warns(UserWarning, match="no module 'absent_one'"):
        load_config(write(c="custom_imports = dict(imports=['absent_one'], allow_failed_imports=True)\n"))


# -- bad files


def test_a_missing_file_is_reported_with_the_near_one(write, tmp_path):
    write(gpt_small="a = 1\n")
    assert error("gpt_smal.py") == "config gpt_smal.py does not exist; did you mean gpt_small.py?"
    assert "does not exist (relative to " in error("elsewhere/x.py")
    assert "is a directory" in error(tmp_path)
    (tmp_path / "notes.txt").write_text("a = 1")
    assert "expected a file that ends in .py" in error("notes.txt")


@pytest.mark.parametrize("lazy", [False, True])
def test_a_syntax_error_names_file_and_line_also_in_a_base(write, lazy):
    message = error(write(c="a = 1\nmodel = dict(type='Net'\nb = 2\n"))
    assert message.startswith("config c.py, line 2: ")
    base = "a = 1\nb = = 2\n"
    child = "from mmengine.config import read_base\nwith read_base():\n    from .base import *\n"
    message = error(write(base=base, c=child if lazy else "_base_ = 'base.py'\n"))
    assert message == "config base.py, line 2: invalid syntax: `b = = 2`"


def test_a_missing_base_and_a_base_that_includes_itself_are_reported(write):
    child = "from mmengine.config import read_base\nwith read_base():\n    from .absent import *\n"
    assert error(write(c=child)) == "config c.py, line 3: the base absent.py does not exist"
    assert error(write(c="_base_ = ['absent.py']\n")) == "config c.py, line 1: the base absent.py does not exist"
    message = error(write(b="_base_ = 'c.py'\n", c="a = 1\n_base_ = 'b.py'\n"))
    assert message == "config b.py, line 1: the base c.py includes this file in turn; remove one of the two bases"


@pytest.mark.parametrize("lazy", [False, True])
def test_an_exception_inside_a_config_names_file_and_line(write, lazy):
    head = "from torch.nn import Linear\n" if lazy else "import math\n"
    assert error(write(c=head + "a = 1 / 0\n")) == "config c.py, line 2: ZeroDivisionError: division by zero"
    assert "config c.py, line 3: NameError" in error(write(c=head + "\nmodel = dict(width=widht)\n"))
    message = error(write(c=head + "import no_such_lib\n\nx = no_such_lib.call(3)\n"))
    assert message.startswith("config c.py, line 4: ModuleNotFoundError")


def test_what_mmengine_refuses_is_reported_in_a_sentence(write):
    assert error(write(c="text = 1\n")) == "config c.py: text is reserved for config file"
    assert "Duplicate key" in error(write(a="x = 1\n", b="x = 2\n", c="_base_ = ['a.py', 'b.py']\n"))
    assert "model" in error(write(a="model = 3\n", c="_base_ = 'a.py'\nmodel = dict(x=1)\n"))


def test_an_import_that_a_value_needs_is_reported_with_its_place(write):
    message = error(write(c="from no_such_lib import thing\nmodel = dict(type='Net', act=thing)\n"))
    assert message.startswith("`model.act` (c.py, line 2): no_such_lib.thing (imported in c.py, line 1)")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("model = dict(act=lambda x: x)", "a lambda"),
        ("from functools import partial\nmodel = dict(act=partial(int, base=2))", "a functools.partial"),
        ("from decimal import Decimal\nmodel = dict(act=Decimal(1))", "an instance of "),
        ("def f():\n    pass\nmodel = dict(act=[f])", "f, which cannot be imported"),
        ("class Net:\n    pass\nmodel = dict(act=1, type=Net)", "Net, which cannot be imported"),
    ],
)
def test_a_value_that_no_source_gives_back_is_reported_at_load(write, text, what):
    message = error(write(c=text + "\n"))
    assert message.startswith("`model.")
    assert "(c.py, line " in message
    assert what in message
    assert "register" in message
