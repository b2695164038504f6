"""Models whose modules keep their state in their own way: saved, resumed bit for bit, or refused before training."""

import copy

import pytest
import torch
from exactness import assert_exact, run
from parts import make_runner
from torch import nn

from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.registry import MODELS


class Stateful(nn.Module):
    """A classifier whose loss depends on a part with a state; subclasses keep it in their ways."""

    def __init__(self, width=6):
        super().__init__()
        self.layer = nn.Linear(width, 2)
        self.set_up()

    def forward(self, x, y):
        if self.training:
            self.advance(x.detach())
        out = self.layer(x) * (1 + 0.1 * self.factor())
        return {"loss": nn.functional.cross_entropy(out, y), "accuracy": (out.argmax(1) == y).float().mean()}


@MODELS.register_module()
class KeepsPlainValues(Stateful):
    """Numbers, a list and a tensor that it computes, under names of its own; no tensor of it is its attribute's."""

    def set_up(self):
        self.count, self.sums = 0, []

    def advance(self, x):
        self.count += 1
        self.sums = [*self.sums[-2:], x.sum()]

    def factor(self):
        return torch.tanh(sum(self.sums)) + 1 / self.count if self.count else 0.0

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "count"] = self.count
        if self.sums:  # not in the state of a fresh model
            destination[prefix + "sums"] = torch.stack(self.sums)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.count = state_dict.pop(prefix + "count")
        self.sums = list(state_dict.pop(prefix + "sums", torch.empty(0)).unbind())
        super()._load_from_state_dict(state_dict, prefix, *args)


class Metric(nn.Module):
    """Keeps its states as torchmetrics does with ``persistent(True)``: lists of tensors, and copies of attributes."""

    def __init__(self):
        super().__init__()
        self.total, self.seen = torch.zeros(()), []

    def state_dict(self, destination=None, prefix="", keep_vars=False):
        destination = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        destination[prefix + "total"] = copy.deepcopy(self.total)
        destination[prefix + "seen"] = copy.deepcopy(self.seen)
        return destination

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name in ("total", "seen"):
            if prefix + name in state_dict:
                setattr(self, name, state_dict.pop(prefix + name))
        super()._load_from_state_dict(state_dict, prefix, *args)


@MODELS.register_module()
class HoldsMetric(Stateful):
    def set_up(self):
        self.metric = Metric()

    def advance(self, x):
        self.metric.total = self.metric.total + x.mean()
        self.metric.seen.append(x.mean())

    def factor(self):
        return torch.tanh(self.metric.total) + 0.1 * len(self.metric.seen)


@MODELS.register_module()
class HoldsExtraState(Stateful):
    def set_up(self):
        self.inner = _Counting()

    def advance(self, x):
        self.inner.count += 1
        self.inner.last = x.sum()

    def factor(self):
        return 0.1 * self.inner.count + torch.tanh(self.inner.last)


class _Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.count, self.last = 0, torch.zeros(())

    def get_extra_state(self):
        return {"count": self.count, "last": self.last}

    def set_extra_state(self, state):
        self.count, self.last = state["count"], state["last"]


@MODELS.register_module()
class KeepsTensorExtraState(HoldsExtraState):
    def set_up(self):
        self.inner = _Tensor()


class _Tensor(_Counting):
    def get_extra_state(self):
        return torch.tensor([self.count, float(self.last)], dtype=torch.float64)

    def set_extra_state(self, state):
        self.count, self.last = int(state[0]), state[1].float()


@MODELS.register_module()
class TransformsAtLoading(Stateful):
    """What is saved is another form of the parameter, and loading has an effect besides."""

    def set_up(self):
        self.scale = nn.Parameter(torch.tensor([0.5]))
        self.derived = 0.5

    def advance(self, x):
        self.derived = float(self.scale.detach())

    def factor(self):
        return self.scale + self.derived

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scale"] = (destination[prefix + "scale"] * 2).detach()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict[prefix + "scale"] = state_dict[prefix + "scale"] / 2
        self.derived = float(state_dict[prefix + "scale"])
        super()._load_from_state_dict(state_dict, prefix, *args)


@MODELS.register_module()
class KeepsBuffer(Stateful):
    """A buffer of some kind; ``advance`` changes it."""

    def __init__(self, kind, width=6):
        self.kind = kind
        super().__init__(width)

    def set_up(self):
        first = {
            "expanded": torch.zeros(1, 3).expand(4, 3), "strided": torch.zeros(8).as_strided((2, 3), (4, 1)),
            "windows": torch.zeros(6).unfold(0, 3, 1), "growing": torch.empty(0, 6), "late": None,
            "leaving": torch.ones(3), "retyped": torch.zeros(2), "coo": torch.eye(3).to_sparse(),
            "csr": torch.eye(3).to_sparse_csr(), "complex128": torch.zeros(2, dtype=torch.complex128),
            "transposed": torch.zeros(2, 3).t(), "densified": torch.eye(3).to_sparse(),
        }[self.kind]  # fmt: skip
        self.register_buffer("kept", first)

    def advance(self, x):
        value = x.mean()
        if self.kind in ("expanded", "windows"):
            self.kept[0].add_(value)  # and so every row that shares its memory
        elif self.kind in ("strided", "transposed", "complex128"):
            self.kept.add_(value)
        elif self.kind == "growing":
            self.kept = torch.cat([self.kept, x.mean(0, keepdim=True)])
        elif self.kind == "late":
            self.kept = value if self.kept is None else self.kept + value
        elif self.kind == "leaving":
            self.kept = None
        elif self.kind == "retyped":
            self.kept = self.kept.double() + value.double() / 3
        elif self.kind == "densified":
            self.kept = self.kept.to_dense() + value if self.kept.is_sparse else self.kept + value
        elif self.kind == "csr":
            self.kept = (self.kept.to_dense() + value).to_sparse_csr()
        else:
            self.kept = (self.kept.to_dense() + value * torch.eye(3).roll(int(self.kept._nnz()) % 3, 0)).to_sparse()

    def factor(self):
        if self.kept is None:
            return 0.3
        value = self.kept.to_dense() if self.kept.layout is not torch.strided else self.kept
        return torch.tanh(value.sum().abs().float())


KINDS = [
    "expanded", "strided", "growing", "late", "leaving", "retyped", "coo", "csr", "complex128", "transposed",
    "densified",
]  # fmt: skip
MODELS_OF_THEIR_OWN = [
    *({"type": kind.__name__} for kind in (
        KeepsPlainValues, HoldsMetric, HoldsExtraState, KeepsTensorExtraState, TransformsAtLoading
    )),
    *({"type": "KeepsBuffer", "kind": kind} for kind in KINDS),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse .* support is in beta")
@pytest.mark.parametrize("model", MODELS_OF_THEIR_OWN, ids=lambda model: model.get("kind", model["type"]))
def test_a_resume_is_exact(model, tmp_path):
    assert_exact(tmp_path, crashes=[("iteration", 9), ("iteration", 17)], model=model)


class Complex(nn.Module):
    """A parameter of complex128."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(6, 2, dtype=torch.complex128) * (0.1 + 0.2j))

    def forward(self, x, y):
        out = (x.to(self.w.dtype) @ self.w).abs().float()
        return {"loss": nn.functional.cross_entropy(out, y), "accuracy": (out.argmax(1) == y).float().mean()}


def test_a_complex_parameter(tmp_path):
    MODELS.register_module(name="Complex", module=Complex, force=True)
    optimizer = {"optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9}}
    assert_exact(tmp_path, crashes=[("iteration", 9)], model={"type": "Complex"}, optim_wrapper=optimizer)


def test_weights_that_a_module_keeps_in_its_own_way_are_loaded(tmp_path):
    run(tmp_path / "first", model={"type": "TransformsAtLoading"})
    runner = make_runner(
        tmp_path / "second", model={"type": "TransformsAtLoading"}, load_from=str(tmp_path / "first" / "iter_20.pth")
    )
    runner.val()
    trained = run(tmp_path / "first", model={"type": "TransformsAtLoading"}).model
    assert runner.model.derived == float(runner.model.scale.detach()) == float(trained.scale.detach()) != 0.5


def test_an_extra_state_of_an_earlier_version(tmp_path, monkeypatch):
    """Extra states were once saved by the names of their modules."""
    from mmtrain.runner import checkpointer

    capture = checkpointer.capture_small_state

    def as_before(*args):
        state = capture(*args)
        model = state.pop("model")
        state["modules"] = {name.removesuffix("._extra_state"): value for name, value in model.items()}
        return state

    monkeypatch.setattr(checkpointer, "capture_small_state", as_before)
    assert_exact(tmp_path, crashes=[("iteration", 9)], model={"type": "HoldsExtraState"})


def test_a_buffer_of_another_shape_in_the_config_is_refused(tmp_path):
    """It did not change while the checkpoint's run trained, so the model of the config is another one."""
    run(tmp_path, model={"type": "KeepsBuffer", "kind": "strided"}, crash=("iteration", 9))
    with pytest.raises(CheckpointError, match=r"with a different shape: kept \(saved \[2, 3\], here \[3, 2\]\)"):
        run(tmp_path, model={"type": "KeepsBuffer", "kind": "transposed"})


class Odd(Stateful):
    def set_up(self):
        self.thing = nn.Identity()

    def advance(self, x):
        pass

    def factor(self):
        return 0.0


class OneWay(nn.Module):
    def get_extra_state(self):
        return 1


class Opaque(OneWay):
    def get_extra_state(self):
        return object()

    def set_extra_state(self, state):
        pass


class Lazy(Odd):
    def set_up(self):
        self.thing = nn.LazyLinear(2)


class Quantized(Odd):
    def set_up(self):
        self.register_buffer("thing", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))


REFUSED = {
    "one way": (OneWay, r"thing \(OneWay\) has get_extra_state\(\) but not set_extra_state\(\)"),
    "opaque": (Opaque, r"thing\._extra_state is a object .* a checkpoint cannot hold"),
    "lazy": (Lazy, r"thing\.weight has no shape before the first forward"),
    "quantized": (Quantized, r"thing is a Tensor .*qint8"),
}


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_checkpoint_can_hold_is_refused_before_training(name, tmp_path):
    part, message = REFUSED[name]

    class Refused(part if issubclass(part, Odd) else Odd):
        def set_up(self):
            super().set_up()
            if not issubclass(part, Odd):
                self.thing = part()

    MODELS.register_module(name="Refused", module=Refused, force=True)
    with pytest.raises(ConfigError, match=message):
        make_runner(tmp_path, model={"type": "Refused"})
