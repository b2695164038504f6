"""Configs in MMEngine's pure Python style: bases, placeholders, plain Python inside, and what they cannot hold."""

import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.config import config as mmengine_config
from mmengine.config.lazy import LazyAttr, LazyObject

from mmtrain.config import load_config
from mmtrain.errors import ConfigError
from mmtrain.registry import MODELS, OPTIMIZERS, resolve

HEAD = "from mmengine.config import read_base\nwith read_base():\n    from .base import *\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes files into a fresh working directory and gives the path of the last."""
    monkeypatch.chdir(tmp_path)

    def files(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.py").write_text(text)
        return tmp_path / f"{name}.py"

    return files


def error(path):
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- types and bases


def test_a_lazy_config_with_read_base_and_classes(write):
    file = write(
        base="from torch.optim import AdamW\noptim_wrapper = dict(optimizer=dict(type=AdamW, lr=1.0))\n",
        child=(
            "from mmengine.config import read_base\n"
            "from torch.nn import Linear\n"
            "with read_base():\n    from .base import *\n"
            "optim_wrapper.update(dict(optimizer=dict(lr=2.0)))\n"
            "model = dict(type=Linear, in_features=1, out_features=1)\n"
        ),
    )
    cfg = load_config(file)
    assert set(cfg) == {"optim_wrapper", "model"}, "what the files import is no key"
    assert cfg.optim_wrapper.optimizer.lr == 2.0
    assert cfg.model.type is torch.nn.Linear
    assert resolve(OPTIMIZERS, cfg.optim_wrapper.optimizer.type, path="x") is torch.optim.AdamW


def test_a_class_used_as_a_type_is_not_imported_by_loading(write):
    file = write(c="from package_that_is_absent import Net\nmodel = dict(type=Net)\n")
    assert isinstance(dict.__getitem__(load_config(file)._cfg_dict.model, "type"), LazyObject)


def lazy_objects(value):
    """The dotted paths, from ``value``, of MMEngine's lazy objects."""
    if isinstance(value, (LazyObject, LazyAttr)):
        return [""]
    members = dict.items(value) if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [f".{key}{rest}" for key, member in members for rest in lazy_objects(member)]


def test_only_a_type_stays_unresolved(write):
    cfg = load_config(
        write(
            c=(
                "import torch\nimport torch.nn as nn\nfrom torch.optim import AdamW\n"
                "chosen = AdamW\nmodel = dict(type=nn.Linear, layers=[dict(type=torch.nn.ReLU, dtype=torch.int8)])\n"
                "optimizer = dict(type=chosen, also=AdamW, several=[AdamW], kinds={torch.int8}, by={torch.int8: AdamW})\n"
            )
        )
    )
    assert lazy_objects(cfg._cfg_dict) == [".model.type", ".model.layers.0.type", ".optimizer.type"]
    assert resolve(MODELS, dict.__getitem__(cfg.model, "type"), path="x") is torch.nn.Linear
    assert cfg.model.layers[0].type is torch.nn.ReLU
    assert cfg.optimizer.kinds == {torch.int8}
    assert dict.__getitem__(cfg.optimizer, "by") == {torch.int8: torch.optim.AdamW}
    assert cfg.chosen is torch.optim.AdamW


def test_two_names_of_a_base_share_nothing(write):
    base = "hook = dict(type='A', n=1)\ncustom_hooks = [hook]\nmodel = dict(type='Net', sub=dict(a=1))\n"
    cfg = load_config(write(base=base, c=HEAD + "hook.update(n=2)\nmodel.sub.b = 2\n"))
    assert (cfg.hook.n, cfg.custom_hooks[0].n) == (2, 1)
    assert cfg.model.sub == dict(a=1, b=2)


def test_a_base_may_be_a_module_of_a_package(write, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "package_of_configs" / "configs"
    package.mkdir(parents=True)
    (tmp_path / "package_of_configs" / "__init__.py").write_text("")
    (package / "base.py").write_text("lr = 0.5\n")
    cfg = load_config(write(c=HEAD.replace(".base", "package_of_configs.configs.base")))
    assert dict(cfg) == {"lr": 0.5}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (HEAD.replace("*", "modle"), "config c.py, line 3: the base base.py has no 'modle'; did you mean 'model'?"),
        (HEAD.replace("from .base import *", "import base"), "config c.py, line 3: expected an import such as "),
        (HEAD.replace(".base", "."), "config c.py, line 3: expected an import such as "),
        (HEAD.replace(".base", "base"), "config c.py, line 3: base is not in an installed package; start the name"),
        ("from .base import model\n", "config c.py, line 1: put an import that starts with a dot inside"),
        ("from math import *\nfrom torch.nn import Linear\n", "config c.py, line 1: `import *` works only for a base"),
        (HEAD.replace("base import", "listed import"), "config listed.py is a base in `with read_base():`"),
        ("_base_ = ['reads.py']\n", "config c.py, line 1: the base reads.py has `with read_base():`"),
    ],
)
def test_an_unsupported_import_in_a_config_is_refused(write, text, sentence):
    write(base="model = dict(type='Net')\n", listed="_base_ = ['base.py']\n", reads=HEAD)
    assert error(write(c=text)).startswith(sentence)


def test_a_base_list_next_to_imports_is_read(write):
    cfg = load_config(write(base="a = 1\n", c="from torch.optim import AdamW\n_base_ = ['base.py']\nb = AdamW\n"))
    assert (cfg.a, cfg.b) == (1, torch.optim.AdamW)


# -- plain Python inside a config

STANDARD_LIBRARY = """
import os
import os.path as osp
import random, math
from datetime import timedelta
from functools import reduce
env_cfg = dict(dist_cfg=dict(timeout=timedelta(minutes=3)))
work_dir = os.path.join('a', osp.basename('/x/b'))
total = reduce(lambda a, b: a + b, [1, 2, 3]) + math.floor(1.5)
"""


@pytest.mark.parametrize("lazy", [False, True])
def test_the_standard_library_works_in_a_config(write, lazy):
    text = STANDARD_LIBRARY
    if lazy:
        text = "from torch.nn import Linear\n" + text + "kind = Linear\n"
    cfg = load_config(write(c=text))
    assert cfg.env_cfg.dist_cfg.timeout == timedelta(minutes=3)
    assert (cfg.work_dir, cfg.total) == (str(Path("a") / "b"), 7)
    assert set(cfg) == {"env_cfg", "work_dir", "total"} | ({"kind"} if lazy else set())


def test_numpy_and_torch_can_be_computed_with(write):
    cfg = load_config(
        write(
            c=(
                "import numpy as np\nimport torch\nimport torch.nn as nn\n"
                "angle = np.pi * 2\nhalf = 1 / np.float64(2)\nnegative = -np.pi\n"
                "betas = (float(np.sqrt(0.81)), 0.999)\nbig = np.pi > 3\n"
                "dtype = torch.bfloat16\ndtypes = [torch.float16, torch.float32]\n"
                "threads = 1 if torch.cuda.is_available() else 2\n"
                "steps = [int(s) for s in np.arange(3)]\n"
                "model = dict(type=nn.Sequential, norm=nn.LayerNorm)\n"
            )
        )
    )
    assert cfg.angle == 2 * math.pi
    assert (cfg.half, cfg.negative, cfg.big) == (0.5, -math.pi, True)
    assert cfg.betas == (0.9, 0.999)
    assert cfg.dtype is torch.bfloat16
    assert cfg.dtypes == [torch.float16, torch.float32], "MMEngine leaves placeholders in lists"
    assert cfg.threads == (1 if torch.cuda.is_available() else 2)
    assert cfg.steps == [0, 1, 2]
    assert dict.__getitem__(cfg.model, "norm") is torch.nn.LayerNorm


def test_text_versions_and_modules_can_be_used(write):
    text = (
        "import torch\nimport torch.utils.data\nimport torch.nn.functional\n"
        "new = torch.__version__ >= '1.0'\nname = f'{torch.version.__name__}/x'\nhas = 'e' in torch.__name__\n"
        "act = torch.nn.functional.relu\nloader = torch.utils.data.DataLoader\n"
    )
    cfg = load_config(write(c=text))
    assert (cfg.new, cfg.name, cfg.has) == (True, "torch.version/x", False)
    assert cfg.act is torch.nn.functional.relu
    assert cfg.loader is torch.utils.data.DataLoader


def test_reading_changes_nothing_in_mmengine(write):
    before = dict(vars(LazyObject)), dict(vars(LazyAttr)), mmengine_config._is_builtin_module
    load_config(write(c="import numpy as np\nx = np.pi * 2\n"))
    error(write(c="import numpy as np\nx = np.pi * None\n"))
    after = dict(vars(LazyObject)), dict(vars(LazyAttr)), mmengine_config._is_builtin_module
    assert before == after
    assert not Config.fromfile.__globals__["ConfigDict"].lazy
