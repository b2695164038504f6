"""A run that crashed and was resumed leaves bit for bit what an uninterrupted one leaves.

The cases are chosen so that every pair of values of two factors is in at least one of them. The full product runs
with ``pytest -m slow tests/runner/test_exact_resume.py``.
"""

import itertools

import pytest
import torch
from exactness import assert_exact, pairwise
from parts import Net, make_runner
from torch import nn

from mmtrain.optim import OptimWrapperDict, build_optim_wrapper
from mmtrain.registry import METRICS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS

SCHEDULES = {
    "cosine": [{"type": "CosineAnnealingLR", "by_epoch": False}],
    "warmup+cosine": [
        {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "end": 5},
        {"type": "CosineAnnealingLR", "by_epoch": False, "begin": 5, "eta_min_ratio": 0.1},
    ],
    "converted epochs": [{"type": "PolyLR", "by_epoch": True, "convert_to_iter_based": True, "power": 2.0}],
    "step": [{"type": "MultiStepLR", "by_epoch": False, "milestones": [4, 9, 15]}],
    "momentum": [{"type": "OneCycleLR", "by_epoch": False, "eta_max": 0.02, "total_steps": 24},
                 {"type": "LinearMomentum", "by_epoch": False, "start_factor": 0.9}],
    "restarts": [{"type": "CosineRestartLR", "by_epoch": False, "periods": [8, 16], "restart_weights": [1, 0.5],
                  "eta_min": 1e-4}],
    "exponential": [{"type": "ExponentialLR", "by_epoch": False, "gamma": 0.9}],
    "constant": [{"type": "ConstantLR", "by_epoch": True, "factor": 0.5, "end": 2}],
    "plateau": [{"type": "ReduceOnPlateauLR", "monitor": "loss", "by_epoch": True, "patience": 0, "factor": 0.5,
                 "threshold": 10.0}],
}  # fmt: skip

FACTORS = {
    "stop": ["mid-epoch", "epoch edge", "in a window", "in a validation", "in a save", "twice"],
    "workers": [(0, 0), (2, 2), (0, 2), (4, 0)],
    "accumulation": [1, 2, 3],
    "precision": ["float32", "bfloat16", "float16"],
    "ema": [False, True],
    "schedule": list(SCHEDULES),
    "by_epoch": [False, True],
    "seed": [5, None],
}

# Scalars that measure saves; they belong to the step at which it ended.
SAVES = ("save_time", "save_stall", "save_bytes")

STOPS = {
    "mid-epoch": [("iteration", 16)],
    "epoch edge": [("iteration", 12)],
    "in a window": [("iteration", 17)],
    "in a validation": [("validation", 12)],
    "in a save": [("save", 14)],
    "twice": [("iteration", 9), ("iteration", 20)],
}

# In the full product the schedules and the two ways to a seed take turns.
FULL_FACTORS = {**FACTORS, "workers": [(0, 0), (2, 2), (4, 0)], "schedule": [None], "seed": [None]}
FULL = [dict(zip(FULL_FACTORS, values, strict=True)) for values in itertools.product(*FULL_FACTORS.values())]


def changes_of(case):
    optim = {"optimizer": {"type": "AdamW", "lr": 0.01}, "accumulative_counts": case["accumulation"]}
    if case["precision"] != "float32":
        optim.update(type="AmpOptimWrapper", dtype=case["precision"])
        if case["precision"] == "float16":
            optim["loss_scale"] = {"init_scale": 2.0**20, "growth_interval": 5}  # overflows at first, grows later
    ends = {"max_iters": 24, "val_interval": 6}
    if case["by_epoch"]:
        ends = {"by_epoch": True, "max_iters": None, "max_epochs": 4, "val_interval": 1}
    hooks = {"checkpoint": {"type": "CheckpointHook", "interval": 4, "by_epoch": False, "max_keep_ckpts": 2}}
    if case["ema"]:  # the metric is asked for at every start, which must move nothing
        hooks["checkpoint"]["save_best"] = "loss"
    if case["ema"]:
        hooks["ema"] = {"type": "EMAHook", "momentum": 0.1}
    return {
        "optim_wrapper": optim,
        "train_cfg": ends,
        "param_scheduler": SCHEDULES[case["schedule"]],
        "default_hooks": hooks,
        "randomness": {"seed": case["seed"]},
    }


def check(case, folder, monkeypatch):
    # A seed that is not given is drawn; both runs draw the same one here, so that they can be compared. The resumed
    # process draws another: what counts is that it takes the checkpoint's.
    drawn = iter([77, 77, 1234, 4321])
    monkeypatch.setattr("mmtrain.runner.sections.draw_seed", lambda: next(drawn))
    before, after = case["workers"]
    assert_exact(
        folder,
        crashes=STOPS[case["stop"]],
        first={"train_dataloader": {"num_workers": before}},
        later={"train_dataloader": {"num_workers": after}},
        **changes_of(case),
    )


CASES = pairwise(FACTORS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(f"{key}={value}" for key, value in case.items()))
def test_exact(case, tmp_path, monkeypatch):
    check(case, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(FULL)))
def test_exact_with_every_combination(number, tmp_path, monkeypatch):
    schedule, seed = list(SCHEDULES)[number % len(SCHEDULES)], FACTORS["seed"][number // len(SCHEDULES) % 2]
    check({**FULL[number], "schedule": schedule, "seed": seed}, tmp_path, monkeypatch)


def test_the_cases_cover_every_pair():
    for a, b in itertools.combinations(FACTORS, 2):
        assert {(case[a], case[b]) for case in CASES} == set(itertools.product(FACTORS[a], FACTORS[b]))


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class OneForEachPart:
    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        self.parts = {name: cfg for name, cfg in optim_wrapper_cfg.items() if name in ("gen", "disc")}

    def __call__(self, model):
        made = {name: build_optim_wrapper(getattr(model, name), cfg) for name, cfg in self.parts.items()}
        return OptimWrapperDict(**made)


@MODELS.register_module()
class Adversaries(nn.Module):
    """A generator and a discriminator with an optimizer each."""

    def __init__(self):
        super().__init__()
        self.gen = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 6))
        self.disc = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))

    def forward(self, x, y):
        return {"loss": self.disc(self.gen(x)).square().mean()}

    def train_step(self, data, optim_wrapper):
        softplus, fake = nn.functional.softplus, self.gen(torch.randn_like(data["x"]))
        disc_loss = softplus(-self.disc(data["x"])).mean() + softplus(self.disc(fake.detach())).mean()
        optim_wrapper["disc"].update_params(disc_loss)
        self.disc.requires_grad_(False)
        gen_loss = softplus(-self.disc(fake)).mean()
        optim_wrapper["gen"].update_params(gen_loss)
        self.disc.requires_grad_(True)
        return {"loss": (disc_loss + gen_loss).detach()}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_several_optimizers(tmp_path, accumulation):
    pair = {
        "gen": {"optimizer": {"type": "Adam", "lr": 0.01}, "accumulative_counts": accumulation},
        "disc": {"optimizer": {"type": "SGD", "lr": 0.01, "momentum": 0.9}, "accumulative_counts": accumulation},
    }
    assert_exact(
        tmp_path,
        crashes=[("iteration", 9), ("validation", 12)],
        model={"type": "Adversaries"},
        optim_wrapper={"optimizer": None, "constructor": "OneForEachPart", **pair},
        param_scheduler={"gen": [{"type": "CosineAnnealingLR", "by_epoch": False}], "disc": SCHEDULES["step"]},
    )


@MODELS.register_module()
class AdversariesLeavingGradients(Adversaries):
    """Its second loss leaves gradients in the part that its first optimizer trains."""

    def train_step(self, data, optim_wrapper):
        optim_wrapper["disc"].update_params(self.disc(data["x"]).square().mean())
        loss = self.disc(self.gen(data["x"])).mean()
        optim_wrapper["gen"].update_params(loss)
        return {"loss": loss.detach()}


def test_gradients_that_are_not_saved_are_reported_once(tmp_path, capfd):
    pair = {name: {"optimizer": {"type": "SGD", "lr": 0.01}} for name in ("gen", "disc")}
    make_runner(
        tmp_path, model={"type": "AdversariesLeavingGradients"}, param_scheduler=None, log_level="INFO",
        optim_wrapper={"optimizer": None, "constructor": "OneForEachPart", **pair},
    ).train()  # fmt: skip
    assert capfd.readouterr().err.count("train_step leaves gradients behind (disc.0.weight)") == 1


def test_the_curves_of_tensorboard(tmp_path):
    """No point is there twice or missing, over the event files of all starts."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    visualizer = {"type": "Visualizer", "vis_backends": [{"type": "TensorboardVisBackend"}]}
    assert_exact(tmp_path, crashes=STOPS["twice"], visualizer=visualizer)

    def points(work_dir):
        found = [
            (event.step, value.tag, value.tensor.float_val[0] if value.tensor.float_val else value.simple_value)
            for path in work_dir.glob("*/vis_data/events*")
            for event in EventFileLoader(str(path)).Load()
            for value in event.summary.value
        ]
        return sorted(point for point in found if point[1] not in ("time", "data_time", "memory", "eta", *SAVES))

    uninterrupted = points(tmp_path / "uninterrupted")
    assert len(uninterrupted) == len({(step, tag) for step, tag, _ in uninterrupted}) > 20 * 3
    assert points(tmp_path / "broken") == uninterrupted


@MODELS.register_module()
class Counting(Net):
    """A model with state that is not a tensor, and with a tensor that only ``get_extra_state`` returns."""

    def __init__(self):
        super().__init__()
        self.calls, self.sum = 0, torch.zeros(())

    def forward(self, x, y):
        out = super().forward(x, y)
        if self.training:
            self.calls, self.sum = self.calls + 1, self.sum + x.sum()
        return {**out, "loss": out["loss"] * (1 + 0.01 * self.calls) + 1e-3 * self.sum}

    def get_extra_state(self):
        return {"calls": self.calls, "sum": self.sum}

    def set_extra_state(self, state):
        self.calls, self.sum = state["calls"], state["sum"]


@METRICS.register_module()
class BestSoFar:
    """A metric that remembers earlier validations."""

    def __init__(self):
        self.best, self.found = 0.0, []

    def process(self, data_batch, data_samples):
        self.found.append(float(data_samples["accuracy"]))

    def evaluate(self, size):
        self.best, self.found = max(self.best, sum(self.found) / len(self.found)), []
        return {"accuracy": self.best}

    def state_dict(self):
        return {"best": self.best}

    def load_state_dict(self, state):
        self.best = state["best"]


def test_extra_state_of_modules_and_metrics(tmp_path):
    assert_exact(
        tmp_path,
        crashes=[("iteration", 9), ("validation", 15)],
        model={"type": "Counting"},
        val_evaluator={"type": "BestSoFar"},
        train_cfg={"val_interval": 5},
    )
