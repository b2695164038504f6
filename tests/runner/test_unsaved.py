"""What changes while a run trains and no checkpoint holds is named once, with the remedy; nothing else is."""

import importlib.util
import itertools
import logging
import random
import re
import time

import numpy as np
import pytest
import torch
from parts import Counter, Net, NoisyPoints, make_runner
from torch import nn

from mmtrain.registry import DATASETS, HOOKS, MODELS


def reported(folder, **changes):
    """The warnings about state that is not saved, of a run of 20 iterations."""
    runner = make_runner(folder, **changes)
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    runner.logger.addHandler(handler)
    runner.train()
    return [line for line in lines if "are in no checkpoint" in line]


@MODELS.register_module(force=True)
class Quiet(Net):
    """`Net` without its counter."""

    def forward(self, x, y):
        out = self.last(self.drop(torch.relu(self.norm(self.first(x)))))
        return {"loss": nn.functional.cross_entropy(out, y), "accuracy": (out.argmax(1) == y).float().mean()}


class Part:
    """An object of the user's with a counter and a generator."""

    def __init__(self):
        self.count, self.rng = 0, random.Random(0)

    def use(self):
        self.count += 1
        return self.rng.random()


@MODELS.register_module(force=True)
class Forgetful(Quiet):
    """Keeps something in the way that ``kind`` says and changes it in each training step."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        initial = {
            "tensor": torch.zeros(2), "number": 0, "list": [], "dict": {"n": 0}, "flag": False, "text": "warm-up",
            "generator": torch.Generator().manual_seed(1), "numpy": np.random.default_rng(1), "array": np.zeros(2),
            "random": random.Random(1), "object": Part(), "late": None,
        }  # fmt: skip
        if kind in initial:
            self.kept = initial[kind]
        elif kind != "new":
            self.register_buffer("kept", torch.zeros(2), persistent=False)

    def forward(self, x, y):
        if self.training:
            self.change(x)
        return super().forward(x, y)

    def change(self, x):
        kind = self.kind
        if kind == "tensor":
            self.kept = self.kept + x.mean()
        elif kind in ("number", "new", "late"):
            self.kept = (getattr(self, "kept", None) or 0) + 1
        elif kind == "list":
            self.kept.append(float(x.mean()))
        elif kind == "dict":
            self.kept["n"] += 1
        elif kind == "flag":
            self.kept = True
        elif kind == "text":
            self.kept = "trained"
        elif kind == "generator":
            torch.rand(1, generator=self.kept)
        elif kind in ("numpy", "random"):
            self.kept.random()
        elif kind == "object":
            self.kept.use()
        elif kind == "buffer in place":
            self.kept.add_(x.mean())
        elif kind == "buffer by data":
            self.kept.data.add_(x.mean())
        else:
            self.kept = self.kept + 1


NAMED = {
    "tensor": "model: kept changed", "number": "model: kept changed", "list": "model: kept changed",
    "dict": "model: kept changed", "flag": "model: kept changed", "text": "model: kept changed",
    "array": "model: kept changed", "new": "model: kept changed", "late": "model: kept changed",
    "generator": "model: kept changed .* draw from torch's", "numpy": "model: kept changed .* draw from torch's",
    "random": "model: kept changed .* draw from torch's",
    "buffer in place": r"model \(buffers with persistent=False\): kept changed .* persistent=True",
    "buffer by data": r"model \(buffers with persistent=False\): kept changed",
    "buffer replaced": r"model \(buffers with persistent=False\): kept changed",
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMED)
def test_what_a_model_keeps_beside_its_state_is_named(kind, tmp_path):
    lines = reported(tmp_path, model={"type": "Forgetful", "kind": kind})
    assert len(lines) == 1
    assert re.match(NAMED[kind], lines[0]), lines[0]


def test_what_an_object_inside_a_model_keeps_is_named(tmp_path):
    lines = reported(tmp_path, model={"type": "Forgetful", "kind": "object"})
    assert [line.split(" changed")[0] for line in lines] == ["model: kept.count", "model: kept.rng"]


class Metric(nn.Module):
    """Saves its state as torchmetrics does, only if it is persistent."""

    def __init__(self, persistent):
        super().__init__()
        self.total, self.is_persistent = torch.zeros(()), persistent

    def state_dict(self, destination=None, prefix="", keep_vars=False):
        destination = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        if self.is_persistent:
            destination[prefix + "total"] = self.total.clone()
        return destination


@MODELS.register_module(force=True)
class Measuring(Quiet):
    def __init__(self, persistent):
        super().__init__()
        self.metric = Metric(persistent)

    def forward(self, x, y):
        self.metric.total = self.metric.total + x.mean()
        return super().forward(x, y)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_module_that_may_save_its_state_and_does_not_is_named(persistent, tmp_path):
    lines = reported(tmp_path, model={"type": "Measuring", "persistent": persistent})
    assert [line.split(" changed")[0] for line in lines] == ([] if persistent else ["model metric: total"])


@HOOKS.register_module(force=True)
class CountsWithoutState:
    def __init__(self):
        self.seen, self.generator, self.runner = 0, np.random.RandomState(1), None

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen += 1
        self.generator.random()
        self.runner = runner


def test_what_a_hook_keeps_is_named(tmp_path):
    lines = reported(tmp_path, custom_hooks=[{"type": "CountsWithoutState"}], model={"type": "Quiet"})
    assert [line.split(" changed")[0] for line in lines] == [
        "hook CountsWithoutState: seen", "hook CountsWithoutState: generator"
    ]  # fmt: skip
    assert "give the hook state_dict() and load_state_dict()" in lines[0]


@DATASETS.register_module(force=True)
class PointsWithCounter(NoisyPoints):
    """Counts what it reads, in itself and in a transform, and draws from a generator of its own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.reads, self.transforms, self.rng = 0, [Part()], np.random.default_rng(0)

    def __getitem__(self, index):
        self.reads += 1
        self.rng.random()
        self.transforms[0].use()
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_a_data_set_keeps_is_named(wrapped, workers, tmp_path):
    """Also what the workers' copies of it keep."""
    dataset = {"type": "PointsWithCounter"}
    if wrapped:
        dataset = torch.utils.data.ConcatDataset([PointsWithCounter(size=20), PointsWithCounter(size=24)])
    loader = {"dataset": dataset, "num_workers": workers}
    lines = reported(
        tmp_path, train_dataloader=loader, model={"type": "Quiet"}, train_cfg={"max_iters": 30, "val_interval": 50}
    )
    assert len(lines) == 2
    inner = "dataset.datasets[0]." if wrapped else "dataset."
    assert lines[0].startswith(f"train_dataloader: {inner}reads, {inner}transforms[0].count")
    assert f"{inner}rng" in lines[1]


# ---- no false alarms


class Odd:
    """Raises whatever is asked of it."""

    def __repr__(self):
        raise ValueError("no")

    __eq__ = __len__ = __iter__ = __repr__
    __hash__ = object.__hash__


@MODELS.register_module(force=True)
class Caching(Quiet):
    """Everything that usual models keep and that no resume needs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(3, 3).tril(), persistent=False)
        self.register_buffer("table", torch.ones(3), persistent=False)
        self.position_cache, self.angles, self.size, self.features = None, None, None, None
        self.lookup_memo, self.counter = {}, itertools.count()
        self.odd = [torch.eye(3).to_sparse(), torch.empty(2, device="meta"), Odd(), {Odd(): 1}]

    def forward(self, x, y):
        self.position_cache = x.detach()
        self.lookup_memo[float(x.sum())] = 1
        if self.angles is None:
            self.angles, self.size = torch.arange(4.0), x.shape[1]
        self.features = self.first(x)  # in the graph
        self.table = torch.ones(3)  # computed again, the same
        next(self.counter)
        return super().forward(x, y)


@HOOKS.register_module(force=True)
class Watch:
    """Times iterations."""

    def __init__(self):
        self.began, self.last = 0.0, 0.0

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.began, self.last = time.time(), time.perf_counter()


EVERY_HOOK = {
    "default_hooks": {
        "checkpoint": {"type": "CheckpointHook", "interval": 7, "save_best": "loss", "max_keep_ckpts": 2},
        "ema": {"type": "EMAHook"}, "timer": {"type": "IterTimerHook"}, "runtime": {"type": "RuntimeInfoHook"},
        "early": {"type": "EarlyStoppingHook", "monitor": "loss", "patience": 50}, "empty": {"type": "EmptyCacheHook"},
    },
    "custom_hooks": [{"type": "SyncBuffersHook"}, {"type": "Counter"}],
}  # fmt: skip


def test_nothing_is_said_of_caches_clocks_and_our_own_hooks(tmp_path):
    assert reported(tmp_path / "a", model={"type": "Caching"}, custom_hooks=[{"type": "Watch"}]) == []
    assert reported(tmp_path / "b", model={"type": "Quiet"}, **EVERY_HOOK) == []


MODULES = {
    "norms": lambda: [nn.BatchNorm1d(6), nn.LayerNorm(6), nn.Dropout(0.1)],
    "spectral": lambda: [nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))],
    "weight norm": lambda: [nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))],
    "rnn": lambda: [nn.LSTM(6, 6, batch_first=True)],
    "attention": lambda: [nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)],
    "rrelu": lambda: [nn.RReLU(), nn.AlphaDropout(0.1)],
}


@MODELS.register_module(force=True)
class Usual(Quiet):
    def __init__(self, name):
        super().__init__()
        self.more = nn.ModuleList(MODULES[name]())

    def forward(self, x, y):
        for module in self.more:
            if isinstance(module, nn.LSTM | nn.TransformerEncoderLayer):
                x = x.unsqueeze(1)
            x = module(x)
            x = x[0] if isinstance(x, tuple) else x
            x = x.squeeze(1) if x.dim() == 3 else x
        return super().forward(x, y)


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_said_of_torchs_modules(name, tmp_path):
    assert reported(tmp_path, model={"type": "Usual", "name": name}) == []


def test_nothing_is_said_of_our_models_and_data_sets(tmp_path):
    text = "to be or not to be, that is the question " * 40
    model = {"type": "GPT", "vocab_size": 256, "context": 16, "width": 16, "layers": 2, "heads": 2}
    for positions in ("learned", "rotary"):
        data = {"dataset": {"type": "NoisyTokens", "text": text}, "batch_size": 4}
        lines = reported(
            tmp_path / positions, model={**model, "positions": positions}, train_dataloader=data, val_dataloader=None
        )
        assert lines == []


@DATASETS.register_module(force=True)
class NoisyTokens(torch.utils.data.Dataset):
    def __init__(self, text):
        self.tokens = torch.tensor(list(text.encode()))

    def __len__(self):
        return len(self.tokens) // 16 - 1

    def __getitem__(self, index):
        piece = self.tokens[index * 16 : index * 16 + 17]
        return {"input_ids": piece[:-1], "labels": piece[1:]}


def test_nothing_is_said_of_mmengines_models_and_data_sets(tmp_path):
    from mmengine.dataset import BaseDataset
    from mmengine.model import BaseDataPreprocessor, BaseModel

    class Points(BaseDataset):
        def load_data_list(self):
            return [{"x": [float(i), 1.0], "y": i % 2} for i in range(24)]

    class ToTensor:
        def __call__(self, sample):
            return {"inputs": torch.tensor(sample["x"]), "target": torch.tensor(sample["y"])}

    class Linear(BaseModel):
        def __init__(self):
            super().__init__(data_preprocessor=BaseDataPreprocessor())
            self.head = nn.Linear(2, 2)

        def forward(self, inputs, target, mode="loss"):
            return {"loss": nn.functional.cross_entropy(self.head(inputs), target)}

    MODELS.register_module(name="BaseModelLinear", module=Linear, force=True)
    for lazy in (False, True):
        data = Points(pipeline=[ToTensor()], lazy_init=lazy)
        found = reported(
            tmp_path / str(lazy), model={"type": "BaseModelLinear"}, val_dataloader=None,
            train_dataloader={"dataset": data, "batch_size": 8, "collate_fn": {"type": "default_collate"}},
        )  # fmt: skip
        assert found == []


STRATEGIES = {
    "ddp": {"type": "DDPStrategy"},
    "fsdp": {"type": "FSDPStrategy", "wrap": ["TinyBlock"]},
    **{f"zero{stage}": {"type": "DeepSpeedStrategy", "zero_optimization": {"stage": stage}} for stage in (1, 3)},
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_nothing_is_said_of_what_engines_do_to_a_model(pair, tmp_path, name):
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is optional and not installed")
    strategy = STRATEGIES[name]
    options = {"strategy": strategy, "iterations": 30, "log_level": "INFO"}
    pair.run("strategy_parts", "train", work_dir=str(tmp_path), world=2, **options)
    text = "".join(path.read_text() for path in tmp_path.rglob("*.log"))
    assert text
    assert "are in no checkpoint" not in text


def test_it_is_said_once_in_each_start(tmp_path):
    hooks = {"checkpoint": {"type": "CheckpointHook", "interval": 1}}  # the first save is in the first iteration
    model = {"type": "Forgetful", "kind": "number"}
    for end in (6, 12):
        lines = reported(
            tmp_path,
            model=model,
            default_hooks=hooks,
            train_cfg={"max_iters": end},
            resume=True,
            custom_hooks=[Counter()],
        )
        assert len(lines) == 1
