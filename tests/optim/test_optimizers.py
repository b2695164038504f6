import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

from mmtrain.errors import ConfigError
from mmtrain.optim import (
    AmpOptimWrapper,
    DefaultOptimWrapperConstructor,
    OptimWrapper,
    OptimWrapperDict,
    build_optim_wrapper,
    build_schedules,
    scale_lr,
)
from mmtrain.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS


def model():
    return nn.Linear(3, 2)


def build(optimizer, *, of=None, **rest):
    return build_optim_wrapper(of or model(), dict(optimizer=optimizer, **rest))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_the_fused_implementation_is_used_if_available(name):
    wrapper = build(dict(type=name, lr=0.1))
    assert wrapper.param_groups[0]["fused"] is True
    wrapper.backward(wrapper.param_groups[0]["params"][0].sum())
    assert wrapper.finish_window().applied


@pytest.mark.parametrize("name", ["RMSprop", "NAdam", "Adadelta", "LBFGS"])
def test_others_are_built_as_torch_builds_them(name):
    assert "fused" not in build(dict(type=name, lr=0.1)).optimizer.defaults


@pytest.mark.parametrize(
    "choice", [dict(fused=False), dict(foreach=True), dict(foreach=False), dict(differentiable=True)]
)
def test_the_configs_implementation_wins(choice):
    defaults = build(dict(type="AdamW", lr=0.1, **choice)).optimizer.defaults
    assert not defaults["fused"]
    assert all(defaults[key] == value for key, value in choice.items())


def test_parameters_that_fused_kernels_do_not_support():
    complex_model = nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    assert not build(dict(type="Adam", lr=0.1), of=complex_model).optimizer.defaults["fused"]
    sparse = nn.Embedding(4, 2, sparse=True)
    wrapper = build(dict(type="SGD", lr=0.1), of=sparse)
    wrapper.backward(sparse(torch.tensor([1])).sum())
    assert wrapper.finish_window().applied


def test_classes_names_and_objects():
    assert type(build(dict(type=torch.optim.AdamW, lr=0.1)).optimizer) is torch.optim.AdamW
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert build(optimizer, of=net).optimizer is optimizer
    assert build_optim_wrapper(net, optimizer).optimizer is optimizer
    wrapper = OptimWrapper(optimizer)
    assert build_optim_wrapper(net, wrapper) is wrapper


def test_the_wrappers_arguments_and_type():
    cfg = dict(type="SGD", lr=0.1)
    plain = build(cfg, accumulative_counts=3, clip_grad=dict(max_norm=2))
    assert type(plain) is OptimWrapper
    assert (plain.accumulative_counts, plain.clip_grad["max_norm"]) == (3, 2.0)
    amp = build(cfg, type="AmpOptimWrapper", dtype="bfloat16")
    assert type(amp) is AmpOptimWrapper
    from mmengine.optim import OptimWrapper as MMEngineWrapper

    assert type(build(cfg, type=MMEngineWrapper)) is OptimWrapper


def test_the_config_is_not_changed():
    cfg = dict(
        optimizer=dict(type="SGD", lr=0.1), clip_grad=dict(type="norm", max_norm=1), paramwise_cfg=dict(bias_lr_mult=2)
    )
    before = repr(cfg)
    build_optim_wrapper(model(), cfg)
    assert repr(cfg) == before


def test_a_model_inside_a_wrapper_gives_plain_names():
    holder = nn.Module()
    holder.module = model()
    (group,) = build(dict(type="SGD", lr=0.1), of=holder).param_groups
    assert [id(p) for p in group["params"]] == [id(holder.module.weight), id(holder.module.bias)]


def test_a_users_optimizer_whose_first_argument_has_another_name():
    class Plain(torch.optim.Optimizer):
        def __init__(self, model_params, rate=0.1):
            super().__init__(model_params, dict(lr=rate))

        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.sub_(parameter.grad, alpha=group["lr"])

    OPTIMIZERS.register_module(module=Plain, name="PlainOfTheTest")
    try:
        net = model()
        wrapper = build(dict(type="PlainOfTheTest", rate=0.5), of=net)
        before = net.weight.detach().clone()
        wrapper.backward(net.weight.sum() + net.bias.sum())
        wrapper.finish_window()
        assert torch.equal(net.weight, before - 0.5)
    finally:
        del OPTIMIZERS.module_dict["PlainOfTheTest"]


def test_users_constructors():
    class PerLayer(DefaultOptimWrapperConstructor):
        def make_groups(self, model, optimizer_class):
            return [dict(params=[p], param_names=[n], lr=i + 1.0) for i, (n, p) in enumerate(model.named_parameters())]

    class ForGan:
        def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
            self.cfg = optim_wrapper_cfg

        def __call__(self, model):
            return OptimWrapperDict(**{name: build_optim_wrapper(model[name], cfg) for name, cfg in self.cfg.items()})

    for cls in (PerLayer, ForGan):
        OPTIM_WRAPPER_CONSTRUCTORS.register_module(module=cls)
    try:
        groups = build(dict(type="SGD", lr=0.1), constructor="PerLayer").param_groups
        assert [group["lr"] for group in groups] == [1.0, 2.0]
        one = dict(optimizer=dict(type="SGD", lr=0.1))
        gan = nn.ModuleDict(dict(gen=model(), disc=model()))
        made = build_optim_wrapper(gan, dict(constructor="ForGan", gen=one, disc=one))
        assert list(made) == ["gen", "disc"]
        assert scale_lr(dict(enable=True, base_batch_size=1), made, effective_batch=2)
        assert made.get_lr() == {"gen.lr": [0.2], "disc.lr": [0.2]}
    finally:
        for cls in (PerLayer, ForGan):
            del OPTIM_WRAPPER_CONSTRUCTORS.module_dict[cls.__name__]


def test_constructors_written_for_mmengine_decide_the_optimizer():
    from mmengine.optim import DefaultOptimWrapperConstructor as Theirs

    class LayerDecay(Theirs):
        def add_params(self, params, module, **kwargs):
            for depth, parameter in enumerate(module.parameters()):
                params.append(dict(params=[parameter], lr=self.base_lr * 0.5**depth))

    logging.getLogger("mmengine").setLevel(logging.ERROR)
    wrapper = build(
        dict(type="SGD", lr=0.1),
        constructor=LayerDecay,
        paramwise_cfg=dict(bias_lr_mult=1),
        clip_grad=dict(max_norm=1.0),
    )
    assert type(wrapper) is OptimWrapper
    assert wrapper.clip_grad["max_norm"] == 1.0
    assert [group["lr"] for group in wrapper.param_groups] == [0.1, 0.05]


@pytest.mark.parametrize(
    ("cfg", "sentence"),
    [
        (3, "`optim_wrapper`.*expected a dict with 'optimizer'"),
        (dict(type="OptimWrapper"), "'optimizer' is missing"),
        (dict(optimiser=dict(type="SGD")), "did you mean 'optimiser'"),
        (dict(optimizer="SGD"), r"optim_wrapper.optimizer`.*expected a dict with 'type'"),
        (dict(optimizer=dict(lr=0.1)), "'type' is missing"),
        (dict(optimizer=dict(type="AdmaW", lr=0.1)), "AdamW"),
        (dict(optimizer=dict(type="SGD", lr=0.1, momentun=0.9)), "momentun.*did you mean 'momentum'"),
        (dict(optimizer=dict(type="SGD", lr=-1.0)), "Invalid learning rate"),
        (dict(optimizer=dict(type="SGD", lr=0.1), clip_gard=dict(max_norm=1)), "clip_gard.*did you mean 'clip_grad'"),
        (dict(optimizer=dict(type="SGD", lr=0.1), clip_grad=dict(max_nrom=1)), "max_nrom.*did you mean 'max_norm'"),
        (dict(optimizer=dict(type="SGD", lr=0.1), clip_grad=dict(norm_type=2)), "expected max_norm as a number"),
        (
            dict(optimizer=dict(type="SGD", lr=0.1), clip_grad=dict(type="size", max_norm=1)),
            "expected 'norm' or 'value'",
        ),
        (dict(optimizer=dict(type="SGD", lr=0.1), clip_grad=dict(max_norm=0)), "expected more than 0"),
        (dict(optimizer=dict(type="SGD", lr=0.1), clip_grad={}), "expected None or a dict"),
        (dict(optimizer=dict(type="SGD", lr=0.1), accumulative_counts=0), "accumulative_counts.*integer of 1 or more"),
        (dict(optimizer=dict(type="SGD", lr=0.1), paramwise_cfg=3), "paramwise_cfg`.*expected a dict"),
        (
            dict(type="AmpOptimWrapper", optimizer=dict(type="SGD", lr=0.1), dtype="float64"),
            "expected 'bfloat16' or 'float16'",
        ),
        (
            dict(type="AmpOptimWrapper", optimizer=dict(type="SGD", lr=0.1), dtype="float16", loss_scale="static"),
            "expected 'dynamic', a number above 0 or a dict",
        ),
        (
            dict(
                type="AmpOptimWrapper",
                optimizer=dict(type="SGD", lr=0.1),
                dtype="float16",
                loss_scale=dict(initscale=1),
            ),
            "initscale",
        ),
    ],
    ids=lambda value: str(value)[-60:],
)
def test_mistakes_are_reported(cfg, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build_optim_wrapper(model(), cfg)


def test_a_model_without_trainable_parameters_is_an_error():
    with pytest.raises(ConfigError, match="no trainable parameter"):
        build(dict(type="SGD", lr=0.1), of=model().requires_grad_(False))


# ---- auto_scale_lr ----
def two_groups():
    cfg = dict(custom_keys={"bias": dict(lr_mult=0.5)})
    return build(dict(type="SGD", lr=0.1), paramwise_cfg=cfg)


@pytest.mark.parametrize(("rule", "factor"), [("linear", 4.0), ("sqrt", 2.0)])
def test_the_lr_is_scaled_before_schedules_take_it_as_their_base(rule, factor):
    wrapper = two_groups()
    notice = scale_lr(dict(enable=True, base_batch_size=64, rule=rule), wrapper, effective_batch=256)
    assert notice == (
        "auto_scale_lr: one update has 256 samples, base_batch_size is 64: "
        f"every lr is multiplied by {factor:g} ({rule})"
    )
    assert wrapper.get_lr() == {"base_lr": [0.1 * factor], "lr": [0.1 * factor, 0.05 * factor]}
    build_schedules(dict(type="StepLR", step_size=1, gamma=0.5, by_epoch=False), wrapper, max_iters=9).apply(1, 0)
    assert wrapper.get_lr()["lr"] == pytest.approx([0.05 * factor, 0.025 * factor])


def test_linear_is_the_default_and_nothing_happens_unless_enabled():
    wrapper = two_groups()
    assert scale_lr(None, wrapper, effective_batch=8) is None
    assert scale_lr(dict(base_batch_size=16), wrapper, effective_batch=8) is None
    assert wrapper.get_lr()["lr"] == [0.1, 0.05]
    assert scale_lr(dict(enable=True, base_batch_size=16), wrapper, effective_batch=8).endswith("0.5 (linear)")


@pytest.mark.parametrize(
    ("cfg", "sentence"),
    [
        (dict(enable=True), "base_batch_size`.*found None"),
        (dict(enable=True, base_batch_size=0), "found 0"),
        (dict(enable=True, base_batch_size=8, rule="cubic"), "found 'cubic', expected 'linear' or 'sqrt'"),
        (dict(enabled=True, base_batch_size=8), "did you mean 'enable'"),
    ],
)
def test_mistakes_in_auto_scale_lr(cfg, sentence):
    with pytest.raises(ConfigError, match=sentence):
        scale_lr(cfg, two_groups(), effective_batch=8)


def test_importing_optim_does_not_import_mmengines():
    code = "import sys, mmtrain.optim; print([m for m in sys.modules if m in ('mmengine.optim', 'mmengine.model')])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
