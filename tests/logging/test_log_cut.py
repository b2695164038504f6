import json

import pytest

from mmtrain.logging import LogPosition, cut_events, cut_json_lines, cut_logs, note_start


def write_lines(path, steps, *, tail=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(json.dumps({"mode": "train", "step": s}).encode() + b"\n" for s in steps) + tail)


def write_events(folder, steps):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))
    for step in steps:
        writer.add_scalar("loss", 1.0 / (step + 1), step)
    writer.close()
    (path,) = folder.glob("events.out.tfevents.*")
    return path


def steps_of_events(path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return [event.step for event in EventFileLoader(str(path)).Load() if event.HasField("summary")]


def test_json_lines_past_the_step_and_an_incomplete_end_are_removed(tmp_path):
    path = tmp_path / "scalars.json"
    write_lines(path, [1, 2, 3, 4], tail=b'{"step": 2, "lo')
    assert cut_json_lines(path, 2) == 3
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["scalars.json"]


def test_lines_of_other_runs_are_kept(tmp_path):
    path = tmp_path / "scalars.json"
    path.write_bytes(b'plain text\n[1, 2]\n{"loss": 1}\n{"step": "x"}\n{"step": 9}\n')
    assert cut_json_lines(path, 3) == 1
    assert path.read_bytes().count(b"\n") == 4


def test_a_file_that_needs_no_cut_is_not_changed(tmp_path):
    path = tmp_path / "scalars.json"
    write_lines(path, [1, 2])
    before = path.stat()
    assert cut_json_lines(path, 2) == 0
    assert path.stat().st_ino == before.st_ino
    assert cut_json_lines(tmp_path / "absent.json", 2) == 0


@pytest.mark.parametrize("last", [0, 3, 300])
def test_tensorboard_events_past_the_step_are_removed(tmp_path, last):
    steps = [0, 1, 3, 127, 128, 300, 100_000]
    path = write_events(tmp_path, steps)
    kept = [step for step in steps if step <= last]
    assert cut_events(path, last) == len(steps) - len(kept)
    assert steps_of_events(path) == kept


def test_an_incomplete_event_is_removed(tmp_path):
    path = write_events(tmp_path, [1, 2])
    path.write_bytes(path.read_bytes()[:-3])
    assert cut_events(path, 10) == 1
    assert steps_of_events(path) == [1]


def test_cut_logs_visits_every_run(tmp_path):
    first, second = tmp_path / "20260101_000000", tmp_path / "20260102_000000"
    write_lines(first / "vis_data" / "scalars.json", [1, 2, 3])
    write_lines(second / "vis_data" / "scalars.json", [1])
    events = write_events(second / "vis_data", [1, 2, 3])
    (first / "vis_data" / "other.json").write_text("kept")
    dropped = cut_logs([first, second, tmp_path / "absent"], LogPosition(iteration=1, samples=8, global_batch=8))
    assert dropped == {first / "vis_data" / "scalars.json": 2, events: 2}


def log_of(folder, steps, *, start=None):
    """Both kinds of files of one start, with the note of where it began."""
    write_lines(folder / "vis_data" / "scalars.json", steps)
    write_events(folder / "vis_data", steps)
    if start is not None:
        note_start(folder, start)
    return folder


def steps_of(folder):
    (events,) = (folder / "vis_data").glob("events.out.tfevents.*")
    lines = [json.loads(line)["step"] for line in (folder / "vis_data" / "scalars.json").read_text().splitlines()]
    assert steps_of_events(events) == lines
    assert b"brain.Event" in events.read_bytes()[:100]  # the header stays
    return lines


# Three starts over 44 samples, six iterations per epoch at 8 and three at 16; the third was killed before it saved.
AT_8 = LogPosition(iteration=0, samples=0, global_batch=8, mean_batch=44 / 6)
AT_16 = LogPosition(iteration=10, samples=148, global_batch=16, mean_batch=44 / 3)
BACK_AT_8 = LogPosition(iteration=26, samples=192, global_batch=8, mean_batch=44 / 6)


@pytest.mark.parametrize(
    ("resumed", "kept"),
    [
        (LogPosition(13, 192, 16), (20, 3, 0)),  # fewer iterations than the first start did, but more samples
        (LogPosition(12, 176, 16), (20, 2, 0)),
        (LogPosition(26, 192, 8), (20, 3, 0)),
        (LogPosition(28, 208, 8), (20, 3, 2)),
        (LogPosition(20, 148, 8), (20, 0, 0)),  # the larger batch is given up
        (LogPosition(14, 104, 8), (14, 0, 0)),
        (LogPosition(0, 0, 8), (0, 0, 0)),
    ],
)
def test_a_start_with_another_batch_size_is_cut_by_samples(tmp_path, resumed, kept):
    first = log_of(tmp_path / "1", range(1, 21), start=AT_8)
    second = log_of(tmp_path / "2", [11, 12, 13], start=AT_16)
    third = log_of(tmp_path / "3", [27, 28, 29], start=BACK_AT_8)
    cut_logs([first, second, third], resumed)
    assert steps_of(first) == list(range(1, 21))[: kept[0]]
    assert steps_of(second) == [11, 12, 13][: kept[1]]
    assert steps_of(third) == [27, 28, 29][: kept[2]]


def test_lines_of_another_batch_size_before_the_position_are_kept(tmp_path):
    first = log_of(tmp_path / "1", [1, 2, 3], start=AT_16._replace(iteration=0, samples=0))
    second = log_of(tmp_path / "2", [7, 8], start=AT_8._replace(iteration=6, samples=44))
    third = log_of(tmp_path / "3", [2], start=AT_16._replace(iteration=1, samples=60))
    cut_logs([first, second, third], LogPosition(2, 76, 16))
    assert (steps_of(first), steps_of(second), steps_of(third)) == ([1, 2, 3], [7, 8], [2])


def test_logs_of_epochs_of_unknown_length_keep_everything_before_the_position(tmp_path):
    log = log_of(tmp_path / "1", [1, 2, 3, 4], start=LogPosition(0, 0, global_batch=8))
    later = log_of(tmp_path / "2", [2, 3], start=LogPosition(1, 32, global_batch=32))
    cut_logs([log, later], LogPosition(2, 20, 16))
    assert (steps_of(log), steps_of(later)) == ([1, 2, 3, 4], [])
    cut_logs([log], LogPosition(0, 0, 16))  # it never saved, and is started again
    assert steps_of(log) == []


@pytest.mark.parametrize("note", [None, b"", b"[1]", b'{"iteration": 1', b'{"step": 2}'])
def test_logs_without_a_readable_note_are_cut_by_iteration(tmp_path, note):
    log = log_of(tmp_path / "1", [1, 2, 3, 4])
    if note is not None:
        note_start(log, AT_8)
        (log / "vis_data" / "start_position").write_bytes(note)
    cut_logs([log], LogPosition(2, 30, 16))
    assert steps_of(log) == [1, 2]
