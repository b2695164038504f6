import copy
import random

import pytest
import torch
from mmengine.model import averaged_model
from torch import nn

from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.hooks import EMAHook


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(3)
        self.deep = nn.ModuleList([nn.Linear(3, 2, bias=False), nn.Linear(2, 1)])


def shake(model, generator):
    """Replace an optimizer step: new weights and new running statistics."""
    with torch.no_grad():
        for value in [*model.parameters(), model.norm.running_mean, model.norm.running_var]:
            value.add_(torch.randn(value.shape, generator=generator))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ({"ema_type": "ExponentialMovingAverage"}, True),
        ({"ema_type": "ExponentialMovingAverage", "momentum": 0.3, "interval": 3}, True),
        ({"ema_type": "ExponentialMovingAverage", "momentum": 0.1, "update_buffers": True}, True),
        ({"ema_type": "MomentumAnnealingEMA", "momentum": 0.002, "gamma": 10}, True),
        ({"ema_type": "MomentumAnnealingEMA", "momentum": 0.2, "gamma": 3, "interval": 2}, True),
        ({"ema_type": "StochasticWeightAverage"}, False),  # MMEngine adds a multiple, we interpolate
        ({"ema_type": "StochasticWeightAverage", "interval": 4}, False),
    ],
)
def test_the_averages_are_mmengines(make_runner, generator, options, exact):
    model = Net()
    theirs_options = {name: value for name, value in options.items() if name != "ema_type"}
    theirs = getattr(averaged_model, options["ema_type"])(model, **theirs_options)
    runner = make_runner(model=model, per_epoch=40)
    hook = EMAHook(**options)
    hook.before_train(runner)
    for _ in range(30):
        shake(model, generator)
        runner.step(hook)
        theirs.update_parameters(model)
        expected = theirs.module.state_dict()
        names = {name for name, _ in model.named_parameters()}
        names |= {"norm.running_mean", "norm.running_var"} if options.get("update_buffers") else set()
        assert set(hook.averages) == names
        for name, average in hook.averages.items():
            if exact:
                assert torch.equal(average, expected[name]), name
            else:
                torch.testing.assert_close(average, expected[name], rtol=1e-5, atol=1e-5)


def test_it_ticks_once_per_applied_update(make_runner, generator):
    model = Net()
    runner = make_runner(model=model)
    hook = EMAHook(momentum=0.5)
    hook.before_train(runner)
    runner.step(hook, last=False)
    assert hook.steps == 0
    runner.step(hook)
    before = copy.deepcopy(hook.averages)
    shake(model, generator)
    runner.step(hook, last=False)
    runner.step(hook, applied=False)  # the scaler skipped it
    assert hook.steps == 1
    assert all(torch.equal(before[name], average) for name, average in hook.averages.items())
    runner.step(hook)
    assert hook.steps == 2


@pytest.mark.parametrize(("options", "first"), [({"begin_iter": 3}, 3), ({"begin_epoch": 2}, 6)])
def test_averaging_begins_at_the_given_position(make_runner, options, first):
    runner = make_runner(model=Net(), per_epoch=5)
    hook = EMAHook(**options)
    hook.before_train(runner)
    while hook.steps == 0:
        runner.step(hook)
    assert runner.progress.iteration == first


def test_before_the_first_update_validation_uses_the_weights(make_runner):
    model = Net()
    runner = make_runner(model=model)
    hook = EMAHook()
    before = copy.deepcopy(model.state_dict())
    hook.before_val_epoch(runner)
    hook.after_val_epoch(runner, metrics={})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert hook.state_dict() == {"steps": 0, "averages": {}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leave", ["after_val_epoch", "after_test_epoch", "on_exception"])
def test_validation_uses_the_averages_and_training_gets_its_weights_back_bit_for_bit(
    make_runner, generator, dtype, leave
):
    model = Net().to(dtype)
    runner = make_runner(model=model)
    hook = EMAHook(momentum=0.3)
    hook.before_train(runner)
    for _ in range(3):
        shake(model.float(), generator)
        model.to(dtype)
        runner.step(hook)
    trained = copy.deepcopy(model.state_dict())
    averages = copy.deepcopy(hook.averages)
    storages = {name: value.data_ptr() for name, value in model.named_parameters()}
    hook.before_val_epoch(runner)
    hook.before_val_epoch(runner)  # a second validation set changes nothing
    for name, value in model.named_parameters():
        assert torch.equal(value, averages[name].to(dtype))
        assert not torch.equal(value, trained[name])
    arguments = {"error": RuntimeError()} if leave == "on_exception" else {"metrics": {}}
    getattr(hook, leave)(runner, **arguments)
    assert all(torch.equal(trained[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(averages[name], value) for name, value in hook.averages.items())
    assert storages == {name: value.data_ptr() for name, value in model.named_parameters()}
    assert {value.dtype for value in hook.averages.values()} == {torch.float32}


def test_half_precision_averages_move_by_small_steps(make_runner):
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    runner = make_runner(model=model)
    hook = EMAHook(momentum=0.0002)
    hook.before_train(runner)
    runner.step(hook)
    with torch.no_grad():
        model.weight.mul_(2)
    runner.step(hook)
    assert hook.averages["weight"].item() == pytest.approx(1.0002, abs=1e-6)


def test_frozen_parameters_are_left_out(make_runner, generator):
    model = Net()
    model.layer.requires_grad_(False)
    runner = make_runner(model=model)
    hook = EMAHook()
    hook.before_train(runner)
    model.requires_grad_(False)  # as a GAN does while the other half trains
    runner.step(hook)
    assert not [name for name in hook.averages if name.startswith("layer.")]
    assert "deep.1.bias" in hook.averages


def test_a_restart_changes_nothing(make_runner):
    def run(stop_at=None):
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(0)
        model, hook = Net(), EMAHook(ema_type="MomentumAnnealingEMA", interval=2, update_buffers=True)
        runner = make_runner(model=model)
        hook.before_train(runner)
        for number in range(12):
            shake(model, generator)
            runner.step(hook)
            if number == stop_at:
                state = copy.deepcopy(hook.state_dict())
                hook = EMAHook(ema_type="MomentumAnnealingEMA", interval=2, update_buffers=True)
                hook.load_state_dict(state)
                hook.before_train(runner)
        return hook.state_dict()

    uninterrupted, cut = run(), run(stop_at=6)
    assert uninterrupted["steps"] == cut["steps"] == 12
    assert uninterrupted["averages"].keys() == cut["averages"].keys()
    assert all(torch.equal(value, cut["averages"][name]) for name, value in uninterrupted["averages"].items())


def test_the_loaded_state_is_a_copy(make_runner, generator):
    model = Net()
    runner = make_runner(model=model)
    hook = EMAHook(momentum=0.5)
    hook.before_train(runner)
    runner.step(hook)
    state = hook.state_dict()
    saved = copy.deepcopy(state["averages"])
    hook.load_state_dict(state)
    shake(model, generator)
    runner.step(hook)
    assert all(torch.equal(saved[name], value) for name, value in state["averages"].items())


def test_a_test_run_uses_the_loaded_averages(make_runner):
    model = Net()
    runner = make_runner(model=model)
    hook = EMAHook(strict_load=True)
    hook.load_state_dict({"steps": 5, "averages": {"layer.weight": torch.ones(3, 5)}})
    hook.before_test_epoch(runner)
    assert torch.equal(model.layer.weight, torch.ones(3, 5))


def test_a_state_of_another_model(make_runner):
    runner = make_runner(model=Net())
    strict = EMAHook(strict_load=True)
    strict.load_state_dict({"steps": 5, "averages": {"other": torch.ones(1)}})
    strict.before_train(runner)
    with pytest.raises(CheckpointError, match=r"missing \['layer.weight'.*unexpected \['other'\]"):
        runner.step(strict)
    loose = EMAHook()
    loose.load_state_dict({"steps": 5, "averages": {"other": torch.ones(1)}})
    loose.before_train(runner)
    runner.step(loose)
    assert torch.equal(loose.averages["layer.weight"], runner.model.layer.weight)
    wrong = EMAHook()
    wrong.load_state_dict({"steps": 5, "averages": {"layer.weight": torch.ones(2)}})
    wrong.before_train(runner)
    with pytest.raises(CheckpointError, match=r"'layer.weight' has shape \(2,\), the model's has \(3, 5\)"):
        runner.step(wrong)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ema_type": "EMA"}, "ema_type is 'EMA'; expected one of ExponentialMovingAverage"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"begin_iter": 1, "begin_epoch": 1}, "both set"),
        ({"interval": 0}, "interval is 0"),
        ({"begin_iter": -1}, "begin_iter is -1"),
    ],
)
def test_wrong_arguments(options, text):
    with pytest.raises(ConfigError, match=text):
        EMAHook(**options)


def test_a_beginning_beyond_the_end(make_runner):
    with pytest.raises(ConfigError, match="begin_iter is 100, but the run ends at 20"):
        EMAHook(begin_iter=100).before_train(make_runner())


def test_averaging_uses_no_generator(make_runner):
    runner = make_runner(model=Net())
    hook = EMAHook()
    before = torch.get_rng_state(), random.getstate()
    hook.before_train(runner)
    for _ in range(3):
        runner.step(hook)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_loaded_averages_have_the_strides_of_their_parameters(make_runner):
    model = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    hook = EMAHook(momentum=0.5)
    runner = make_runner(model=model)
    hook.before_train(runner)
    runner.step(hook)
    state = {
        "steps": 1,
        "averages": {name: value.contiguous() for name, value in hook.state_dict()["averages"].items()},
    }
    hook.load_state_dict(state)
    runner.step(hook)
    assert hook.averages["weight"].stride() == model.weight.stride()
    assert torch.equal(hook.averages["weight"], model.weight)
