"""Positions: which file and line an error about a dotted path names, in both of MMEngine's styles."""

import pytest

from mmtrain.config import check_config, load_config, positions
from mmtrain.errors import ConfigError
from mmtrain.registry import TASK_UTILS, build
from mmtrain.source_lines import source_of, where


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def loaded(overrides=None, **texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.py").write_text(text)
        return load_config(f"{name}.py", overrides)

    return loaded


def line(cfg, path):
    file, number = source_of(cfg).find(path)
    return file.rpartition("/")[2], number


DIRECT = """\
lr = 0.1
model = dict(
    type='Net',
    layers=[
        dict(width=1),
        dict(
            width=2,
            **dict(extra=1))],
)
train_cfg = {
    'by_epoch': False,
    'max_iters': 10,
}
hook = dict(type='H',
            interval=lr)
custom_hooks = [
    hook,
    dict(type='H',
         interval=2)]
custom_hooks[1]['interval'] = 5
train_cfg['max_iters'] = 20
train_cfg.update(dict(
    val_interval=3), val_begin=1)
a = b = 1
c, d = 1, 2
work_dir: str = 'x'
"""


def test_dicts_lists_names_and_assignments_are_followed(load):
    cfg = load(c=DIRECT)
    expected = {
        "lr": 1, "model": 2, "model.type": 3, "model.layers": 4, "model.layers[0].width": 5, "model.layers.1.width": 7,
        "model.layers[1].extra": 8, "train_cfg.by_epoch": 11, "hook.interval": 15, "custom_hooks[0].interval": 15,
        "custom_hooks.0.type": 14, "custom_hooks[1].interval": 20, "train_cfg.max_iters": 21,
        "train_cfg.val_interval": 23, "train_cfg.val_begin": 23, "a": 24, "b": 24, "c": 25, "d": 25, "work_dir": 26,
    }  # fmt: skip
    found = {path: line(cfg, path)[1] for path in expected}
    assert found == expected
    assert line(cfg, "model.layers[0].nosuch.deeper") == ("c.py", 5), "the nearest section around it"
    assert line(cfg, "nosuch") == ("c.py", None)


def test_what_is_not_followed_has_a_file_and_no_line(load):
    cfg = load(
        c=(
            "model = dict(type='Net')\nhooks = [dict(type='A')]\n"
            "if True:\n    model['width'] = 3\n"
            "hooks.append(dict(type='B'))\n"
            "many = [dict(type='C') for _ in range(2)]\n"
        )
    )
    assert line(cfg, "model.width") == ("c.py", None)
    assert line(cfg, "hooks[1].type") == ("c.py", 2)
    assert line(cfg, "many[0].type") == ("c.py", 6)


def test_bases_by_import_are_followed(load):
    cfg = load(
        deep="a = 1\nmodel = dict(\n    width=1,\n    depth=2)\n",
        base=(
            "from mmengine.config import read_base\nwith read_base():\n    from .deep import model as net\n"
            "b = dict(x=1)\n"
        ),
        c=(
            "from mmengine.config import read_base\nwith read_base():\n    from .base import *\n"
            "net.update(dict(\n    depth=3))\nb = dict(y=2)\n"
        ),
    )
    assert line(cfg, "net.width") == ("deep.py", 3)
    assert line(cfg, "net.depth") == ("c.py", 5)
    assert line(cfg, "b.y") == ("c.py", 6)


def test_a_base_list_merges_and_delete_replaces(load):
    cfg = load(
        base="model = dict(\n    width=1,\n    depth=2)\nother = dict(\n    x=1)\nhooks = [dict(a=1)]\n",
        c="_base_ = ['./base.py']\nmodel = dict(width=5)\nother = dict(_delete_=True, y=1)\nhooks = [dict(b=1)]\n",
    )
    assert line(cfg, "model.width") == ("c.py", 2)
    assert line(cfg, "model.depth") == ("base.py", 3)
    assert line(cfg, "other.y") == ("c.py", 3)
    assert line(cfg, "hooks[0].b") == ("c.py", 4)


def test_errors_name_file_and_line_and_the_command_line(load, tmp_path):
    cfg = load(c="train_cfg = dict(\n    by_epoch=False,\n    max_itres=3)\n")
    with pytest.raises(ConfigError, match=r"^`train_cfg.max_itres` \(c.py, line 3\): train_cfg has no key 'max_itres'"):
        check_config(cfg)
    cfg = load({"train_cfg.max_itres": 3, "randomness": dict(sed=1)}, c="train_cfg = dict(\n    by_epoch=False)\n")
    with pytest.raises(ConfigError, match=r"^`train_cfg.max_itres` \(--cfg-options\): "):
        check_config(cfg)
    with positions(cfg):
        assert where("randomness.sed") == " (--cfg-options)"
        assert where("train_cfg.by_epoch") == " (c.py, line 2)"


def test_building_within_positions_names_the_line(load):
    cfg = load(c="tool = dict(type='fractions.Fraction',\n    numeratr=1)\n")
    with (
        positions(cfg),
        pytest.raises(ConfigError, match=r"^`tool.numeratr` \(c.py, line 2\): .*did you mean 'numerator'"),
    ):
        build(TASK_UTILS, cfg.tool, path="tool")
    with pytest.raises(ConfigError, match=r"^`tool.numeratr`: "):
        build(TASK_UTILS, cfg.tool, path="tool")
    assert where("tool") == ""


def test_a_config_made_of_a_dict_has_no_positions():
    assert source_of({"a": 1}) is None
    with pytest.raises(ConfigError, match=r"^`randomness.sed`: "):
        check_config({"randomness": {"sed": 1}})
