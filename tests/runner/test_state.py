"""The named table of what is saved, and names that checkpoints of earlier versions have."""

import pytest
from parts import make_runner

from mmtrain.errors import CheckpointError
from mmtrain.runner.state import capture_small_state, restore_small_state

BEST = {
    "default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 10, "save_best": "loss"}},
    "custom_hooks": [{"type": "Counter"}],
}


@pytest.fixture
def trained(tmp_path):
    runner = make_runner(tmp_path / "trained", **BEST)
    runner.train()
    return runner


@pytest.fixture
def fresh(tmp_path):
    runner = make_runner(tmp_path / "fresh", **BEST)
    yield runner
    runner.release()


def test_what_was_captured_is_restored(trained, fresh):
    state = capture_small_state(trained, trained.checkpointer.best)
    assert next(iter(state)) == "progress"
    report = restore_small_state(fresh, fresh.checkpointer.best, state)
    assert report.absent == report.unused == []
    assert set(report.restored) == set(state)
    assert fresh.progress == trained.progress
    assert fresh.checkpointer.best.records == trained.checkpointer.best.records
    assert fresh.checkpointer.best.records["loss"]["checkpoint"] in ("iter_10.pth", "iter_20.pth")
    assert fresh.hooks.named["Counter"].calls == 20


def test_best_records_in_the_former_state_of_the_hook_are_read(trained, fresh):
    state = capture_small_state(trained, trained.checkpointer.best)
    state["hooks.checkpoint"] = state.pop("best")
    report = restore_small_state(fresh, fresh.checkpointer.best, state)
    assert fresh.checkpointer.best.records == trained.checkpointer.best.records
    assert "best" in report.restored
    assert report.unused == report.absent == []


def test_a_scalar_log_state_without_readers_is_given_to_every_reader(trained, fresh):
    """As written by versions with one reader for all."""
    state = capture_small_state(trained, trained.checkpointer.best)
    state["log"] = {"ranks": [{"values": {"loss": [1.0, 3.0]}, "folded": {}}]}
    restore_small_state(fresh, fresh.checkpointer.best, state)
    assert fresh.scalars.reader("logger").read() == {"loss": 2.0}


def test_state_of_added_and_removed_hooks_is_reported(trained, tmp_path):
    state = capture_small_state(trained, trained.checkpointer.best)
    other = make_runner(tmp_path / "other", custom_hooks=[{"type": "EMAHook"}])
    report = restore_small_state(other, other.checkpointer.best, state)
    other.release()
    assert "hooks.EMAHook" in report.absent
    assert "hooks.Counter" in report.unused
    assert "not used by this run: best, hooks.Counter" in report.lines()


def test_a_state_without_a_position_is_refused(fresh):
    with pytest.raises(CheckpointError, match="has no 'progress'"):
        restore_small_state(fresh, fresh.checkpointer.best, {"log": {}})
