"""Optimizers with state in unusual places, and groups that hooks change, over a crash and a resume."""

import pytest
import torch
from exactness import assert_exact, train
from parts import logged

from mmtrain.errors import ConfigError
from mmtrain.registry import OPTIMIZERS


@OPTIMIZERS.register_module()
class CountsInGroup(torch.optim.SGD):
    """Keeps a counter, a tensor and text in its groups, and state that belongs to no parameter."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["sum"] = group.get("sum", torch.zeros(())) + 0.1
            group["phase"] = "late" if group["k"] > 3 else "early"
            rate = group["lr"]
            self.state["global"]["steps"] = self.state["global"].get("steps", 0) + 1
            group["lr"] = rate / (1 + 0.1 * group["k"] + group["sum"].item() + (group["phase"] == "late"))
        loss = super().step(closure)
        for group in self.param_groups:
            group["lr"] = 0.05
        return loss


@OPTIMIZERS.register_module()
class Accumulating(torch.optim.Optimizer):
    """Keeps the last gradients of each parameter in a list."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                history = self.state[parameter].setdefault("history", [])
                history.append(parameter.grad.clone())
                del history[:-3]
                parameter.sub_(sum(history) * (group["lr"] * len(history)))


@OPTIMIZERS.register_module()
class Unsavable(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["helper"] = object()
        return super().step(closure)


class Halve:
    """Changes a group, as a hook that lowers the learning rate by hand."""

    def after_train_epoch(self, runner):
        for group in runner.optim_wrapper.param_groups:
            group["lr"] *= 0.5
            group["weight_decay"] = 0.02 * (runner.epoch + 1)


class AddGroup:
    """Unfreezes a layer and gives it to the optimizer, at the epoch, or at the start of every process for None."""

    def __init__(self, epoch, layer):
        self.epoch = epoch
        self.layer = layer

    def before_train(self, runner):
        if self.epoch is None:
            self.add(runner)

    def before_train_epoch(self, runner):
        if self.epoch == runner.epoch and len(runner.optim_wrapper.param_groups) == 1:
            self.add(runner)

    def add(self, runner):
        parameters = list(getattr(runner.model, self.layer).parameters())
        for parameter in parameters:
            parameter.requires_grad_(True)
        runner.optim_wrapper.optimizer.add_param_group({"params": parameters, "lr": 0.02})


CRASHES = [("iteration", 7), ("save", 14)]


@pytest.mark.parametrize("kind", ["CountsInGroup", "Accumulating"])
def test_state_in_unusual_places(tmp_path, kind):
    optimizer = {"type": kind, "lr": 0.05}
    assert_exact(tmp_path, crashes=CRASHES, optim_wrapper={"optimizer": optimizer}, param_scheduler=[])


def test_values_of_a_group_that_a_hook_changes(tmp_path):
    optimizer = {"type": "AdamW", "lr": 0.05}
    assert_exact(
        tmp_path, crashes=CRASHES, custom_hooks=[Halve()], optim_wrapper={"optimizer": optimizer}, param_scheduler=[]
    )


def test_a_value_that_the_config_changes_is_the_configs(tmp_path):
    options = {"param_scheduler": []}
    train(tmp_path, crash=("iteration", 14), hooks=[Halve()], optim_wrapper=adamw(lr=0.04), **options)
    runner = train(tmp_path, crash=("iteration", 15), optim_wrapper=adamw(lr=0.1), **options)
    (group,) = runner.optim_wrapper.param_groups
    assert group["lr"] == 0.1
    assert group["weight_decay"] == 0.02  # the hook's value: the config has not changed it


def adamw(**options):
    return {"optimizer": {"type": "AdamW", **options}}


@pytest.mark.parametrize("epoch", [0, 1, None])
@pytest.mark.parametrize("schedule", [[], [{"type": "CosineAnnealingLR", "by_epoch": False}]], ids=["", "cosine"])
def test_a_group_that_a_hook_adds(tmp_path, epoch, schedule):
    """At the start of every process, or once, at an epoch: the resume then adds it."""
    assert_exact(
        tmp_path,
        crashes=[("iteration", 7), ("iteration", 16), ("save", 20)],
        model={"type": "Net", "frozen": True},
        custom_hooks=[AddGroup(epoch, "first"), {"type": "EMAHook", "momentum": 0.1}],
        optim_wrapper=adamw(lr=0.05),
        param_scheduler=schedule,
    )


def test_a_group_that_a_hook_adds_follows_the_schedule(tmp_path):
    runner = train(
        tmp_path,
        model={"type": "Net", "frozen": True},
        hooks=[AddGroup(1, "first")],
        optim_wrapper=adamw(lr=0.05),
        param_scheduler=[{"type": "ConstantLR", "by_epoch": False, "factor": 0.5, "end": 10_000}],
    )
    assert [group["lr"] for group in runner.optim_wrapper.param_groups] == [0.025, 0.01]


def test_an_optimizer_whose_state_cannot_be_saved_is_refused_after_its_first_update(tmp_path):
    with pytest.raises(ConfigError, match=r"the state of Unsavable cannot be saved: .*save_optimizer=False"):
        train(tmp_path, optim_wrapper={"optimizer": {"type": "Unsavable", "lr": 0.1}})
    assert logged(tmp_path, "loss") in ([], {})
