"""The written config: it loads to an equal one, quickly, and the hash follows its content."""

import enum
import math
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmtrain.config import check_config, config_hash, config_text, dump_config, load_config
from mmtrain.errors import ConfigError
from mmtrain.registry import MODELS, OPTIMIZERS, resolve


class Colour(enum.Enum):
    RED = 1


class Holder:
    class Inner:
        @classmethod
        def make(cls):
            return cls()


def roundtrip(cfg, tmp_path):
    dump_config(cfg, tmp_path / "dumped.py")
    return load_config(tmp_path / "dumped.py")


def plain(value):
    """A config's values as plain dicts, so that == compares them."""
    if isinstance(value, Config):
        value = value._cfg_dict
    if isinstance(value, dict):
        return {key: plain(member) for key, member in dict.items(value)}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


VALUES = dict(
    none=None, yes=True, whole=3, real=0.1, tiny=1e-300, negative=-0.0, inf=math.inf, minus=-math.inf,
    text="it's \"quoted\"\n{{ fileBasename }} {{$HOME:x}} é 中", raw=b"\x00a", z=1 + 2j, count=range(1, 9, 2),
    empty=[[], (), {}, set(), frozenset()], single=(1,), nested=[(1, [2, {"a": (3,)}])], letters={"b", "a"},
    frozen=frozenset({1}), keys={1: "a", "not an identifier": 2, "class": 3, (1, 2): 4, None: 5},
    folder=Path("a") / "b", wait=timedelta(days=1, microseconds=3), no_wait=timedelta(0), colour=Colour.RED,
    dtype=torch.bfloat16, dtypes=[torch.float32, (torch.int8,)], device=torch.device("cpu"),
    function=math.cos, builtin=len, cls=torch.nn.LayerNorm, inner=Holder.Inner, bound=Holder.Inner.make,
    ordered=OrderedDict(b=1, a=2),
)  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_every_kind_of_value_is_read_back_equal(name, tmp_path):
    value = VALUES[name]
    loaded = roundtrip(Config({"model": {"x": value}}), tmp_path)
    back = plain(loaded)["model"]["x"]
    assert back == value
    assert type(back) is type(value) or isinstance(value, dict)
    assert list(back) == list(value) if isinstance(value, dict) else repr(back) == repr(value) or isinstance(value, set)


def test_nan_and_numpy_numbers_are_read_back(tmp_path):
    cfg = roundtrip(Config(dict(a=math.nan, b=np.float64(0.5), c=np.int64(3), d=np.bool_(True))), tmp_path)
    assert math.isnan(cfg.a)
    assert (cfg.b, cfg.c, cfg.d) == (0.5, 3, True)


def test_classes_as_types_are_written_as_names_that_resolve_understands(tmp_path):
    cfg = Config(
        dict(
            model=dict(type=torch.nn.Linear, norm=torch.nn.LayerNorm, other=dict(type=Holder.Inner.make)),
            optimizer=dict(type=torch.optim.AdamW, lr=1.0),
        )
    )
    loaded = roundtrip(cfg, tmp_path)
    assert loaded.optimizer.type == "torch.optim.adamw.AdamW"
    assert resolve(OPTIMIZERS, loaded.optimizer.type, path="x") is torch.optim.AdamW
    assert resolve(MODELS, loaded.model.type, path="x") is torch.nn.Linear
    assert resolve(MODELS, loaded.model.other.type, path="x") == Holder.Inner.make
    assert dict.__getitem__(loaded.model, "norm") is torch.nn.LayerNorm
    assert plain(roundtrip(loaded, tmp_path)) == plain(loaded)


def test_a_lazy_config_dumps_without_importing_its_types(tmp_path):
    (tmp_path / "c.py").write_text(
        "import torch\nfrom absent_package.models import Net\nfrom torch.optim import AdamW\n"
        "optim_type = AdamW\nmodel = dict(type=Net, dtype=torch.float16)\n"
        "optim_wrapper = dict(optimizer=dict(type=optim_type, lr=1e-4))\n"
    )
    cfg = load_config(tmp_path / "c.py", {"optim_wrapper.optimizer.lr": 1e-3})
    text = config_text(cfg)
    assert "type='absent_package.models.Net'" in text
    loaded = roundtrip(cfg, tmp_path)
    assert loaded._cfg_dict.to_dict() == {**cfg._cfg_dict.to_dict()}
    assert config_text(loaded) == text
    assert config_hash(loaded) == config_hash(cfg)


def test_a_class_of_a_script_is_written_by_its_registered_name():
    cls = type("NetOfAScript", (), {"__module__": "__main__"})
    cfg = Config(dict(model=dict(type=cls)))
    with pytest.raises(
        ConfigError, match=r"^`model.type`: NetOfAScript, which cannot be imported by that name.*register"
    ):
        config_text(cfg)
    MODELS.register_module(module=cls)
    try:
        assert "type='NetOfAScript'" in config_text(cfg)
    finally:
        MODELS.module_dict.pop("NetOfAScript")


@pytest.mark.parametrize(
    ("value", "what"),
    [(lambda: 1, "a lambda"), (object(), "an instance of object"), (torch.zeros(2), "an instance of Tensor")],
)
def test_a_value_that_cannot_be_written_is_named_by_its_path(value, what, tmp_path):
    with pytest.raises(ConfigError) as caught:
        dump_config(Config(dict(model=dict(layers=[1, dict(act=value)]))), tmp_path / "c.py")
    assert str(caught.value).startswith(f"`model.layers[1].act`: {what}")
    assert not (tmp_path / "c.py").exists()


def test_an_unwritable_path_is_reported(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot write the resolved config to .*No such file"):
        dump_config(Config(dict(a=1)), tmp_path / "absent" / "c.py")


def test_imports_do_not_hide_the_configs_own_names(tmp_path):
    cfg = Config(dict(LayerNorm=5, Path="x", net=dict(norm=torch.nn.LayerNorm, where=Path("y"))))
    assert "from torch.nn.modules.normalization import LayerNorm as LayerNorm_" in config_text(cfg)
    assert plain(roundtrip(cfg, tmp_path)) == plain(cfg)


def test_long_values_have_one_line_per_key():
    cfg = Config(dict(short=dict(a=1, b=[1, 2]), long=dict(first="x" * 60, second=["y" * 30, dict(z="z" * 30)])))
    assert config_text(cfg).split("\n", 1)[1] == (
        "short = dict(a=1, b=[1, 2])\n"
        "long = dict(\n"
        f"    first='{'x' * 60}',\n"
        f"    second=['{'y' * 30}', dict(z='{'z' * 30}')],\n"
        ")\n"
    )


def test_a_variable_that_resembles_a_key_passes_after_the_round_trip(tmp_path):
    (tmp_path / "c.py").write_text("custom_hook = 'x'\nwork_dirs = custom_hook\nwork_dir = work_dirs\n")
    cfg = load_config(tmp_path / "c.py")
    check_config(cfg)
    loaded = roundtrip(cfg, tmp_path)
    check_config(loaded)
    assert plain(loaded) == plain(cfg)


def test_the_hash_follows_the_content_and_not_the_order():
    first = Config(dict(a=1, model=dict(type=torch.nn.Linear, x=1, y=2)))
    assert config_hash(first) == config_hash(Config(dict(model=dict(y=2, x=1, type=torch.nn.Linear), a=1)))
    assert config_hash(first) != config_hash(Config(dict(a=1, model=dict(type=torch.nn.Linear, x=1, y=3))))
    assert config_hash(first) == config_hash({"a": 1, "model": {"type": torch.nn.Linear, "x": 1, "y": 2}})
    assert len(config_hash(first)) == 32
