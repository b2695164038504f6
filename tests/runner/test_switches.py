"""Parameters that are frozen and unfrozen, and modules in evaluation mode, over validations and resumes."""

import pytest
import torch
from exactness import assert_exact, run
from parts import Net, make_runner
from torch import nn

from mmtrain.registry import HOOKS, MODELS
from mmtrain.runner.switches import ModelSwitches

BY_EPOCH = {
    "train_cfg": {"by_epoch": True, "max_iters": None, "max_epochs": 4, "val_interval": 1},
    "default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 3, "by_epoch": False}},
}
STOPS = [("iteration", 11), ("iteration", 14), ("iteration", 19)]  # epochs have 6 iterations


@HOOKS.register_module(force=True)
class UnfreezeAt:
    """Freezes a layer before training and unfreezes it at an epoch, as the guard's message advises."""

    def __init__(self, epoch=1, layer="first"):
        self.epoch, self.layer = epoch, layer

    def before_train(self, runner):
        runner.model.get_submodule(self.layer).requires_grad_(False)

    def before_train_epoch(self, runner):
        if runner.epoch == self.epoch:
            runner.model.get_submodule(self.layer).requires_grad_(True)


@HOOKS.register_module(force=True)
class FreezeAt:
    def __init__(self, iteration):
        self.iteration = iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.iteration:
            runner.model.first.requires_grad_(False)


@HOOKS.register_module(force=True)
class EvalNorm:
    """Puts a norm into evaluation mode, and out of it, at iterations."""

    def __init__(self, at, until=None):
        self.at, self.until = at, until

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            runner.model.norm.eval()
        if runner.iter == self.until:
            runner.model.norm.train()


@MODELS.register_module(force=True)
class EvalNormNet(Net):
    """Its ``__init__`` puts the norm into evaluation mode."""

    def __init__(self, **options):
        super().__init__(**options)
        self.norm.eval()


@MODELS.register_module(force=True)
class OwnTrainNet(Net):
    """Overrides ``train()`` as MMEngine's models with ``norm_eval`` and ``frozen_stages`` do."""

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        self.first.requires_grad_(False)
        return self


HOOK_CASES = {
    "unfreeze": [UnfreezeAt(1)],
    "freeze": [FreezeAt(10)],
    "freeze, then unfreeze in the middle": [UnfreezeAt(0), FreezeAt(8)],
    "eval from the start": [EvalNorm(0)],
    "eval later": [EvalNorm(8)],
    "eval for a while": [EvalNorm(4, until=13)],
}


@pytest.mark.parametrize("name", HOOK_CASES)
def test_what_hooks_switch_survives_validations_and_resumes(name, tmp_path):
    assert_exact(tmp_path, crashes=STOPS, custom_hooks=HOOK_CASES[name], **BY_EPOCH)


@pytest.mark.parametrize("model", ["EvalNormNet", "OwnTrainNet"])
def test_a_norm_that_the_model_puts_into_evaluation_mode(model, tmp_path):
    assert_exact(tmp_path, crashes=STOPS, model={"type": model}, **BY_EPOCH)
    runner = run(tmp_path / "broken", model={"type": model}, **BY_EPOCH)
    assert not runner.model.norm.training
    assert runner.model.norm.num_batches_tracked == 0


def test_unfreezing_trains_the_layer_after_a_resume(tmp_path):
    run(tmp_path, custom_hooks=[UnfreezeAt(1)], crash=("iteration", 14), **BY_EPOCH)
    runner = make_runner(tmp_path, custom_hooks=[UnfreezeAt(1)], resume=True, log_level="INFO", **BY_EPOCH)
    before = runner.model.first.weight.detach().clone()
    runner.train()
    assert runner.model.first.weight.requires_grad
    assert not torch.equal(before, runner.model.first.weight)
    log = next(runner.directory.log_dir.glob("*.log")).read_text()
    assert "Unfrozen, as at the checkpoint: first.weight, first.bias." in log


def test_what_is_changed_at_a_resume_stays_changed(tmp_path):
    """Only what changed while training is state: what today's hooks freeze before training is frozen."""
    run(tmp_path, crash=("iteration", 14), **BY_EPOCH)
    runner = run(tmp_path, custom_hooks=[UnfreezeAt(99)], **BY_EPOCH)
    assert not runner.model.first.weight.requires_grad
    assert runner.model.last.weight.requires_grad


def test_training_starts_in_the_modes_that_the_model_was_built_with(tmp_path):
    runner = make_runner(tmp_path, model={"type": "EvalNormNet"}, log_level="INFO")
    runner.train()
    log = next(runner.directory.log_dir.glob("*.log")).read_text()
    assert "These modules are in evaluation mode since the model was built and stay in it: norm." in log


def test_states_name_only_what_changed():
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    model[0].weight.requires_grad_(False)
    switches = ModelSwitches(model)
    assert switches.state_dict() == {}
    assert switches.begin_training() == []
    assert switches.state_dict() == {}
    model[0].weight.requires_grad_(True)
    model[1].eval()
    state = switches.state_dict()
    assert state == {"requires_grad": {"0.weight": True}, "training": {"1": False}}
    again = ModelSwitches(nn.Sequential(nn.Linear(1, 1), nn.Dropout()))
    again.load_state_dict({**state, "requires_grad": {"0.weight": True, "gone": False}})
    assert again.begin_training() == ["Set to evaluation mode, as at the checkpoint: 1."]
    assert again.state_dict() == {"training": {"1": False}}
