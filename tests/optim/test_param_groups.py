"""The rules of paramwise_cfg against MMEngine's constructor."""

import copy

import pytest
import torch
from torch import nn

from mmtrain.errors import ConfigError
from mmtrain.optim import build_optim_wrapper


class DeformConv2d(nn.Module):
    """Replaces mmcv's, whose offsets come from a separate convolution."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2, 3, 3))
        self.bias = nn.Parameter(torch.zeros(2))
        self.conv_offset = nn.Conv2d(2, 4, 3)


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.scale = nn.Parameter(torch.zeros(4))
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4))
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)])
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.backbone = Backbone()
        self.neck = nn.Linear(4, 4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, bias=False))


class Deformable(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = DeformConv2d()
        self.conv = nn.Conv2d(2, 2, 1)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.block = nn.Linear(4, 4)
        self.again = self.block
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight


def by_name(model, optimizer, keys):
    """The settings of every parameter that the optimizer has."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: tuple(g[key] for key in keys) for g in optimizer.param_groups for p in g["params"]}


def both(model, optimizer_cfg, paramwise_cfg, keys=("lr", "weight_decay"), monkeypatch=None):
    from mmengine.optim import build_optim_wrapper as mmengine_build

    theirs_model, ours_model = copy.deepcopy(model), copy.deepcopy(model)
    cfg = dict(optimizer=optimizer_cfg, paramwise_cfg=paramwise_cfg)
    theirs = mmengine_build(theirs_model, dict(type="OptimWrapper", **copy.deepcopy(cfg))).optimizer
    ours = build_optim_wrapper(ours_model, cfg).optimizer
    return by_name(ours_model, ours, keys), by_name(theirs_model, theirs, keys), ours


CASES = [
    dict(bias_lr_mult=2.0),
    dict(bias_decay_mult=0.0),
    dict(norm_decay_mult=0.0),
    dict(norm_decay_mult=0.5, bias_decay_mult=0.1, dwconv_decay_mult=0.2, flat_decay_mult=0.3),
    dict(flat_decay_mult=0.0),
    dict(dwconv_decay_mult=0.0, bias_lr_mult=0.5),
    dict(custom_keys={"backbone": dict(lr_mult=0.1)}),
    dict(custom_keys={"backbone": dict(lr_mult=0.1, decay_mult=0.9), "backbone.norms": dict(decay_mult=0.0)}),
    dict(custom_keys={"neck": dict(lr_mult=3.0), "head": dict(decay_mult=2.0), ".logit": dict(decay_mult=0.0)}),
    dict(custom_keys={"bias": dict(lr_mult=2.0), "norm": dict(lr_mult=4.0), "stem": dict(lr_mult=8.0)}),
    dict(custom_keys={"head": dict(lr_mult=0.5)}, norm_decay_mult=0.0, bias_lr_mult=2.0, bias_decay_mult=0.0),
]


def names_in(group, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in group["params"]]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "optimizer",
    [dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=1e-4), dict(type="AdamW", lr=1e-3, weight_decay=0.05)],
)
def test_every_parameter_has_mmengines_settings(case, optimizer):
    ours, theirs, _ = both(Model(), optimizer, case)
    assert ours == theirs


def test_deformable_convolutions(monkeypatch):
    import mmengine.optim.optimizer.default_constructor as module

    class Ops:
        ModulatedDeformConv2d = DeformConv2d

    Ops.DeformConv2d = DeformConv2d
    monkeypatch.setattr(module, "mmcv_full_available", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "mmcv", Ops)
    monkeypatch.setitem(__import__("sys").modules, "mmcv.ops", Ops)
    case = dict(dcn_offset_lr_mult=0.1, bias_lr_mult=2.0, bias_decay_mult=0.0, flat_decay_mult=0.5)
    ours, theirs, _ = both(Deformable(), dict(type="SGD", lr=0.1, weight_decay=1e-4), case)
    assert ours == theirs
    assert ours["first.conv_offset.bias"] == pytest.approx((0.01, 1e-4))


def test_other_keys_of_a_custom_key_go_into_the_group():
    case = dict(custom_keys={"head": dict(betas=(0.5, 0.9), lr=7.0)})
    ours, theirs, _ = both(Model(), dict(type="AdamW", lr=1e-3, weight_decay=0.05), case, keys=("lr", "betas"))
    assert ours == theirs
    assert ours["head.0.weight"] == (7.0, (0.5, 0.9))


def test_equal_settings_share_a_group_in_the_order_of_their_first_parameter():
    case = dict(norm_decay_mult=0.0, custom_keys={"backbone.stem": dict(lr_mult=0.1)})
    model = Model()
    adamw = dict(type="AdamW", lr=1e-3, weight_decay=0.05)
    _, theirs, _ = both(model, adamw, case)
    ours = build_optim_wrapper(model, dict(optimizer=adamw, paramwise_cfg=case))
    assert [names_in(group, model)[0] for group in ours.param_groups] == [
        "logit_scale",
        "backbone.stem.0.weight",
        "backbone.norms.0.weight",
    ]
    assert len(theirs) == sum(len(group["params"]) for group in ours.param_groups)
    for group in ours.param_groups:
        assert len(group["params"]) == len(set(names_in(group, model)))


def test_without_rules_there_is_one_group_of_what_is_trainable():
    model = Model()
    wrapper = build_optim_wrapper(model, dict(optimizer=dict(type="SGD", lr=0.1)))
    (group,) = wrapper.param_groups
    assert names_in(group, model) == [name for name, p in model.named_parameters() if p.requires_grad]
    assert not any(name.startswith("backbone.frozen") for name in names_in(group, model))


def test_a_multiplier_of_zero_freezes():
    model = Model()
    case = dict(custom_keys={"backbone": dict(lr_mult=0.0), "neck.bias": dict(lr_mult=0)})
    wrapper = build_optim_wrapper(model, dict(optimizer=dict(type="SGD", lr=0.1), paramwise_cfg=case))
    trained = {name for group in wrapper.param_groups for name in names_in(group, model)}
    assert trained == {"logit_scale", "neck.weight", "head.0.weight", "head.0.bias", "head.1.weight"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    biases = Model()
    build_optim_wrapper(biases, dict(optimizer=dict(type="SGD", lr=0.1), paramwise_cfg=dict(bias_lr_mult=0.0)))
    assert not biases.neck.bias.requires_grad
    assert biases.backbone.norms[0].bias.requires_grad


@pytest.mark.parametrize("case", [dict(bypass_duplicate=True), dict(norm_decay_mult=0.0), None])
def test_tied_parameters_appear_once(case):
    cfg = dict(optimizer=dict(type="AdamW", lr=1e-3), paramwise_cfg=case)
    model = Tied()
    (group,) = build_optim_wrapper(model, cfg).param_groups
    assert names_in(group, model) == ["embedding.weight", "block.weight", "block.bias", "head.bias"]


def test_rms_norms_are_norms():
    model = nn.Sequential(nn.Linear(2, 2), nn.RMSNorm(2))
    cfg = dict(optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.1), paramwise_cfg=dict(norm_decay_mult=0.0))
    decays = {n: g["weight_decay"] for g in build_optim_wrapper(model, cfg).param_groups for n in names_in(g, model)}
    assert decays == {"0.weight": 0.1, "0.bias": 0.1, "1.weight": 0.0}


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        (dict(norm_decay_mul=0.0), "norm_decay_mul`.*did you mean 'norm_decay_mult'"),
        (dict(whatever=0.0), "expected one of bias_lr_mult"),
        (dict(custom_keys={"backbon_": dict(lr_mult=0.1)}), "no parameter has it in its name; did you mean 'backbone'"),
        (dict(custom_keys={"zzz": dict(lr_mult=0.1)}), "the first parameters are logit_scale"),
        (dict(custom_keys={"head": dict(lr_mul=0.1)}), "lr_mul`.*did you mean 'lr_mult'"),
        (dict(custom_keys={"head": 0.1}), "expected a dict such as"),
        (dict(custom_keys={"": dict(lr_mult=0)}), "no trainable parameter"),
    ],
    ids=str,
)
def test_mistakes_are_reported(case, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build_optim_wrapper(Model(), dict(optimizer=dict(type="SGD", lr=0.1), paramwise_cfg=case))


def test_a_multiplier_that_the_optimizer_does_not_have_is_an_error():
    cfg = dict(optimizer=dict(type="Rprop", lr=0.1), paramwise_cfg=dict(norm_decay_mult=0.0))
    with pytest.raises(
        ConfigError, match="norm_decay_mult multiplies weight_decay, which this optimizer does not have"
    ):
        build_optim_wrapper(Model(), cfg)
