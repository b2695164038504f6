"""How a run counts, and a position counted at another batch size."""

from mmtrain.progress import Progress
from mmtrain.runner.geometry import BatchGeometry, geometry_lines, move_in_data, recount_line, rescale


def test_iter_1500_at_batch_128_is_iteration_3000_at_batch_64():
    at = Progress(epoch=3, offset=42 * 256, samples=1500 * 256, iteration=1500, epoch_iteration=42, update=1500)
    moved = rescale(at, BatchGeometry(256, 1, 486), BatchGeometry(128, 1, 972))
    assert (moved.iteration, moved.epoch_iteration) == (3 * 972 + 84, 84)
    assert moved.iteration == 3000
    assert (moved.epoch, moved.offset, moved.samples, moved.update) == (at.epoch, at.offset, at.samples, at.update)
    assert rescale(moved, BatchGeometry(128, 1, 972), BatchGeometry(256, 1, 486)) == at


def test_skipped_iterations_are_rescaled_too():
    at = Progress(offset=100, samples=100, iteration=10, epoch_iteration=10, skipped=4)
    assert rescale(at, BatchGeometry(10, 1, 50), BatchGeometry(5, 1, 100)).skipped == 8


def test_iterations_of_other_data_keep_their_share():
    """The epochs so far were longer than those of today's data, so they do not determine the iterations done."""
    at = Progress(epoch=5, offset=30, samples=50_030, iteration=5003, epoch_iteration=3)
    assert rescale(at, BatchGeometry(10, 1, 1000), BatchGeometry(5, 1, 40), same_data=False).iteration == 10006
    later = rescale(at, BatchGeometry(10, 1, 20), BatchGeometry(5, 1, 40))  # at the next restart: now epochs of 20
    assert (later.iteration, later.epoch_iteration) == (10006, 6)


def test_without_epochs_iterations_come_from_samples():
    at = Progress(samples=1000, iteration=100)
    assert rescale(at, BatchGeometry(10), BatchGeometry(20)).iteration == 50


def test_an_unchanged_batch_changes_nothing():
    at = Progress(1, 2, 3, 4, 5, 6, 7)
    assert rescale(at, BatchGeometry(8, 1, 5), BatchGeometry(8, 3, 5)) is at


def test_an_unchanged_effective_batch_is_reported():
    lines, warnings = geometry_lines(BatchGeometry(128, 1), BatchGeometry(64, 2), lr=0.1)
    assert not warnings
    assert "effective batch is still 128" in lines[0]
    assert "128 x accumulation 1 -> 64 x 2" in lines[0]


def test_a_changed_effective_batch_is_warned_about_with_both_rules():
    lines, warnings = geometry_lines(BatchGeometry(64, 1), BatchGeometry(256, 1), lr=0.1)
    assert not lines
    assert "64 to 256" in warnings[0]
    assert "linear rule would make it 0.4" in warnings[0]
    assert "square-root rule 0.2" in warnings[0]


def test_an_unchanged_scale_is_not_reported():
    assert geometry_lines(BatchGeometry(8, 2, 5), BatchGeometry(8, 2, 5), lr=0.1) == ([], [])


def test_switching_data():
    at = Progress(epoch=2, offset=40, samples=240, iteration=24, epoch_iteration=4)
    assert move_in_data(at, "continue", BatchGeometry(10, 1, 10)) is at
    restarted = move_in_data(at, "restart", BatchGeometry(10, 1, 10))
    assert (restarted.epoch, restarted.offset, restarted.iteration) == (2, 0, 24)
    skipped = move_in_data(at, {"skip_iters": 13}, BatchGeometry(10, 1, 10))
    assert (skipped.epoch, skipped.offset, skipped.epoch_iteration, skipped.iteration) == (3, 30, 3, 24)
    assert move_in_data(at, {"skip_iters": 0}, BatchGeometry(10, 1, 10)) == restarted


def test_iterations_are_converted_between_batch_sizes():
    old, new = BatchGeometry(256), BatchGeometry(128)
    assert recount_line(old, old, before=7, after=7) is None
    line = recount_line(old, new, before=2000, after=4000)
    assert line == "Iterations are now counted at global batch size 128: iteration 4000 corresponds to the old 2000."
