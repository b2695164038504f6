"""Every schedule against MMEngine's scheduler of the same name, stepped as its ParamSchedulerHook steps it."""

import math
import warnings
from dataclasses import dataclass

import pytest
import torch

from mmtrain.errors import ConfigError, RunError
from mmtrain.optim import OptimWrapper, OptimWrapperDict, Schedule, build_schedules
from mmtrain.registry import PARAM_SCHEDULERS

ITERATIONS = 1000


def sgd(lrs=(0.1, 0.02)):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs], momentum=0.9)


def adam(lrs=(1e-3, 3e-4)):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    groups[1]["betas"] = (0.8, 0.99)
    return torch.optim.AdamW(groups, weight_decay=0.05)


def read(optimizer, name):
    if name == "momentum" and "betas" in optimizer.param_groups[0]:
        return [group["betas"][0] for group in optimizer.param_groups]
    return [group[name] for group in optimizer.param_groups]


def mmengine_values(cfgs, optimizer, name, *, per_epoch, iterations=ITERATIONS):
    """What MMEngine's runner would set before each iteration."""
    from mmengine.registry import PARAM_SCHEDULERS as ROOT

    schedulers = []
    for cfg in cfgs:
        end = -(-iterations // per_epoch) if cfg.get("by_epoch", True) else iterations
        arguments = {"end": end, **cfg, "optimizer": optimizer, "epoch_length": per_epoch}
        schedulers.append(ROOT.build(arguments))
    optimizer.step()  # once: else MMEngine's schedulers warn
    values = []
    for iteration in range(iterations):
        values.append(read(optimizer, name))
        for scheduler in schedulers:
            if not scheduler.by_epoch:
                scheduler.step()
        if (iteration + 1) % per_epoch == 0:
            for scheduler in schedulers:
                if scheduler.by_epoch:
                    scheduler.step()
    return values


def our_values(cfgs, optimizer, name, *, per_epoch, iterations=ITERATIONS):
    """What `apply` sets before each iteration."""
    schedules = build_schedules(cfgs, OptimWrapper(optimizer), max_iters=iterations, iterations_per_epoch=per_epoch)
    values = []
    for iteration in range(iterations):
        schedules.apply(iteration, iteration // per_epoch)
        values.append(read(optimizer, name))
    return values


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    worst = 0.0
    for iteration, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        for mine, reference in zip(own, other, strict=True):
            difference = abs(mine - reference)
            assert difference <= max(1e-9 * abs(reference), 1e-15), (iteration, mine, reference)
            worst = max(worst, difference)


EPOCH, ITER = {"by_epoch": True}, {"by_epoch": False}
CONVERT = {"by_epoch": True, "convert_to_iter_based": True}

SINGLE = [
    dict(form="Constant", factor=0.25, **ITER),
    dict(form="Constant", factor=0.5, begin=100, end=400, **ITER),
    dict(form="Constant", end=5, **EPOCH),
    dict(form="Constant", factor=0.3, begin=2.5, end=5, **CONVERT),
    dict(form="Linear", **ITER),
    dict(form="Linear", start_factor=1e-3, end=100, **ITER),
    dict(form="Linear", start_factor=1.0, end_factor=0.0, begin=200, end=700, **ITER),
    dict(form="Linear", start_factor=0.1, end=5, **EPOCH),
    dict(form="Linear", start_factor=0.01, end=2.5, **CONVERT),
    dict(form="Exponential", gamma=0.995, **ITER),
    dict(form="Exponential", gamma=0.9, begin=3, end=12, **EPOCH),
    dict(form="Exponential", gamma=0.999, begin=1, **CONVERT),
    dict(form="Step", step_size=150, **ITER),
    dict(form="Step", step_size=70, gamma=0.7, begin=33, end=555, **ITER),
    dict(form="Step", step_size=3, gamma=0.5, **EPOCH),
    dict(form="Step", step_size=2, begin=1, **CONVERT),
    dict(form="MultiStep", milestones=[200, 600, 900], **ITER),
    dict(form="MultiStep", milestones=[0, 100, 100, 300, 800], gamma=0.5, begin=50, end=700, **ITER),
    dict(form="MultiStep", milestones=[8, 11], **EPOCH),
    dict(form="MultiStep", milestones=[2, 7], gamma=0.3, begin=1, **CONVERT),
    dict(form="Poly", power=0.9, **ITER),
    dict(form="Poly", power=2.0, eta_min=1e-4, begin=100, end=800, **ITER),
    dict(form="Poly", eta_min=1e-5, **EPOCH),
    dict(form="Poly", power=0.9, eta_min=1e-4, begin=0.5, **CONVERT),
    dict(form="CosineAnnealing", **ITER),
    dict(form="CosineAnnealing", eta_min=1e-5, begin=100, **ITER),
    dict(form="CosineAnnealing", eta_min_ratio=0.1, T_max=300, **ITER),
    dict(form="CosineAnnealing", T_max=130, eta_min=1e-5, begin=77, end=640, **ITER),
    dict(form="CosineAnnealing", T_max=333.3, eta_min_ratio=0.05, **ITER),
    dict(form="CosineAnnealing", T_max=1, **EPOCH),
    dict(form="CosineAnnealing", T_max=7, eta_min=1e-4, **EPOCH),
    dict(form="CosineAnnealing", eta_min=1e-6, begin=1, T_max=12, **CONVERT),
    dict(form="CosineRestart", periods=[100, 200, 400], restart_weights=[1, 0.5, 0.25], eta_min=1e-5, **ITER),
    dict(form="CosineRestart", periods=[300], eta_min_ratio=0.1, begin=20, **ITER),
    dict(form="CosineRestart", periods=[5, 5, 10], restart_weights=[1, 0.9, 0.5], eta_min=0.0, **EPOCH),
    dict(form="CosineRestart", periods=[2, 4, 6], restart_weights=[0.5, 1, 2], eta_min=1e-5, end=11, **CONVERT),
    dict(form="OneCycle", eta_max=0.3, **ITER),
    dict(form="OneCycle", eta_max=0.3, total_steps=999, end=999, pct_start=0.25, anneal_strategy="linear", **ITER),
    dict(form="OneCycle", eta_max=0.3, three_phase=True, div_factor=10.0, final_div_factor=100.0, **ITER),
    dict(form="OneCycle", eta_max=[0.3, 0.1], begin=100, end=700, **ITER),
    dict(form="OneCycle", eta_max=0.1, **EPOCH),
    dict(form="OneCycle", eta_max=0.1, total_steps=9, end=9, pct_start=0.4, **CONVERT),
]


def named(cfg, suffix, **more):
    rest = {key: value for key, value in cfg.items() if key != "form"}
    return {"type": cfg["form"] + suffix, **rest, **more}


def ident(cfg):
    return "-".join([cfg["form"], *(f"{k}={v}" for k, v in cfg.items() if k != "form")])


@pytest.mark.parametrize("cfg", SINGLE, ids=ident)
@pytest.mark.parametrize("per_epoch", [37, 100])
def test_the_lr_is_mmengines(cfg, per_epoch):
    cfgs, iterations = [named(cfg, "LR")], -(-ITERATIONS // per_epoch) * per_epoch
    theirs = mmengine_values(cfgs, sgd(), "lr", per_epoch=per_epoch, iterations=iterations)
    assert_equal(our_values(cfgs, sgd(), "lr", per_epoch=per_epoch, iterations=iterations), theirs)


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("cfg", [cfg for cfg in SINGLE if cfg["form"] != "OneCycle"][::2], ids=ident)
def test_the_momentum_is_mmengines(cfg, make):
    cfgs = [named(cfg, "Momentum")]
    theirs = mmengine_values(cfgs, make(), "momentum", per_epoch=50)
    assert_equal(our_values(cfgs, make(), "momentum", per_epoch=50), theirs)


@pytest.mark.parametrize("cfg", [cfg for cfg in SINGLE if cfg["form"] != "OneCycle"][1::3], ids=ident)
def test_any_group_value_is_mmengines(cfg):
    cfgs = [named(cfg, "ParamScheduler", param_name="weight_decay")]
    theirs = mmengine_values(cfgs, adam(), "weight_decay", per_epoch=50)
    assert_equal(our_values(cfgs, adam(), "weight_decay", per_epoch=50), theirs)


WARMUP_ITER = dict(type="LinearLR", start_factor=1e-3, by_epoch=False, begin=0, end=100)
LISTS = {
    "warm-up then cosine": [WARMUP_ITER, dict(type="CosineAnnealingLR", begin=100, by_epoch=False, eta_min=1e-5)],
    "xtuner": [
        dict(type="LinearLR", start_factor=1e-5, begin=0, end=0.03 * 20, **CONVERT),
        dict(type="CosineAnnealingLR", eta_min=0.0, begin=0.03 * 20, end=20, **CONVERT),
    ],
    "mmdetection 1x": [WARMUP_ITER, dict(type="MultiStepLR", milestones=[8, 11], begin=0, end=20, by_epoch=True)],
    "mmsegmentation": [WARMUP_ITER, dict(type="PolyLR", eta_min=1e-4, power=0.9, begin=100, end=1000, by_epoch=False)],
    "flat then cosine": [
        WARMUP_ITER,
        dict(type="CosineAnnealingLR", eta_min=5e-5, begin=10, end=20, T_max=10, **CONVERT),
    ],
    "gap between": [WARMUP_ITER, dict(type="ExponentialLR", gamma=0.9, begin=5, end=9)],
    "epoch warm-up, cosine that ends early": [
        dict(type="LinearLR", start_factor=0.1, end=5),
        dict(type="CosineAnnealingLR", begin=5, end=15, eta_min_ratio=0.01),
    ],
    "constant then one cycle then cosine": [
        dict(type="ConstantLR", factor=0.1, begin=0, end=50, by_epoch=False),
        dict(type="OneCycleLR", eta_max=0.2, begin=50, end=500, by_epoch=False),
        dict(type="CosineAnnealingLR", eta_min_ratio=0.5, T_max=100, begin=500, by_epoch=False),
    ],
    "decays after decays": [
        dict(type="StepLR", step_size=50, gamma=0.9, end=300, by_epoch=False),
        dict(type="PolyLR", eta_min=1e-4, begin=300, end=600, by_epoch=False),
        dict(type="CosineAnnealingLR", eta_min=1e-5, T_max=120, begin=600, end=900, by_epoch=False),
        dict(type="LinearLR", start_factor=0.5, begin=900, by_epoch=False),
    ],
    "listed backwards": [
        dict(type="CosineAnnealingLR", begin=100, by_epoch=False, eta_min=1e-5),
        dict(type="LinearLR", start_factor=0.01, end=100, by_epoch=False),
    ],
    "overlap: three multiples": [
        WARMUP_ITER,
        dict(type="ExponentialLR", gamma=0.97, begin=1),
        dict(type="CosineAnnealingLR", begin=50, by_epoch=False),
    ],
    "overlap: warm-up inside a cosine with a floor": [
        WARMUP_ITER,
        dict(type="CosineAnnealingLR", eta_min=1e-3, begin=0, by_epoch=False),
    ],
    "overlap: the same in the other order": [
        dict(type="CosineAnnealingLR", eta_min=1e-3, begin=0, by_epoch=False),
        WARMUP_ITER,
    ],
    "overlap: epoch-based poly with a floor and iteration-based warm-up": [
        dict(type="PolyLR", eta_min=1e-3, power=0.9),
        WARMUP_ITER,
        dict(type="MultiStepLR", milestones=[3, 9], gamma=0.5),
    ],
    "overlap: restarts and steps, then linear": [
        dict(
            type="CosineRestartLR", periods=[100, 200], restart_weights=[1, 0.5], eta_min=1e-4, end=400, by_epoch=False
        ),
        dict(type="StepLR", step_size=70, gamma=0.8, begin=20, end=300, by_epoch=False),
        dict(type="LinearLR", start_factor=0.5, begin=400, end=600, by_epoch=False),
    ],
    "overlap: cosine far past its T_max": [
        dict(type="CosineAnnealingLR", T_max=150, by_epoch=False),
        dict(type="ExponentialLR", gamma=0.999, by_epoch=False),
    ],
    "overlap: one cycle and decay": [
        dict(type="OneCycleLR", eta_max=0.2, by_epoch=False),
        dict(type="MultiStepLR", milestones=[500], by_epoch=False),
    ],
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_compose_as_mmengines_do(name):
    cfgs = LISTS[name]
    theirs = mmengine_values(cfgs, sgd(), "lr", per_epoch=50)
    assert_equal(our_values(cfgs, sgd(), "lr", per_epoch=50), theirs)


@pytest.mark.parametrize("name", LISTS)
def test_a_value_depends_only_on_the_position(name):
    cfgs = LISTS[name]
    schedules = build_schedules(cfgs, OptimWrapper(sgd()), max_iters=ITERATIONS, iterations_per_epoch=50)
    forwards = [schedules.values(iteration, iteration // 50) for iteration in range(ITERATIONS)]
    for jump in range(40):
        iteration = (jump * 617) % ITERATIONS
        assert schedules.values(iteration, iteration // 50) == forwards[iteration]


def test_lr_and_momentum_are_scheduled_side_by_side():
    cfgs = [
        dict(type="CosineAnnealingLR", by_epoch=False),
        dict(type="LinearMomentum", start_factor=0.5, end=300, by_epoch=False),
        dict(type="CosineAnnealingMomentum", eta_min_ratio=0.9, begin=300, by_epoch=False),
    ]
    for name in ("lr", "momentum"):
        assert_equal(our_values(cfgs, adam(), name, per_epoch=50), mmengine_values(cfgs, adam(), name, per_epoch=50))
    optimizer = adam()
    build_schedules(cfgs, OptimWrapper(optimizer), max_iters=1000).apply(400, 0)
    assert [group["betas"][1] for group in optimizer.param_groups] == [0.999, 0.99]


def test_the_forms_of_the_seeds():
    """seeds/001: cosine to a tenth; seeds/002: linear from zero, then a cosine to zero."""
    tenth = dict(type="CosineAnnealingLR", eta_min_ratio=0.1, by_epoch=False)
    for t, (lr, _) in enumerate(our_values([tenth], sgd((5e-4, 1.0)), "lr", per_epoch=50)):
        assert lr == pytest.approx(5e-4 * (0.1 + 0.45 * (1 + math.cos(math.pi * t / 1000))), rel=1e-12)
    for warmup in (dict(warmup_iters=250), dict(warmup_ratio=0.25)):
        values = our_values([dict(type="WarmupCosineLR", **warmup)], sgd((1e-4, 1.0)), "lr", per_epoch=50)
        assert [values[step][0] for step in (0, 125, 250)] == [0, 0.5e-4, 1e-4]
        for t in range(250, 1000):
            expected = 1e-4 * (1 + math.cos(math.pi * (t - 250) / 750)) / 2
            assert values[t][0] == pytest.approx(expected, rel=1e-12)
    floor = our_values(
        [dict(type="WarmupCosineLR", warmup_iters=100, eta_min=1e-5)], sgd((1e-4, 1e-3)), "lr", per_epoch=9
    )
    assert floor[50] == [0.5e-4, 0.5e-3]
    assert floor[550] == pytest.approx([(1e-4 + 1e-5) / 2, (1e-3 + 1e-5) / 2])


def test_a_warm_up_may_start_at_zero_and_ends_at_the_configs_value():
    """MMEngine's recursion divides by zero here."""
    values = our_values([dict(type="LinearLR", start_factor=0.0, end=10, by_epoch=False)], sgd(), "lr", per_epoch=50)
    assert [row[0] for row in values[:3]] == pytest.approx([0, 0.1 / 9, 0.2 / 9])
    assert values[9] == values[999] == [0.1, 0.02]


def test_end_is_the_runs_true_length_in_both_units():
    """MMEngine takes max_epochs=1 in an iteration-based run, and the value froze after one epoch (xtuner#386)."""
    cfg = dict(type="CosineAnnealingLR", **CONVERT)
    for length in (dict(max_iters=24), dict(max_epochs=3)):
        optimizer = sgd()
        schedules = build_schedules([cfg], OptimWrapper(optimizer), iterations_per_epoch=8, **length)
        assert schedules.notices == []
        assert schedules.values(12, 1)[0]["lr"] == pytest.approx(0.05)
    partial = build_schedules([cfg], OptimWrapper(sgd()), max_iters=25, iterations_per_epoch=10)
    assert partial.values(5, 0)[0]["lr"] == pytest.approx(0.1 * (1 + math.cos(math.pi / 5)) / 2)
    falling = dict(type="LinearLR", start_factor=1.0, end_factor=0.0)
    by_epoch = build_schedules([falling], OptimWrapper(sgd()), max_iters=25, iterations_per_epoch=10)
    assert [by_epoch.values(i, e)[0]["lr"] for i, e in ((9, 0), (10, 1), (24, 2))] == [0.1, 0.05, 0]


def test_parts_of_an_epoch_are_rounded_down_to_iterations():
    """MMEngine compares the iteration with 18.75, and such a milestone never comes."""
    cfg = dict(type="MultiStepLR", milestones=[0.29, 1.25], **CONVERT)
    schedules = build_schedules(cfg, OptimWrapper(sgd()), max_iters=1000, iterations_per_epoch=15)
    assert [schedules.values(t, 0)[0]["lr"] for t in (3, 4, 17, 18)] == pytest.approx([0.1, 0.01, 0.01, 0.001])
    exact = build_schedules(cfg, OptimWrapper(sgd()), max_iters=1000, iterations_per_epoch=100)
    assert [exact.values(t, 0)[0]["lr"] for t in (28, 29)] == pytest.approx([0.1, 0.01])  # 0.29 * 100 < 29 in floats


def test_one_cycle_ends_after_its_total_steps():
    """MMEngine goes one step past the last phase, below zero when the annealing is linear, and then raises."""
    cfg = dict(type="OneCycleLR", eta_max=1.0, total_steps=100, anneal_strategy="linear", by_epoch=False)
    schedules = build_schedules(cfg, OptimWrapper(sgd()), max_iters=1000)
    assert schedules.values(99, 0) == schedules.values(999, 0)
    assert schedules.values(999, 0)[0]["lr"] == pytest.approx(1 / 25 / 1e4)


def test_epoch_based_values_depend_only_on_the_epoch():
    schedules = build_schedules(
        dict(type="StepLR", step_size=1), OptimWrapper(sgd()), max_epochs=4, iterations_per_epoch=10
    )
    assert schedules.values(19, 2)[0]["lr"] == schedules.values(999, 2)[0]["lr"] == pytest.approx(0.001)


def test_values_returns_what_apply_sets_and_changes_nothing():
    optimizer = sgd()
    schedules = build_schedules([WARMUP_ITER], OptimWrapper(optimizer), max_iters=1000)
    # the last row is the group without multipliers, which MMEngine's logs call base_lr
    assert [row["lr"] for row in schedules.values(50, 0)[:2]] != read(optimizer, "lr")
    assert read(optimizer, "lr") == [0.1, 0.02]
    schedules.apply(50, 0)
    assert [row["lr"] for row in schedules.values(50, 0)[:2]] == read(optimizer, "lr")
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.1, 0.02]


def test_the_base_lr_of_several_groups_is_scheduled_too():
    wrapper = OptimWrapper(
        torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 1.0}, {"params": [torch.ones(1)]}], lr=0.5)
    )
    build_schedules(dict(type="StepLR", step_size=10, by_epoch=False), wrapper, max_iters=100).apply(10, 0)
    assert wrapper.get_lr() == {"base_lr": [pytest.approx(0.05)], "lr": [pytest.approx(0.1), pytest.approx(0.05)]}


def test_a_tensor_lr_is_filled_in_place():
    lr = torch.tensor(0.5)
    wrapper = OptimWrapper(torch.optim.Adam([torch.zeros(1)], lr=lr, capturable=True))
    build_schedules(dict(type="StepLR", step_size=1, by_epoch=False), wrapper, max_iters=10).apply(1, 0)
    assert wrapper.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.05)


def test_the_groups_may_be_replaced_by_loading_an_optimizers_state():
    wrapper = OptimWrapper(sgd())
    schedules = build_schedules(dict(type="StepLR", step_size=1, by_epoch=False), wrapper, max_iters=10)
    wrapper.optimizer.load_state_dict(sgd((7.0, 8.0)).state_dict())
    schedules.apply(1, 0)
    assert read(wrapper.optimizer, "lr") == pytest.approx([0.01, 0.002])


def test_resuming_far_into_a_run_costs_what_the_start_costs():
    calls = []

    @dataclass(kw_only=True, eq=False)
    class Counting(Schedule):
        def multiple(self, t):
            calls.append(t)
            return 1.0

    schedules = build_schedules([Counting(by_epoch=False)], OptimWrapper(sgd()), max_iters=2_000_000)
    calls.clear()
    schedules.apply(1_000_000, 0)
    assert calls == [1_000_000]


def test_a_users_schedule():
    @PARAM_SCHEDULERS.register_module()
    class InverseRootLR(Schedule):
        def multiple(self, t):
            return (t + 1) ** -0.5

    @PARAM_SCHEDULERS.register_module()
    class HalvingLR(Schedule):
        def __init__(self, every, **kwargs):
            super().__init__(**kwargs)
            self.every = every

        def multiple(self, t):
            return 0.5 ** (t // self.every)

    try:
        cfgs = [
            dict(type="InverseRootLR", by_epoch=False, end=16),
            dict(type="HalvingLR", every=10, begin=16, by_epoch=False),
        ]
        schedules = build_schedules(cfgs, OptimWrapper(sgd()), max_iters=100)
        assert schedules.values(3, 0)[0]["lr"] == pytest.approx(0.05)
        assert schedules.values(26, 0)[0]["lr"] == pytest.approx(0.1 / 4 / 2)
        with pytest.raises(ConfigError, match=r"requires the argument 'every'; found 'evry'; did you mean 'every'"):
            build_schedules([dict(type="HalvingLR", evry=10)], OptimWrapper(sgd()), max_iters=100)
    finally:
        for name in ("InverseRootLR", "HalvingLR"):
            del PARAM_SCHEDULERS.module_dict[name]


def test_mmengines_classes_resolve_to_ours_and_recursive_ones_are_refused():
    from mmengine.optim import CosineAnnealingLR, _ParamScheduler

    from mmtrain.optim import CosineAnnealingLR as Ours

    class Recursive(_ParamScheduler):
        pass

    wrapper = OptimWrapper(sgd())
    assert build_schedules([dict(type=CosineAnnealingLR, by_epoch=False)], wrapper, max_iters=10).tracks
    assert issubclass(Ours, Schedule)
    with pytest.raises(ConfigError, match=r"derive from mmtrain.optim.Schedule and give multiple"):
        build_schedules([dict(type=Recursive, param_name="lr")], wrapper, max_iters=10)


@pytest.mark.parametrize(
    ("cfgs", "notices"),
    [
        ([WARMUP_ITER, dict(type="CosineAnnealingLR", begin=100, by_epoch=False)], []),
        (
            [dict(type="LinearLR", end=100, by_epoch=False),
             dict(type="CosineAnnealingLR", begin=100, end=500, eta_min=1e-5, by_epoch=False)],
            ["param_scheduler[1] CosineAnnealingLR ends at iteration 500 of 1000: the lr stays at 1.0"],
        ),
        (
            [WARMUP_ITER, dict(type="CosineAnnealingLR", begin=50, by_epoch=False)],
            ["param_scheduler[1] CosineAnnealingLR begins at iteration 50, inside param_scheduler[0] LinearLR "
             "(0 to 100): both act on the lr"],
        ),
        (
            [dict(type="StepLR", step_size=5, begin=20)],
            ["param_scheduler[0] StepLR (begin=1000) never takes effect: the run ends at iteration 1000"],
        ),
        (
            [dict(type="LinearLR", end=0.01, **CONVERT), dict(type="CosineAnnealingLR", begin=0.01, **CONVERT)],
            ["param_scheduler[0] LinearLR never takes effect: it covers less than one iteration"],
        ),
        (
            [dict(type="LinearMomentum", end=3)],
            ["param_scheduler[0] LinearMomentum ends at iteration 150 of 1000: the momentum stays at 0.9 after it"],
        ),
    ],
)  # fmt: skip
def test_notices(cfgs, notices):
    schedules = build_schedules(cfgs, OptimWrapper(sgd()), max_iters=1000, iterations_per_epoch=50)
    assert len(schedules.notices) == len(notices)
    for found, expected in zip(schedules.notices, notices, strict=True):
        assert found.startswith(expected)


@pytest.mark.parametrize(
    ("cfg", "sentence"),
    [
        (dict(type="CosineAnnealingLR", begin=-1), "begin is -1"),
        (dict(type="CosineAnnealingLR", begin=5, end=5), "end is 5, expected more than begin"),
        (dict(type="CosineAnnealingLR", T_max=0), "T_max is 0"),
        (dict(type="CosineAnnealingLR", eta_min=0.1, eta_min_ratio=0.1), "both eta_min and eta_min_ratio"),
        (dict(type="CosineAnnealingLR", begin=0.5), "begin is 0.5 epochs.*convert_to_iter_based"),
        (dict(type="CosineAnnealingLR", by_epoch=False, convert_to_iter_based=True), "needs by_epoch=True"),
        (dict(type="CosineAnnealingLR", eta_mni=0.1), "eta_mni.*eta_min"),
        (dict(type="CosineAnealingLR"), "CosineAnnealingLR"),
        (dict(T_max=3), "'type' is missing"),
        (dict(type="LinearLR", start_factor=2.0), "start_factor is 2.0, expected 0 to 1"),
        (dict(type="ConstantLR", factor=-1), "factor is -1"),
        (dict(type="ExponentialLR"), "gamma"),
        (dict(type="StepLR", step_size=0), "step_size is 0"),
        (dict(type="MultiStepLR", milestones=[3, 1]), "rising"),
        (dict(type="CosineRestartLR", periods=[3, 4]), "there are 2 periods and 1 restart_weights"),
        (dict(type="OneCycleLR", eta_max=0.1, total_steps=3, end=9), "total_steps is 3, expected at least"),
        (dict(type="OneCycleLR", eta_max=[0.1]), "eta_max has 1 values"),
        (dict(type="OneCycleParamScheduler", param_name="momentum", eta_max=1), "expected 'lr'"),
        (dict(type="CosineAnnealingParamScheduler"), "param_name"),
        (dict(type="CosineAnnealingParamScheduler", param_name="weight_deca"), "did you mean 'weight_decay'"),
        (dict(type="WarmupCosineLR"), "one of warmup_iters and warmup_ratio"),
        (dict(type="WarmupCosineLR", warmup_iters=5000), "expected 0 to 1000"),
        (dict(type="ReduceOnPlateauLR", rule="max"), "rule is 'max'"),
        (dict(type="ReduceOnPlateauLR", by_epoch=False), "by_epoch=True"),
        (3, "is not a schedule"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_a_wrong_config_is_reported_in_one_sentence(cfg, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        build_schedules([cfg], OptimWrapper(sgd()), max_iters=1000, iterations_per_epoch=50)
    assert "param_scheduler[0]" in str(caught.value)


def test_epochs_of_unknown_length_are_refused_for_epoch_based_schedules():
    with pytest.raises(ConfigError, match="epochs of known length"):
        build_schedules(dict(type="CosineAnnealingLR"), OptimWrapper(sgd()), max_iters=100)
    with pytest.raises(ConfigError, match="give end"):
        build_schedules(dict(type="CosineAnnealingLR", by_epoch=False), OptimWrapper(sgd()), max_epochs=3)


@pytest.mark.parametrize("first", [dict(type="WarmupCosineLR", warmup_iters=10),
                                   dict(type="LinearLR", start_factor=0.0, end=10, by_epoch=False)])  # fmt: skip
def test_undefined_overlaps_are_refused(first):
    cfgs = [first, dict(type="CosineAnnealingLR", eta_min=0.01, by_epoch=False)]
    with pytest.raises(ConfigError, match="let one begin where the other ends"):
        build_schedules(cfgs, OptimWrapper(sgd()), max_iters=100)


def test_several_optimizers_share_schedules_or_have_their_own():
    def wrappers():
        return OptimWrapperDict(gen=OptimWrapper(sgd((0.1,))), disc=OptimWrapper(sgd((0.2,))))

    step = dict(type="StepLR", step_size=10, by_epoch=False)
    both = wrappers()
    build_schedules([step], both, max_iters=100).apply(10, 0)
    assert [both[name].param_groups[0]["lr"] for name in ("gen", "disc")] == pytest.approx([0.01, 0.02])
    own = wrappers()
    build_schedules({"gen": [step]}, own, max_iters=100).apply(10, 0)
    assert [own[name].param_groups[0]["lr"] for name in ("gen", "disc")] == pytest.approx([0.01, 0.2])
    with pytest.raises(ConfigError, match=r"generator.*expected gen, disc"):
        build_schedules({"generator": [step]}, own, max_iters=100)


# ---- ReduceOnPlateau ----
PLATEAUS = [
    dict(patience=2),
    dict(patience=1, cooldown=2, factor=0.5),
    dict(rule="greater", patience=0, threshold=0.05, threshold_rule="abs", min_value=0.005),
    dict(patience=0, threshold=0.1, factor=0.3, eps=1e-3),
    dict(patience=1, begin=3, end=20),
    dict(patience=0, min_value=[0.01, 0.001]),
]


def metrics_of(epochs=40):
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(epochs, generator=generator).tolist()
    return [1 / (1 + epoch // 6) + 0.1 * noise[epoch] for epoch in range(epochs)]


@pytest.mark.parametrize("suffix", ["LR", "Momentum"])
@pytest.mark.parametrize("cfg", PLATEAUS, ids=str)
def test_a_plateau_is_mmengines(cfg, suffix):
    from mmengine.optim import ReduceOnPlateauLR, ReduceOnPlateauMomentum

    name = "lr" if suffix == "LR" else "momentum"
    theirs, ours = sgd(), sgd()
    reference = (ReduceOnPlateauLR if suffix == "LR" else ReduceOnPlateauMomentum)(theirs, monitor="loss", **cfg)
    schedules = build_schedules(
        [dict(type=f"ReduceOnPlateau{suffix}", monitor="loss", **cfg)], OptimWrapper(ours), max_epochs=40
    )
    for epoch, value in enumerate(metrics_of(), start=1):
        reference.step()
        reference.step({"loss": value})
        schedules.observe({"loss": torch.tensor(value, dtype=torch.float64)}, epoch=epoch)
        schedules.apply(epoch * 10, epoch)
        assert read(ours, name) == pytest.approx(read(theirs, name), rel=1e-12)
        # the state goes through a checkpoint after every epoch, and a new set continues with it
        state = schedules.state_dict()
        schedules = build_schedules(
            [dict(type=f"ReduceOnPlateau{suffix}", monitor="loss", **cfg)], OptimWrapper(ours), max_epochs=40
        )
        assert schedules.load_state_dict(state) == []


def test_a_plateau_scales_the_other_schedules_and_the_current_lr():
    def make(lr):
        cfgs = [
            dict(type="LinearLR", start_factor=0.5, end=10, by_epoch=False),
            dict(type="ReduceOnPlateauLR", patience=0),
        ]
        return build_schedules(cfgs, OptimWrapper(sgd((lr,))), max_iters=100)

    schedules = make(0.1)
    schedules.observe({"loss": 1.0})
    schedules.observe({"loss": 2.0})
    assert schedules.values(0, 0)[0]["lr"] == pytest.approx(0.005)
    assert schedules.values(50, 0)[0]["lr"] == pytest.approx(0.01)
    resumed = make(0.4)
    assert resumed.load_state_dict(schedules.state_dict()) == []
    assert resumed.values(50, 0)[0]["lr"] == pytest.approx(0.04)


def test_a_plateaus_state_is_kept_by_name():
    def make(*cfgs):
        return build_schedules(list(cfgs), OptimWrapper(sgd()), max_iters=100)

    plateau = dict(type="ReduceOnPlateauLR", patience=0)
    schedules = make(plateau)
    schedules.observe({"loss": 1.0})
    schedules.observe({"loss": 2.0})
    state = schedules.state_dict()
    assert state == {"ReduceOnPlateauLR.lr.loss": {"best": 1.0, "bad": 0, "cooling": 0, "reductions": 1}}
    moved = make(dict(type="LinearMomentum", by_epoch=False), plateau)
    assert moved.load_state_dict(state) == []
    assert moved.state_dict() == state
    other = make(dict(type="ReduceOnPlateauLR", monitor="accuracy", rule="greater"))
    assert other.load_state_dict(state) == [
        "ReduceOnPlateauLR.lr.loss: not in today's config, its counters are dropped",
        "ReduceOnPlateauLR.lr.accuracy: not in the checkpoint, it starts afresh",
    ]
    with pytest.raises(RunError, match="did not report 'accuracy'; it reported: loss"):
        other.observe({"loss": 1.0})


def test_nothing_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_schedules(LISTS["xtuner"], OptimWrapper(sgd()), max_epochs=20, iterations_per_epoch=50).apply(3, 0)
        assert build_schedules(None, OptimWrapper(sgd()), max_iters=3).state_dict() == {}
