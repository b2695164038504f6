"""The position and its arithmetic."""

import pytest

from mmtrain.progress import Progress, iterations_per_epoch, window_length


def test_an_epoch_is_counted_and_the_next_begins_at_zero():
    progress = Progress()
    for batch in range(3):
        progress.advance(4, epoch_end=batch == 2)
    assert (progress.epoch, progress.offset, progress.samples, progress.iteration) == (1, 0, 12, 3)
    progress.advance(4, epoch_end=False)
    assert (progress.offset, progress.epoch_iteration, progress.iteration) == (4, 1, 4)


def test_skipped_updates_are_left_out_of_the_schedule():
    progress = Progress(iteration=6)
    progress.count_update(iterations=2, applied=False)
    progress.count_update(iterations=2, applied=True)
    assert (progress.update, progress.skipped, progress.scheduled) == (1, 2, 4)


def test_the_state_is_restored():
    progress = Progress(1, 2, 3, 4, 5, 6, 7)
    other = Progress()
    other.load_state_dict(progress.state_dict())
    assert other == progress


@pytest.mark.parametrize(
    ("samples", "batch", "drop_last", "expected"),
    [(10, 4, True, 2), (10, 4, False, 3), (8, 4, True, 2), (8, 4, False, 2), (100_000, 128, True, 781)],
)
def test_iterations_of_an_epoch(samples, batch, drop_last, expected):
    assert iterations_per_epoch(samples, batch, drop_last=drop_last) == expected


def test_the_last_window_is_shorter():
    assert window_length(0, 4, remaining=10) == 4
    assert window_length(8, 4, remaining=2) == 2
    assert window_length(8, 4, remaining=None) == 4
    with pytest.raises(ValueError, match="no iteration is left"):
        window_length(10, 4, remaining=0)
