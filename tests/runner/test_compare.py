"""What a changed config means for a resume."""

import pytest

from mmtrain.errors import CheckpointError
from mmtrain.progress import Progress
from mmtrain.runner import compare
from mmtrain.runner.data_identity import check_same_data_as_checkpoint


def test_another_seed_is_warned_about():
    assert compare.seed_warnings(5, 5) == compare.seed_warnings(None, 5) == []
    assert "randomness=dict(seed=5)" in compare.seed_warnings(5, 6)[0]


def test_differences_have_their_class_and_variables_are_left_out():
    old = {
        "optim_wrapper.optimizer.lr": "0.1",
        "default_hooks.logger.interval": "10",
        "train_dataloader.batch_size": "8",
    }
    new = {**old, "optim_wrapper.optimizer.lr": "0.2", "default_hooks.logger.interval": "5", "my_variable": "3"}
    new["train_dataloader.batch_size"] = "4"
    new["param_scheduler[0].end"] = "7"
    assert compare.differences(old, new) == [
        "default_hooks.logger.interval: 10 -> 5 (no effect)",
        "optim_wrapper.optimizer.lr: 0.1 -> 0.2 (honoured)",
        "param_scheduler[0].end: not set -> 7 (honoured)",
        "train_dataloader.batch_size: 8 -> 4 (rescaled)",
    ]


def test_a_hook_that_acts_on_training_has_an_effect():
    line = "default_hooks.ema.type: not set -> EMAHook (honoured)"
    assert compare.differences({}, {"default_hooks.ema.type": "EMAHook"}) == [line]


def test_a_class_and_its_name_are_equal():
    assert compare.flat_config({"model": {"type": Progress}}) == compare.flat_config(
        {"model": {"type": "mmtrain.x.Progress"}}
    )


def test_a_flat_config_goes_into_dicts_and_lists_of_dicts():
    cfg = {"a": {"b": [{"c": 1}, {"c": 2}], "d": [1, 2]}}
    assert compare.flat_config(cfg) == {"a.b[0].c": "1", "a.b[1].c": "2", "a.d": "[1, 2]"}


def test_another_optimizer_or_dataset_is_refused_with_the_remedy():
    compare.check_same_optimizer("AdamW", "AdamW")
    check_same_data_as_checkpoint("a", "a")
    with pytest.raises(
        CheckpointError, match=r"is SGD, but this checkpoint was saved with AdamW.*resume=False, load_from"
    ):
        compare.check_same_optimizer("AdamW", "SGD")
    with pytest.raises(CheckpointError, match="resume_data='restart'"):
        check_same_data_as_checkpoint("a", "b")
