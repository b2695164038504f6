import contextlib
import copy
import json
import math

import pytest
import torch
from torch import nn

from mmtrain import dist
from mmtrain.errors import ConfigError, RunError
from mmtrain.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict
from mmtrain.types import accumulation_window


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def make_data(count=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator), torch.randn(count, 1, generator=generator)


def loss_of(model, inputs, targets):
    return nn.functional.mse_loss(model(inputs).float(), targets)


def sgd(model, **arguments):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **arguments})


def adamw(model, **arguments):
    return torch.optim.AdamW(model.parameters(), **{"lr": 0.1, "fused": True, **arguments})


def parameters(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# ---- the plain wrapper ----
def test_a_window_of_one_is_torchs_step_bit_for_bit():
    ours, theirs = make_model(), make_model()
    wrapper, optimizer = OptimWrapper(adamw(ours)), adamw(theirs)
    inputs, targets = make_data()
    for _ in range(5):
        wrapper.backward(loss_of(ours, inputs, targets))
        result = wrapper.finish_window()
        assert (result.grad_norm, result.applied) == (None, True)
        loss_of(theirs, inputs, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(parameters(ours), parameters(theirs))
    assert all(parameter.grad is None for parameter in ours.parameters())


@pytest.mark.parametrize("length", [2, 4])
def test_accumulation_equals_the_big_batch(length):
    big, small = make_model(), make_model()
    inputs, targets = make_data(8)
    single = OptimWrapper(sgd(big))
    parts = OptimWrapper(sgd(small), accumulative_counts=length)
    for _ in range(3):
        single.update_params(loss_of(big, inputs, targets))
        for index, (x, y) in enumerate(zip(inputs.chunk(length), targets.chunk(length), strict=True)):
            parts.micro_batch = accumulation_window(length)[index]
            parts.backward(parts.scale_loss(loss_of(small, x, y)))
        parts.finish_window()
    for one, other in zip(parameters(big), parameters(small), strict=True):
        torch.testing.assert_close(one, other)


def test_the_last_window_is_divided_by_its_true_length():
    """7 micro-batches in windows of 3, the last one of 1: set by the loop, and counted by the wrapper."""
    inputs, targets = make_data(7)
    looped, counted, reference = make_model(), make_model(), make_model()
    by_loop, alone, optimizer = OptimWrapper(sgd(looped), 3), OptimWrapper(sgd(counted), 3), sgd(reference)
    alone.initialize_count_status(counted, 0, 7)
    for index in range(7):
        x, y = inputs[index : index + 1], targets[index : index + 1]
        by_loop.micro_batch = accumulation_window(1 if index == 6 else 3)[index % 3]
        by_loop.update_params(loss_of(looped, x, y))
        alone.update_params(loss_of(counted, x, y))
        (loss_of(reference, x, y) / (1 if index == 6 else 3)).backward()
        if index in (2, 5, 6):
            optimizer.step()
            optimizer.zero_grad()
    assert same(parameters(looped), parameters(reference))
    assert same(parameters(counted), parameters(reference))
    assert by_loop.inner_count == alone.inner_count == 7


def test_accumulation_is_mmengines():
    from mmengine.optim import OptimWrapper as Theirs

    ours, theirs = make_model(), make_model()
    wrapper, reference = OptimWrapper(sgd(ours), 3, dict(max_norm=0.1)), Theirs(sgd(theirs), 3, dict(max_norm=0.1))
    for each in (wrapper, reference):
        each.initialize_count_status(ours, 0, 10)
    inputs, targets = make_data(10)
    for x, y in zip(inputs.split(1), targets.split(1), strict=True):
        wrapper.update_params(loss_of(ours, x, y))
        reference.update_params(loss_of(theirs, x, y))
        assert wrapper.should_update() == reference.should_update()
        assert wrapper.should_sync() == reference.should_sync()
        assert same(parameters(ours), parameters(theirs))


@pytest.mark.parametrize(
    ("clip_grad", "clip"),
    [
        (dict(max_norm=0.05), lambda p: nn.utils.clip_grad_norm_(p, 0.05)),
        (dict(type="norm", max_norm=1, norm_type=1), lambda p: nn.utils.clip_grad_norm_(p, 1, 1)),
        (dict(max_norm=0.01, norm_type="inf"), lambda p: nn.utils.clip_grad_norm_(p, 0.01, math.inf)),
        (dict(type="value", clip_value=0.01), lambda p: nn.utils.clip_grad_value_(p, 0.01)),
    ],
    ids=["2-norm", "1-norm", "max-norm", "value"],
)
def test_clipping_is_torchs_bit_for_bit(clip_grad, clip):
    ours, theirs = make_model(), make_model()
    wrapper, optimizer = OptimWrapper(sgd(ours), clip_grad=clip_grad), sgd(theirs)
    inputs, targets = make_data()
    for _ in range(3):
        wrapper.backward(loss_of(ours, inputs, targets))
        result = wrapper.finish_window()
        loss_of(theirs, inputs, targets).backward()
        norm = clip(list(theirs.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        assert (result.grad_norm is None) == (norm is None)
        assert norm is None or torch.equal(result.grad_norm, norm)
    assert same(parameters(ours), parameters(theirs))
    assert "type" in clip_grad or len(clip_grad) < 3  # the config's dict is as it was (MMEngine pops from it)


def test_the_norm_is_measured_only_on_request():
    model = make_model()
    wrapper = OptimWrapper(sgd(model))
    inputs, targets = make_data()
    wrapper.backward(loss_of(model, inputs, targets))
    assert wrapper.finish_window().grad_norm is None
    wrapper.want_grad_norm = True
    wrapper.backward(loss_of(model, inputs, targets))
    expected = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    before = parameters(model)
    result = wrapper.finish_window()
    assert torch.equal(result.grad_norm, expected)
    assert not same(before, parameters(model))


def test_error_if_nonfinite():
    model = make_model()
    wrapper = OptimWrapper(sgd(model), clip_grad=dict(max_norm=1.0, error_if_nonfinite=True))
    wrapper.backward(model(make_data()[0]).mean() * math.nan)
    with pytest.raises(RunError, match=r"norm is nan and clip_grad.error_if_nonfinite is set"):
        wrapper.finish_window()


def test_update_params_keeps_its_result_for_the_loop_once():
    model = make_model()
    wrapper = OptimWrapper(sgd(model), clip_grad=dict(max_norm=1.0))
    wrapper.micro_batch, last = accumulation_window(2)
    wrapper.update_params(loss_of(model, *make_data()))
    assert wrapper.take_result() is None
    wrapper.micro_batch = last
    wrapper.update_params(loss_of(model, *make_data()))
    assert wrapper.take_result().grad_norm > 0
    assert wrapper.take_result() is None
    wrapper.update_params(loss_of(model, *make_data()), zero_kwargs=dict(set_to_none=False))
    assert wrapper.take_result().applied
    assert all(torch.equal(parameter.grad, torch.zeros_like(parameter)) for parameter in model.parameters())


def test_a_train_step_written_for_mmengine():
    """backward, step and zero_grad one by one, as a model with its own train_step may call them."""
    ours, theirs = make_model(), make_model()
    wrapper, optimizer = OptimWrapper(sgd(ours)), sgd(theirs)
    with wrapper.optim_context(ours):
        loss = loss_of(ours, *make_data())
    wrapper.backward(wrapper.scale_loss(loss))
    wrapper.step()
    wrapper.zero_grad()
    assert wrapper.take_result().applied
    loss_of(theirs, *make_data()).backward()
    optimizer.step()
    assert same(parameters(ours), parameters(theirs))


def test_a_subclass_with_its_own_step_is_called():
    class Doubling(OptimWrapper):
        def step(self, **kwargs):
            super().step(**kwargs)
            super().step(**kwargs)

    ours, theirs = make_model(), make_model()
    wrapper, optimizer = Doubling(sgd(ours)), sgd(theirs)
    wrapper.backward(loss_of(ours, *make_data()))
    assert wrapper.finish_window().applied
    assert wrapper.take_result() is None
    loss_of(theirs, *make_data()).backward()
    optimizer.step()
    optimizer.step()
    assert same(parameters(ours), parameters(theirs))


def test_an_optimizers_own_zero_grad_is_called():
    calls = []

    class Counting(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            calls.append(set_to_none)
            super().zero_grad(set_to_none)

    model = make_model()
    wrapper = OptimWrapper(Counting(model.parameters(), lr=0.1))
    wrapper.update_params(loss_of(model, *make_data()))
    assert calls == [True]


def test_ranks_exchange_gradients_only_for_the_last_micro_batch():
    entered = []

    class Parallel(nn.Module):
        @contextlib.contextmanager
        def no_sync(self):
            entered.append(True)
            yield

    wrapper = OptimWrapper(sgd(make_model()), 2)
    for mb in accumulation_window(2):
        with wrapper.forward_context(Parallel(), mb), wrapper.forward_context(nn.Identity(), mb):
            pass
        wrapper.micro_batch = mb
        with wrapper.optim_context(Parallel()), wrapper.optim_context(nn.Identity()):
            pass
    assert entered == [True, True]
    amp = AmpOptimWrapper(sgd(make_model()), 2, dtype="bfloat16")
    with amp.forward_context(Parallel(), accumulation_window(2)[0]):
        assert torch.is_autocast_enabled("cpu")
    assert entered == [True, True, True]
    assert not torch.is_autocast_enabled("cpu")


def test_a_subclass_with_its_own_optim_context_is_called():
    class Noting(OptimWrapper):
        @contextlib.contextmanager
        def optim_context(self, model):
            with super().optim_context(model):
                yield
            synchronised.append(self.should_sync())

    synchronised = []
    wrapper = Noting(sgd(make_model()), 2)
    for mb in accumulation_window(2):
        with wrapper.forward_context(nn.Identity(), mb):
            pass
    assert synchronised == [False, True]


def test_lr_and_momentum_of_the_groups():
    model = make_model()
    groups = [dict(params=list(model[0].parameters()), lr=0.5), dict(params=list(model[2].parameters()))]
    assert OptimWrapper(torch.optim.SGD(groups, lr=0.1, momentum=0.9)).get_lr() == {"base_lr": [0.1], "lr": [0.5, 0.1]}
    adam = OptimWrapper(adamw(model, betas=(0.7, 0.9)))
    assert adam.get_lr() == {"lr": [0.1]}
    assert adam.get_momentum() == {"momentum": [0.7]}
    assert OptimWrapper(torch.optim.Adagrad(model.parameters())).get_momentum() == {"momentum": [0]}
    assert adam.param_groups is adam.optimizer.param_groups
    assert adam.defaults["betas"] == (0.7, 0.9)
    assert adam.state_dict() == {}
    assert "AdamW" in repr(adam)


@pytest.mark.parametrize(
    ("make_loss", "sentence"),
    [
        (lambda model: model(torch.ones(3, 4)), r"shape \(3, 1\); expected a scalar"),
        (lambda model: torch.tensor(1.0), "does not require grad"),
    ],
)
def test_a_loss_that_cannot_be_used(make_loss, sentence):
    model = make_model()
    with pytest.raises(RunError, match=sentence):
        OptimWrapper(sgd(model)).backward(make_loss(model))


def test_an_error_of_a_models_own_backward_is_not_replaced():
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("out of luck")

    model = make_model()
    with pytest.raises(RuntimeError, match="out of luck"):
        OptimWrapper(sgd(model)).backward(Failing.apply(loss_of(model, *make_data())))


# ---- losses and gradients that are not finite ----
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_bad_loss_skips_only_the_update_of_its_window(bad, place):
    model = make_model()
    wrapper = OptimWrapper(sgd(model), 2)
    wrapper.skip_nonfinite = True
    inputs, targets = make_data()
    for window in range(3):
        for index in range(2):
            loss = loss_of(model, inputs, targets)
            wrapper.backward(loss.detach() * 0 + bad + loss if (window, index) == (1, place) else loss)
        assert wrapper.finish_window().applied is (window != 1)


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("clip_grad", [None, dict(max_norm=1.0, error_if_nonfinite=True)])
@pytest.mark.parametrize("where", ["loss and gradients", "loss alone", "gradients alone"])
def test_skipping_does_not_change_parameters_and_moments(make, clip_grad, where):
    model = make_model()
    wrapper = OptimWrapper(make(model), clip_grad=clip_grad)
    wrapper.skip_nonfinite = True
    inputs, targets = make_data()
    wrapper.backward(loss_of(model, inputs, targets))
    assert wrapper.finish_window().applied
    before, moments = parameters(model), copy.deepcopy(wrapper.optimizer.state_dict()["state"])
    loss = loss_of(model, inputs, targets)
    wrapper.backward({"loss and gradients": loss * math.nan, "loss alone": loss + math.inf}.get(where, loss))
    if where == "gradients alone":
        model[0].weight.grad[0, 0] = math.inf
    result = wrapper.finish_window()
    assert not result.applied
    assert same(before, parameters(model))
    after = wrapper.optimizer.state_dict()["state"]
    assert all(torch.equal(after[i][k], moments[i][k]) for i in moments for k in moments[i])
    assert all(parameter.grad is None for parameter in model.parameters())
    wrapper.backward(loss_of(model, inputs, targets))
    assert wrapper.finish_window().applied
    assert not same(before, parameters(model))


def test_ranks_skip_together(monkeypatch):
    """A loss that is not finite on another rank skips the step here too."""
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "sum_over_ranks", lambda tensor: tensor + 1)
    model = make_model()
    wrapper = OptimWrapper(sgd(model))
    wrapper.skip_nonfinite = True
    wrapper.backward(loss_of(model, *make_data()))
    assert not wrapper.finish_window().applied


def test_without_skipping_the_step_is_torchs():
    model = make_model()
    wrapper = OptimWrapper(sgd(model))
    wrapper.backward(loss_of(model, *make_data()) * math.nan)
    assert wrapper.finish_window().applied
    assert all(parameter.isnan().all() for parameter in parameters(model))


# ---- mixed precision ----
@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float16", torch.float16])
def test_autocast_and_a_scaler_only_for_float16(dtype):
    model = make_model()
    wrapper = AmpOptimWrapper(adamw(model), dtype=dtype)
    inputs, targets = make_data()
    losses = []
    for _ in range(20):
        with wrapper.optim_context(model):
            output = model(inputs)
        assert output.dtype == wrapper.dtype
        loss = nn.functional.mse_loss(output.float(), targets)
        wrapper.update_params(loss)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert (wrapper.scaler is None) == (wrapper.dtype is torch.bfloat16)
    assert (wrapper.state_dict() == {}) == (wrapper.dtype is torch.bfloat16)
    assert wrapper.notices == []


def test_the_default_dtype_is_the_devices_and_is_reported():
    wrapper = AmpOptimWrapper(sgd(make_model()))
    assert wrapper.dtype is torch.bfloat16
    assert wrapper.notices == ["optim_wrapper.dtype is not given: bfloat16, the default of autocast on cpu"]


def test_nested_contexts_restore_the_outer_state():
    model = make_model()
    wrapper = AmpOptimWrapper(sgd(model), dtype="bfloat16")
    with wrapper.optim_context(model):
        with wrapper.optim_context(model):
            pass
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


def test_bfloat16_is_autocast_and_torchs_step_bit_for_bit():
    ours, theirs = make_model(), make_model()
    wrapper, optimizer = AmpOptimWrapper(adamw(ours), dtype="bfloat16", clip_grad=dict(max_norm=0.5)), adamw(theirs)
    inputs, targets = make_data()
    for _ in range(4):
        with wrapper.optim_context(ours):
            loss = loss_of(ours, inputs, targets)
        wrapper.backward(loss)
        wrapper.finish_window()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(theirs, inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert same(parameters(ours), parameters(theirs))


def run_fp16(model, wrapper, steps, bad=()):
    inputs, targets = make_data()
    results = []
    for step in range(steps):
        with wrapper.optim_context(model):
            loss = loss_of(model, inputs, targets)
        wrapper.backward(loss * math.inf if step in bad else loss)
        results.append(wrapper.finish_window())
    return results


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("clip_grad", [None, dict(max_norm=0.5)])
def test_float16_is_torchs_recipe_bit_for_bit(make, clip_grad):
    ours, theirs = make_model(), make_model()
    scale = dict(init_scale=1024.0, growth_interval=3)
    wrapper, optimizer = (
        AmpOptimWrapper(make(ours), dtype="float16", loss_scale=scale, clip_grad=clip_grad),
        make(theirs),
    )
    scaler = torch.amp.GradScaler("cpu", **scale)
    results = run_fp16(ours, wrapper, 8, bad=(4,))
    inputs, targets = make_data()
    for step in range(8):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(theirs, inputs, targets)
        scaler.scale(loss * math.inf if step == 4 else loss).backward()
        if clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert same(parameters(ours), parameters(theirs))
    assert wrapper.scaler.state_dict() == scaler.state_dict()
    assert [result.applied for result in results] == [step != 4 for step in range(8)]


def test_a_skipped_step_changes_nothing_and_halves_the_scale():
    model = make_model()
    wrapper = AmpOptimWrapper(adamw(model), dtype="float16")
    before = parameters(model)
    (result,) = run_fp16(model, wrapper, 1, bad=(0,))
    assert not result.applied
    assert same(before, parameters(model))
    assert wrapper.optimizer.state_dict()["state"] == {}
    assert wrapper.scaler.get_scale() == 32768.0


def test_the_scalers_state_goes_through_json_and_the_run_continues_bit_for_bit():
    scale = dict(init_scale=2.0**10, growth_interval=4, growth_factor=1.7)
    straight, resumed = make_model(), make_model()
    uninterrupted = AmpOptimWrapper(adamw(straight), dtype="float16", loss_scale=scale)
    run_fp16(straight, uninterrupted, 11, bad=(6,))
    first = AmpOptimWrapper(adamw(resumed), dtype="float16", loss_scale=scale)
    run_fp16(resumed, first, 7, bad=(6,))
    state = json.loads(json.dumps(first.state_dict()))
    second = AmpOptimWrapper(adamw(resumed), dtype="float16", loss_scale=scale)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(state)
    run_fp16(resumed, second, 4)
    assert same(parameters(straight), parameters(resumed))
    assert second.state_dict() == uninterrupted.state_dict()


def test_a_fixed_scale_stays():
    model = make_model()
    wrapper = AmpOptimWrapper(sgd(model), dtype="float16", loss_scale=128)
    assert [result.applied for result in run_fp16(model, wrapper, 4, bad=(1,))] == [True, False, True, True]
    assert wrapper.scaler.get_scale() == 128.0
    other = AmpOptimWrapper(sgd(model), dtype="float16", loss_scale=64.0)
    other.load_state_dict(wrapper.state_dict())
    run_fp16(model, other, 1)
    assert other.scaler.get_scale() == 64.0
    other.load_state_dict({})


def test_the_norm_under_a_scaler_is_that_of_the_true_gradients():
    model = make_model()
    wrapper = AmpOptimWrapper(sgd(model), dtype="float16", loss_scale=4096.0)
    wrapper.want_grad_norm = True
    (result,) = run_fp16(model, wrapper, 1)
    loss_of(plain := make_model(), *make_data()).backward()
    expected = nn.utils.get_total_norm([parameter.grad for parameter in plain.parameters()])
    torch.testing.assert_close(result.grad_norm, expected, rtol=1e-2, atol=0)


def test_parameters_in_float16():
    model = make_model().half()
    inputs, targets = make_data()
    for allowed in (False, True):
        wrapper = AmpOptimWrapper(sgd(model, lr=1e-3), dtype="float16", loss_scale=8.0, use_fp16_params=allowed)
        wrapper.backward(loss_of(model, inputs.half(), targets))
        if allowed:
            assert wrapper.finish_window().applied
        else:
            with pytest.raises(ValueError, match="unscale FP16"):
                wrapper.finish_window()


# ---- several optimizers ----
def make_pair(**arguments):
    models = dict(gen=make_model(1), disc=make_model(2))
    return models, OptimWrapperDict(**{name: OptimWrapper(sgd(model), **arguments) for name, model in models.items()})


def test_each_optimizer_is_updated_by_its_own_wrapper():
    models, pair = make_pair(clip_grad=dict(max_norm=1.0))
    inputs, targets = make_data()
    pair.micro_batch = accumulation_window(1)[0]
    assert pair.take_result() is None
    before = {name: parameters(model) for name, model in models.items()}
    pair["gen"].update_params(loss_of(models["gen"], inputs, targets))
    assert not same(before["gen"], parameters(models["gen"]))
    assert same(before["disc"], parameters(models["disc"]))
    pair["disc"].update_params(loss_of(models["disc"], inputs, targets))
    norms = []
    for name, seed in (("gen", 1), ("disc", 2)):
        loss_of(fresh := make_model(seed), inputs, targets).backward()
        norms.append(nn.utils.get_total_norm([parameter.grad for parameter in fresh.parameters()]))
        assert pair[name].inner_count == 1
    result = pair.take_result()
    assert result.applied
    torch.testing.assert_close(result.grad_norm, torch.stack(norms).norm())


def test_the_rest_of_the_dicts_interface():
    _, pair = make_pair()
    pair.want_grad_norm = pair.skip_nonfinite = True
    assert all(wrapper.want_grad_norm and wrapper.skip_nonfinite for wrapper in pair.values())
    pair.loss_weight = 0.5  # an uneven last batch
    assert [wrapper.scale_loss(torch.ones(())).item() for wrapper in pair.values()] == [0.5, 0.5]
    assert pair.want_grad_norm
    assert pair.accumulative_counts == 1
    assert (list(pair), len(pair), "gen" in pair, "x" in pair) == (["gen", "disc"], 2, True, False)
    assert pair.get_lr() == {"gen.lr": [0.1], "disc.lr": [0.1]}
    assert pair.get_momentum() == {"gen.momentum": [0.9], "disc.momentum": [0.9]}
    assert set(pair.param_groups) == set(pair.defaults) == {"gen", "disc"}
    assert isinstance(pair, OptimWrapper)
    assert repr(pair).startswith("gen: OptimWrapper(")
    pair.zero_grad()
    for method, arguments in (("backward", [torch.ones(())]), ("update_params", [torch.ones(())]), ("step", []),
                              ("finish_window", []), ("optim_context", [None]), ("should_sync", []),
                              ("forward_context", [None, accumulation_window(1)[0]])):  # fmt: skip
        with pytest.raises(RunError, match="several optimizers"):
            getattr(pair, method)(*arguments)


def test_the_dicts_state_is_that_of_its_wrappers_by_name():
    def make():
        return OptimWrapperDict(
            gen=AmpOptimWrapper(sgd(make_model()), dtype="float16"), disc=OptimWrapper(sgd(make_model()))
        )

    pair, other = make(), make()
    pair["gen"].scaler.load_state_dict({**pair["gen"].scaler.state_dict(), "scale": 8.0})
    assert pair.state_dict()["disc"] == {}
    other.load_state_dict(pair.state_dict())
    assert other["gen"].scaler.get_scale() == 8.0
    with pytest.raises(RunError, match=r"optim_wrapper.critic is in the checkpoint"):
        other.load_state_dict({"critic": {}})


def test_invalid_dicts_are_refused():
    with pytest.raises(ConfigError, match="found a SGD, expected an OptimWrapper"):
        OptimWrapperDict(gen=sgd(make_model()))
    with pytest.raises(ConfigError, match="at least one"):
        OptimWrapperDict()
    with pytest.raises(ConfigError, match="accumulative_counts differ"):
        OptimWrapperDict(gen=OptimWrapper(sgd(make_model())), disc=OptimWrapper(sgd(make_model()), 2))


# ---- on a device ----
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_nothing_waits_for_the_device_where_no_option_needs_it():
    model = make_model().cuda()
    wrapper = OptimWrapper(adamw(model), 2, clip_grad=dict(max_norm=0.5))
    inputs, targets = (tensor.cuda() for tensor in make_data())

    def window(scale=1.0):
        wrapper.backward(loss_of(model, inputs, targets) * scale)
        wrapper.backward(loss_of(model, inputs, targets))
        return wrapper.finish_window()

    window()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = window(math.nan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.grad_norm.is_cuda


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision_on_a_device_skips_what_is_not_finite(dtype):
    model = make_model().cuda()
    wrapper = AmpOptimWrapper(adamw(model), dtype=dtype)
    wrapper.skip_nonfinite = True
    inputs, targets = (tensor.cuda() for tensor in make_data())
    for bad in (False, True, False):
        before = parameters(model)
        with wrapper.optim_context(model):
            loss = loss_of(model, inputs, targets)
        wrapper.backward(loss * math.inf if bad else loss)
        assert wrapper.finish_window().applied is not bad
        assert same(before, parameters(model)) is bad
    assert AmpOptimWrapper(adamw(model)).dtype is torch.float16
