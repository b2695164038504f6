"""A run that continues with another config: what is honoured, recounted, or refused."""

import json
import shutil

import pytest
from parts import NoisyPoints, logged, make_runner
from starts import EVERY_7, delete_checkpoints, printed, start
from torch.utils.data import IterableDataset

from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.registry import DATASETS


def test_a_longer_run_follows_the_longer_curve(work, tmp_path):
    start(work, resume=True, train_cfg={"max_iters": 40})
    make_runner(tmp_path / "uninterrupted", train_cfg={"max_iters": 40}).train()
    extended, uninterrupted = logged(work, "lr"), logged(tmp_path / "uninterrupted", "lr")
    assert {step: extended[step] for step in range(21, 41)} == {step: uninterrupted[step] for step in range(21, 41)}


KEEP_2 = {
    "default_hooks": {"checkpoint": {**EVERY_7["default_hooks"]["checkpoint"], "interval": 2, "max_keep_ckpts": 2}}
}


def checkpoints(work):
    return sorted((path.name for path in work.glob("*.pth")), key=lambda name: int(name[5:-4]))


def test_a_run_whose_larger_batch_counts_fewer_iterations_keeps_and_finds_its_checkpoints(work, capfd):
    larger = {"train_dataloader": {"batch_size": 16}, **KEEP_2}
    start(work, resume=True, train_cfg={"max_iters": 14}, **larger)  # 20 iterations of 8 are 10 of 16
    assert checkpoints(work) == ["iter_12.pth", "iter_14.pth"]
    printed(capfd)
    start(work, resume=True, train_cfg={"max_iters": 16}, **larger)
    assert f"Auto resumed from the latest checkpoint {work}/iter_14.pth." in printed(capfd)
    assert checkpoints(work) == ["iter_14.pth", "iter_16.pth"]


def test_a_run_that_went_back_keeps_and_finds_its_checkpoints(work, capfd):
    start(work, resume="iter_7.pth", train_cfg={"max_iters": 12}, **KEEP_2)
    # The same command must be able to start there again, so the named checkpoint is kept.
    assert checkpoints(work) == ["iter_7.pth", "iter_10.pth", "iter_12.pth"]
    printed(capfd)
    start(work, resume=True, train_cfg={"max_iters": 16}, **KEEP_2)
    assert f"Auto resumed from the latest checkpoint {work}/iter_12.pth." in printed(capfd)


def test_a_run_from_scratch_keeps_its_checkpoints_and_the_old_ones(work, capfd):
    start(work, train_cfg={"max_iters": 6}, **KEEP_2)
    assert "holds checkpoints of an earlier run" in printed(capfd)
    assert checkpoints(work) == ["iter_4.pth", "iter_6.pth", "iter_7.pth", "iter_14.pth", "iter_20.pth"]
    start(work, resume=True, train_cfg={"max_iters": 12}, **KEEP_2)
    assert f"Auto resumed from the latest checkpoint {work}/iter_6.pth." in printed(capfd)
    assert checkpoints(work) == ["iter_7.pth", "iter_10.pth", "iter_12.pth", "iter_14.pth", "iter_20.pth"]
    earlier = min(work.glob("*/vis_data/scalars.json")).read_text().splitlines()
    assert json.loads(earlier[-1])["step"] == 20  # what that run logged past iteration 6 is still there


def test_the_current_learning_rate_and_decay_apply(work, capfd):
    delete_checkpoints(work, "iter_20.pth")
    runner = start(work, resume=True, optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.5, "weight_decay": 0.3}})
    text = printed(capfd)
    assert "optim_wrapper.optimizer.lr: 0.01 -> 0.5 (honoured)" in text
    assert runner.optim_wrapper.param_groups[0]["weight_decay"] == 0.3
    assert logged(work, "lr")[15][0] > 0.05


def test_half_the_batch_doubles_the_iterations(work, capfd):
    delete_checkpoints(
        work, "iter_20.pth"
    )  # now at iteration 14 at batch 8: 2 epochs of 6, and 16 samples of the third
    runner = start(
        work, resume=True, train_dataloader={"batch_size": 4}, optim_wrapper={"accumulative_counts": 2}, train_cfg={"max_iters": 40}
    )  # fmt: skip
    text = printed(capfd)
    assert "Resuming at iteration 26/40 (epoch 3, sample 16" in text
    assert "effective batch is still 8" in text
    assert runner.progress.epoch == 3


def test_a_changed_effective_batch_is_warned_about_loudly(work, capfd):
    delete_checkpoints(work, "iter_20.pth")
    start(work, resume=True, train_dataloader={"batch_size": 16})
    text = printed(capfd)
    assert "WARNING - THE EFFECTIVE BATCH CHANGED from 8 to 16" in text
    assert "0.02" in text
    assert "0.0141421" in text


class SamplesInTheLog:
    """Puts the samples consumed so far into every line."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        runner.scalars.record("samples", runner.progress.samples)


BOTH_LOGS = {
    "visualizer": {
        "type": "Visualizer",
        "vis_backends": [{"type": "LocalVisBackend"}, {"type": "TensorboardVisBackend"}],
    }
}
SAVING_EVERY_2 = {"default_hooks": {"checkpoint": {**EVERY_7["default_hooks"]["checkpoint"], "interval": 2}}}


def start_at(work, batch, iterations, *, resume=True, hooks=SAVING_EVERY_2):
    start(
        work, resume=resume, train_dataloader={"batch_size": batch}, train_cfg={"max_iters": iterations},
        custom_hooks=[SamplesInTheLog()], **BOTH_LOGS, **hooks,
    )  # fmt: skip


def history(work):
    """(step, samples) of the lines of all starts; TensorBoard's must be the same."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines, points = [], []
    for folder in sorted(work.glob("*/vis_data")):
        records = map(json.loads, (folder / "scalars.json").read_text().splitlines())
        lines += [(record["step"], record["samples"]) for record in records if record["mode"] == "train"]
        events = EventAccumulator(str(folder)).Reload()
        if "samples" in events.Tags()["scalars"]:
            points += [(event.step, event.value) for event in events.Scalars("samples")]
    assert lines == points
    return lines


def counted(sizes, *, first=0, samples=0):
    """(step, samples) after each of some iterations."""
    return [(first + n, samples + sum(sizes[:n])) for n in range(1, len(sizes) + 1)]


def test_logs_hold_every_sample_once_over_changes_of_the_batch(tmp_path, capfd):
    at_8 = counted([8, 8, 8, 8, 8, 4] * 3 + [8, 8])
    at_16 = counted([16, 12, 16, 16, 12, 16], first=10, samples=148)
    start_at(tmp_path, 8, 20)
    start_at(tmp_path, 16, 13)
    assert "Iterations are now counted at global batch size 16: iteration 10 corresponds to the old 20." in printed(
        capfd
    )
    start_at(tmp_path, 16, 16)
    assert "Iterations are now counted" not in printed(capfd)
    assert history(tmp_path) == at_8 + at_16
    start_at(tmp_path, 8, 34)
    assert history(tmp_path) == at_8 + at_16 + counted([8, 8], first=32, samples=236)
    # Back to the last checkpoint of the first batch size, by name: later logs are removed.
    start_at(tmp_path, 8, 16, resume="iter_8.pth")
    assert history(tmp_path) == at_8[:16]


def test_a_larger_batch_that_never_saved_leaves_nothing_in_the_logs(tmp_path):
    start_at(tmp_path, 8, 20)
    start_at(tmp_path, 16, 12, hooks={"default_hooks": {"checkpoint": None}})
    assert [step for step, _ in history(tmp_path)][-2:] == [11, 12]
    start_at(tmp_path, 8, 22)
    assert history(tmp_path) == counted([8, 8, 8, 8, 8, 4] * 3 + [8, 8, 8, 8])


def test_every_sample_of_an_epoch_is_read_once_over_a_change_of_batch(work):
    seen = []

    class Seen:
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.progress.epoch == 2:
                seen.extend(map(tuple, data_batch["x"].tolist()))

    plain = {"dataset": {"type": "NoisyPoints", "augment": False}}
    fresh = work.parent / "fresh"
    make_runner(fresh, train_dataloader=plain, train_cfg={"max_iters": 14}, custom_hooks=[Seen()], **EVERY_7).train()
    make_runner(
        fresh, train_dataloader={**plain, "batch_size": 5}, train_cfg={"max_iters": 28}, custom_hooks=[Seen()], resume=True, **EVERY_7
    ).train()  # fmt: skip
    assert len(seen) == 44
    assert len(set(seen)) == 44


def test_changes_that_cannot_continue_are_refused(work):
    with pytest.raises(CheckpointError, match=r"SGD.*saved with AdamW"):
        start(work, resume=True, optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}}, train_cfg={"max_iters": 30})
    with pytest.raises(CheckpointError, match="training dataset changed"):
        start(
            work,
            resume=True,
            train_dataloader={"dataset": {"type": "NoisyPoints", "size": 45}},
            train_cfg={"max_iters": 30},
        )
    with pytest.raises(CheckpointError, match="does not fit this run.*resume=False, load_from="):
        start(work, resume=True, model={"hidden": 9}, train_cfg={"max_iters": 30})


def test_other_data_on_request(work):
    runner = start(
        work, resume=True, resume_data="restart", train_dataloader={"dataset": {"type": "NoisyPoints", "size": 80}},
        train_cfg={"max_iters": 22},
    )  # fmt: skip
    assert runner.progress.offset == 16
    assert runner.progress.iteration == 22


def test_a_switch_of_data_is_done_once(work, tmp_path, capfd):
    """The same command, started again after a stop, continues in the new data."""
    switched = {
        "resume": True, "resume_data": "restart", "train_dataloader": {"dataset": {"type": "NoisyPoints", "size": 80}},
        "param_scheduler": None,
    }  # fmt: skip
    uninterrupted = shutil.copytree(work, tmp_path / "uninterrupted")
    start(uninterrupted, train_cfg={"max_iters": 34}, **switched)
    start(work, train_cfg={"max_iters": 24}, **switched)
    printed(capfd)
    runner = start(work, train_cfg={"max_iters": 34}, **switched)
    assert "resume_data='restart' was already applied by the run that saved this checkpoint" in printed(capfd)
    assert (runner.progress.epoch, runner.progress.offset) == (4, 32)
    later = {step: loss for step, loss in logged(uninterrupted, "loss").items() if step > 20}
    assert {step: loss for step, loss in logged(work, "loss").items() if step > 20} == later
    more = {**switched, "train_dataloader": {"dataset": {"type": "NoisyPoints", "size": 81}}}
    assert start(work, train_cfg={"max_iters": 36}, **more).progress.offset == 16


@DATASETS.register_module()
class PointsInARow(IterableDataset):
    """Points that can only be iterated over, with a position."""

    def __init__(self):
        self.points, self.at = NoisyPoints(augment=False), 0

    def __iter__(self):
        while self.at < len(self.points):
            self.at += 1
            yield self.points[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_data_with_state_start_again_on_request(tmp_path):
    seen = []

    class Seen:
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            seen.append(data_batch["x"][0].tolist())

    rows = {"train_dataloader": {"dataset": {"type": "PointsInARow"}}, "custom_hooks": [Seen()]}
    start(tmp_path, train_cfg={"max_iters": 3}, **rows)
    start(tmp_path, train_cfg={"max_iters": 5}, resume=True, resume_data="restart", **rows)
    assert seen == [NoisyPoints(augment=False).x[at].tolist() for at in (0, 8, 16, 0, 8)]
    with pytest.raises(ConfigError, match=r"PointsInARow is iterable-style.*resume_data='restart'"):
        start(tmp_path, train_cfg={"max_iters": 6}, resume=True, resume_data={"skip_iters": 1}, **rows)
