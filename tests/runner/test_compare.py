"""What a changed config means for a resume."""

import pytest
import torch
from mmengine.dataset import BaseDataset, RepeatDataset
from torch.utils.data import ConcatDataset, Subset

from mmtrain.errors import CheckpointError
from mmtrain.progress import Progress
from mmtrain.runner import compare
from mmtrain.runner.compare import Scale


def test_iter_1500_at_batch_128_is_iteration_3000_at_batch_64():
    at = Progress(epoch=3, offset=42 * 256, samples=1500 * 256, iteration=1500, epoch_iteration=42, update=1500)
    moved = compare.rescale(at, Scale(256, 1, 486), Scale(128, 1, 972))
    assert (moved.iteration, moved.epoch_iteration) == (3 * 972 + 84, 84)
    assert moved.iteration == 3000
    assert (moved.epoch, moved.offset, moved.samples, moved.update) == (at.epoch, at.offset, at.samples, at.update)
    assert compare.rescale(moved, Scale(128, 1, 972), Scale(256, 1, 486)) == at


def test_skipped_iterations_are_rescaled_too():
    at = Progress(offset=100, samples=100, iteration=10, epoch_iteration=10, skipped=4)
    assert compare.rescale(at, Scale(10, 1, 50), Scale(5, 1, 100)).skipped == 8


def test_iterations_of_other_data_keep_their_share():
    """The passes so far were longer than those of today's data, so they say nothing of the iterations done."""
    at = Progress(epoch=5, offset=30, samples=50_030, iteration=5003, epoch_iteration=3)
    assert compare.rescale(at, Scale(10, 1, 1000), Scale(5, 1, 40), same_data=False).iteration == 10006
    later = compare.rescale(at, Scale(10, 1, 20), Scale(5, 1, 40))  # at the next restart: passes of 20 now
    assert (later.iteration, later.epoch_iteration) == (10006, 6)


def test_another_seed_is_warned_about():
    assert compare.seed_lines(5, 5) == compare.seed_lines(None, 5) == []
    assert "randomness=dict(seed=5)" in compare.seed_lines(5, 6)[0]


def test_without_epochs_iterations_come_from_samples():
    at = Progress(samples=1000, iteration=100)
    assert compare.rescale(at, Scale(10), Scale(20)).iteration == 50


def test_an_unchanged_batch_changes_nothing():
    at = Progress(1, 2, 3, 4, 5, 6, 7)
    assert compare.rescale(at, Scale(8, 1, 5), Scale(8, 3, 5)) is at


def test_an_unchanged_effective_batch_is_called_equivalent():
    told, warned = compare.scale_lines(Scale(128, 1), Scale(64, 2), lr=0.1)
    assert not warned
    assert "equivalent" in told[0]
    assert "128 x accumulation 1 -> 64 x 2" in told[0]


def test_a_changed_effective_batch_is_warned_about_with_both_rules():
    told, warned = compare.scale_lines(Scale(64, 1), Scale(256, 1), lr=0.1)
    assert not told
    assert "64 to 256" in warned[0]
    assert "linear rule would make it 0.4" in warned[0]
    assert "square-root rule 0.2" in warned[0]


def test_nothing_is_said_of_an_equal_scale():
    assert compare.scale_lines(Scale(8, 2, 5), Scale(8, 2, 5), lr=0.1) == ([], [])


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


def test_a_class_and_its_name_are_no_difference():
    assert compare.flatten({"model": {"type": Progress}}) == compare.flatten({"model": {"type": "mmtrain.x.Progress"}})


def test_flatten_goes_into_dicts_and_lists_of_dicts():
    cfg = {"a": {"b": [{"c": 1}, {"c": 2}], "d": [1, 2]}}
    assert compare.flatten(cfg) == {"a.b[0].c": "1", "a.b[1].c": "2", "a.d": "[1, 2]"}


def test_another_optimizer_or_data_set_is_refused_with_the_remedy():
    compare.refuse_other_optimizer("AdamW", "AdamW")
    compare.refuse_other_data("a", "a")
    with pytest.raises(CheckpointError, match=r"SGD, the checkpoint's run used AdamW.*resume=False, load_from"):
        compare.refuse_other_optimizer("AdamW", "SGD")
    with pytest.raises(CheckpointError, match="resume_data='restart'"):
        compare.refuse_other_data("a", "b")


def test_switching_data():
    at = Progress(epoch=2, offset=40, samples=240, iteration=24, epoch_iteration=4)
    assert compare.switch_data(at, "continue", Scale(10, 1, 10)) is at
    restarted = compare.switch_data(at, "restart", Scale(10, 1, 10))
    assert (restarted.epoch, restarted.offset, restarted.iteration) == (2, 0, 24)
    skipped = compare.switch_data(at, {"skip_iters": 13}, Scale(10, 1, 10))
    assert (skipped.epoch, skipped.offset, skipped.epoch_iteration, skipped.iteration) == (3, 30, 3, 24)
    assert compare.switch_data(at, {"skip_iters": 0}, Scale(10, 1, 10)) == restarted
    with pytest.raises(CheckpointError, match="resume_data is 'again'"):
        compare.switch_data(at, "again", Scale(10))


def test_a_fingerprint_is_the_data_sets_own_or_its_class_and_length():
    class Own(list):
        def fingerprint(self):
            return "abc"

    assert compare.data_fingerprint(Own()) == "abc"
    assert compare.data_fingerprint([1, 2]) == "list:2"
    assert compare.data_fingerprint(iter([])) == "list_iterator:unknown"


class Files(list):
    """Data that know what they are made of."""

    def __init__(self, name, size=4):
        super().__init__(range(size))
        self.name = name

    def fingerprint(self):
        return self.name


class Annotated(BaseDataset):
    """The same as MMEngine's wrappers want it."""

    def __init__(self, files):
        self.files = files
        super().__init__()

    def load_data_list(self):
        return [{"item": item} for item in self.files]

    def fingerprint(self):
        return self.files.fingerprint()


WRAPPERS = {
    "ConcatDataset": lambda data: ConcatDataset([data, Files("other")]),
    "Subset": lambda data: Subset(data, [0, 1]),
    "RepeatDataset": lambda data: RepeatDataset(Annotated(data), times=2),
    "Subset of ConcatDataset": lambda data: Subset(ConcatDataset([data, [1, 2]]), [0, 1]),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_what_a_wrapper_holds_counts(wrap):
    a, again, b = (compare.data_fingerprint(wrap(Files(name))) for name in "aab")
    assert a == again != b
    compare.refuse_other_data(a, again)
    with pytest.raises(CheckpointError, match="training data differ"):
        compare.refuse_other_data(a, b)


def test_a_checkpoint_that_knows_only_a_wrappers_class_and_length_is_taken():
    own = compare.data_fingerprint(ConcatDataset([Files("a"), Files("b")]))
    assert own.startswith("ConcatDataset:8/")
    compare.refuse_other_data("ConcatDataset:8", own)
    with pytest.raises(CheckpointError, match="training data differ"):
        compare.refuse_other_data("ConcatDataset:9", own)
    with pytest.raises(CheckpointError, match="training data differ"):
        compare.refuse_other_data("a", "a/b")


def test_parts_that_know_nothing_of_themselves_add_nothing():
    assert compare.data_fingerprint(ConcatDataset([[1, 2], Subset([1, 2], [0])])) == "ConcatDataset:3"
    odd = Subset(torch.tensor(1), [0])  # has a __len__ that raises
    assert compare.data_fingerprint(odd) == "Subset:1"
