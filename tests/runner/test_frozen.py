"""Checkpoints without the parameters that do not train: where these come from, and the proof that they are the same."""

import pytest
import torch
from parts import make_runner
from starts import delete_checkpoints

from mmtrain.errors import CheckpointError


def test_frozen_parameters_can_be_left_out(tmp_path):
    hook = {"checkpoint": {"type": "CheckpointHook", "interval": 7, "save_frozen": False, "async_save": False}}
    runner = make_runner(tmp_path, model={"frozen": True}, default_hooks=hook)
    runner.train()
    delete_checkpoints(tmp_path, "iter_20.pth")
    resumed = make_runner(tmp_path, model={"frozen": True}, default_hooks=hook, resume=True)
    names = resumed.start.checkpoint.tensor_names("model")
    assert "first.weight" not in names
    assert "last.weight" in names
    resumed.train()
    assert torch.equal(resumed.model.last.weight, runner.model.last.weight)


PARTIAL = {"model": {"frozen": True}, "default_hooks": {"checkpoint": {"type": "CheckpointHook", "save_frozen": False}}}


def test_frozen_weights_of_load_from_are_loaded_again(tmp_path):
    """They are neither in the checkpoint nor in the model's construction."""
    make_runner(tmp_path / "base", randomness={"seed": 8}).train()
    given = {"resume": "auto", "load_from": str(tmp_path / "base" / "iter_20.pth")}
    begun = make_runner(tmp_path / "tuned", **PARTIAL, **given)
    begun.train()
    resumed = make_runner(tmp_path / "tuned", **PARTIAL, **given)
    resumed.train()
    for name, value in begun.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    with pytest.raises(
        CheckpointError, match="the 2 frozen parameters of this model are different .* give them again: resume='auto'"
    ):
        make_runner(tmp_path / "tuned", resume=True, **PARTIAL).train()


def test_other_frozen_weights_are_refused(tmp_path):
    make_runner(tmp_path, **PARTIAL).train()
    with pytest.raises(CheckpointError, match="without its frozen parameters"):
        make_runner(tmp_path, resume=True, randomness={"seed": 6}, **PARTIAL).train()


def test_what_was_frozen_after_it_had_trained_is_saved(tmp_path):
    class Freeze:
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            runner.model.first.requires_grad_(False)

    hook = PARTIAL["default_hooks"]
    begun = make_runner(tmp_path, default_hooks=hook, custom_hooks=[Freeze()])
    begun.train()
    resumed = make_runner(tmp_path, default_hooks=hook, custom_hooks=[Freeze()], resume=True)
    resumed.train()
    assert torch.equal(resumed.model.first.weight, begun.model.first.weight)


def test_a_checkpoint_without_frozen_parameters_still_needs_all_that_train(tmp_path):
    make_runner(tmp_path, **PARTIAL).train()
    with pytest.raises(CheckpointError, match="first"):
        make_runner(tmp_path, resume=True, default_hooks=PARTIAL["default_hooks"]).train()
