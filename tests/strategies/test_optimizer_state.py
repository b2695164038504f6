"""The optimizer's state by parameter name: what a checkpoint can hold, and what it gives back."""

import copy
import json
from collections import defaultdict, deque

import pytest
import torch
from torch import nn

from mmtrain.checkpoint.format import tree
from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.optim import OptimWrapper, OptimWrapperDict
from mmtrain.strategies import optimizer_state
from mmtrain.strategies.base import OptimizerState, SavedTensor


class Scaled(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=dtype))
        self.scale = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self):
        return (self.weight * self.scale - 2).square().sum()


def stepped(model, optimizer, times=2):
    def closure():
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        return loss

    for _ in range(times):
        optimizer.step(closure)


def check(model, optimizer):
    wrapper = OptimWrapper(optimizer)
    optimizer_state.check(model, wrapper, optimizer_state.capture(model, wrapper))


def through_a_checkpoint(model, optimizer, other, restored):
    """Give ``restored`` the state of ``optimizer`` as a save and a resume would."""
    state = optimizer_state.capture(model, OptimWrapper(optimizer))
    document, nested = tree.split(state.values)
    values = tree.join(json.loads(tree.to_json(document)), nested)
    saved = {name: SavedTensor(tuple(value.shape), value.dtype) for name, value in state.tensors.items()}
    targets = optimizer_state.optimizer_targets(other, saved)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(state.tensors[name])
    optimizer_state.restore(other, OptimWrapper(restored), OptimizerState(targets, values))


def assert_continues_identically(make, model=None):
    model = Scaled() if model is None else model
    other = copy.deepcopy(model)
    optimizer, restored = make(model), make(other)
    stepped(model, optimizer, 3)
    check(model, optimizer)
    other.load_state_dict(model.state_dict())
    through_a_checkpoint(model, optimizer, other, restored)
    stepped(model, optimizer)
    stepped(other, restored)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), other.parameters(), strict=True))
    return restored


class Keeping(torch.optim.Optimizer):
    """Keeps what the test says for each parameter, changes it with ``use``, and steps by what that returns."""

    def __init__(self, parameters, start, use):
        super().__init__(parameters, dict(lr=0.01))
        self.start, self.use = start, use

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter not in self.state:
                    self.state[parameter]["kept"] = self.start(parameter)
                parameter.sub_(group["lr"] * self.use(self.state[parameter], parameter.grad))


def use_list(state, grad):
    state["kept"][0].add_(grad)
    state["kept"][1]["n"] += 1
    return state["kept"][0] * state["kept"][1]["n"]


def use_deque(state, grad):
    state["kept"].append(grad.clone())
    return sum(state["kept"]) * len(state["kept"])


def use_flat(state, grad):
    return (grad.flatten() + state["kept"]).view_as(grad)


def use_text(state, grad):
    assert state["kept"] in ("first", "later")
    state["kept"] = "later"
    return grad


def use_complex(state, grad):
    state["kept"] = state["kept"] * 0.5j + grad
    return state["kept"].real


def use_count(state, grad):
    state["kept"] += 1
    return grad * range(100)[state["kept"]]


KEPT = {
    "a list with a tensor and a dict": (lambda p: [torch.zeros_like(p), {"n": 0}], use_list),
    "a deque with a length": (lambda p: deque(maxlen=2), use_deque),
    "a flat tensor": (lambda p: p.detach().flatten().clone(), use_flat),
    "text": (lambda p: "first", use_text),
    "an integer": (lambda p: 1, use_count),
    "a complex tensor": (lambda p: torch.zeros_like(p, dtype=torch.complex128), use_complex),
}


@pytest.mark.parametrize("kind", KEPT)
def test_state_of_any_plain_kind(kind):
    start, use = KEPT[kind]
    assert_continues_identically(lambda model: Keeping(model.parameters(), start, use))


class WithState(torch.optim.SGD):
    """Has state that belongs to no parameter, and a key of its own in its ``state_dict()``."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.01)
        self.calls = 0

    def step(self, closure):
        shared = self.state["global"]
        shared["sum"] = shared.get("sum", torch.zeros(())) + 1
        self.calls += 1
        self.param_groups[0]["lr"] = 0.001 * self.calls * shared["sum"].item()
        return super().step(closure)

    def state_dict(self):
        return {**super().state_dict(), "calls": self.calls}

    def load_state_dict(self, state_dict):
        state_dict = dict(state_dict)
        self.calls = state_dict.pop("calls")
        if "unknown" in state_dict:
            raise KeyError("unknown")
        super().load_state_dict(state_dict)


def test_state_that_belongs_to_no_parameter():
    restored = assert_continues_identically(lambda model: WithState(model.parameters()))
    assert restored.calls == 5
    assert restored.state["global"]["sum"] == 5


class Slow(torch.optim.Optimizer):
    """A wrapper as Lookahead is: a state_dict of another form, with state by parameter."""

    def __init__(self, inner):
        self.inner = inner
        self.slow = defaultdict(dict)
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups

    def step(self, closure):
        self.inner.step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.slow[parameter].setdefault("average", parameter.detach().clone())
                parameter.data.copy_(average.lerp_(parameter.detach(), 0.5))

    def state_dict(self):
        return {"slow": self.slow, "inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict):
        self.slow = state_dict["slow"]
        self.inner.load_state_dict(state_dict["inner"])
        self.param_groups = self.inner.param_groups


def test_a_wrapper_with_a_state_dict_of_another_form():
    assert_continues_identically(lambda model: Slow(torch.optim.AdamW(model.parameters(), lr=0.01)))


def test_float32_moments_of_bfloat16_parameters_stay_float32():
    model = Scaled(torch.bfloat16)
    start = lambda p: [torch.full_like(p, 1 / 3, dtype=torch.float32)]  # noqa: E731
    restored = assert_continues_identically(
        lambda m: Keeping(m.parameters(), start, lambda s, g: g * s["kept"][0]), model
    )
    assert restored.state[restored.param_groups[0]["params"][0]]["kept"][0].dtype is torch.float32


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (lambda p: torch.zeros(2, 2).to_sparse(), "layout torch.sparse_coo"),
        (lambda p: object(), r"builtins.object cannot be saved"),
    ],
)
def test_state_that_no_checkpoint_holds_is_refused_with_the_remedy(start, words):
    model = Scaled()
    optimizer = Keeping(model.parameters(), start, lambda state, grad: grad)
    stepped(model, optimizer)
    with pytest.raises(ConfigError, match=f"the state of Keeping cannot be saved: .*{words}.*save_optimizer=False"):
        check(model, optimizer)


def test_state_that_an_optimizer_refuses_is_reported_with_its_reason():
    model = Scaled()
    optimizer = WithState(model.parameters())
    stepped(model, optimizer)
    state = optimizer_state.capture(model, OptimWrapper(optimizer))
    values = copy.deepcopy(state.values)
    values[""]["extra"] = {"calls": 1, "unknown": 2}
    with pytest.raises(CheckpointError, match=r"cannot be given to WithState: .*KeyError: 'unknown'"):
        optimizer_state.restore(model, OptimWrapper(optimizer), OptimizerState(state.tensors, values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.Adafactor, torch.optim.NAdam])
def test_a_restored_optimizer_continues_identically(kind, dtype):
    """Also for a scalar parameter of type float64, whose moments look like numbers."""
    assert_continues_identically(lambda model: kind(model.parameters(), lr=0.1), Scaled(dtype))


def test_lbfgs():
    assert_continues_identically(lambda model: torch.optim.LBFGS(model.parameters(), max_iter=3))


@pytest.mark.parametrize("layout", ["transposed", "channels_last"])
def test_moments_have_the_strides_of_their_parameter(layout):
    model, other = (nn.Conv2d(4, 6, 3) for _ in range(2))
    for one in (model, other):
        if layout == "channels_last":
            one.to(memory_format=torch.channels_last)
        else:
            one.weight = nn.Parameter(one.weight.detach().permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3))
    pair = [torch.optim.AdamW(one.parameters(), fused=True) for one in (model, other)]
    for one, optimizer in zip((model, other), pair, strict=True):
        one(torch.ones(1, 4, 5, 5)).sum().backward()
        optimizer.step()
    through_a_checkpoint(model, pair[0], other, pair[1])
    moment = pair[1].state[other.weight]["exp_avg"]
    assert moment.stride() == other.weight.stride() == model.weight.stride()
    assert torch.equal(moment, pair[0].state[model.weight]["exp_avg"])


def test_numbers_of_earlier_checkpoints_are_tensors_of_no_dimension():
    model, other = Scaled(torch.float64), Scaled(torch.float64)
    optimizer = torch.optim.NAdam(model.parameters())
    stepped(model, optimizer)
    tensors = dict(optimizer_state.capture(model, OptimWrapper(optimizer)).tensors)
    tensors["weight/step"] = torch.tensor(2.0, dtype=torch.float64)
    restored = torch.optim.NAdam(other.parameters())
    optimizer_state.restore(other, OptimWrapper(restored), OptimizerState(tensors))
    assert restored.state[other.weight]["step"] == 2.0
    assert isinstance(restored.state[other.weight]["step"], float)
    assert isinstance(restored.state[other.scale]["exp_avg"], torch.Tensor)


def test_a_parameter_of_two_optimizers_is_refused():
    model = Scaled()
    pair = {name: OptimWrapper(torch.optim.SGD([model.weight], lr=0.1)) for name in ("one", "two")}
    with pytest.raises(ConfigError, match="weight is trained by two optimizers"):
        optimizer_state.capture(model, OptimWrapperDict(**pair))


def test_a_parameter_that_is_not_the_models_is_refused():
    model = Scaled()
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(
        ConfigError, match=r"SGD trains a parameter of shape \(2,\) that is not a parameter of the model"
    ):
        optimizer_state.capture(model, OptimWrapper(optimizer))


def test_moments_follow_a_model_whose_memory_format_changes():
    """A hook may call model.to(memory_format=...) after a resume has restored the moments."""
    torch.manual_seed(2)
    image = torch.randn(2, 4, 5, 5)
    models = [nn.Conv2d(4, 6, 3)]
    models.append(copy.deepcopy(models[0]))
    optimizers = [torch.optim.AdamW(model.parameters(), fused=True) for model in models]
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            if step == 2 and model is models[1]:
                model.to(memory_format=torch.channels_last)
                optimizer_state.align(OptimWrapper(optimizer))
            optimizer.zero_grad()
            model(image).square().mean().backward()
            optimizer.step()
    assert models[1].weight.stride() != models[0].weight.stride()
    torch.testing.assert_close(models[1].weight, models[0].weight, rtol=1e-5, atol=1e-6)
