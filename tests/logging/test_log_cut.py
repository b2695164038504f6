import json

import pytest

from mmtrain.logging import cut_events, cut_json_lines, cut_logs


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


def test_json_lines_past_the_step_and_a_torn_tail_go(tmp_path):
    path = tmp_path / "scalars.json"
    write_lines(path, [1, 2, 3, 4], tail=b'{"step": 2, "lo')
    assert cut_json_lines(path, 2) == 3
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["scalars.json"]


def test_lines_of_others_stay(tmp_path):
    path = tmp_path / "scalars.json"
    path.write_bytes(b'plain text\n[1, 2]\n{"loss": 1}\n{"step": "x"}\n{"step": 9}\n')
    assert cut_json_lines(path, 3) == 1
    assert path.read_bytes().count(b"\n") == 4


def test_a_file_that_needs_no_cut_is_left_alone(tmp_path):
    path = tmp_path / "scalars.json"
    write_lines(path, [1, 2])
    before = path.stat()
    assert cut_json_lines(path, 2) == 0
    assert path.stat().st_ino == before.st_ino
    assert cut_json_lines(tmp_path / "absent.json", 2) == 0


@pytest.mark.parametrize("last", [0, 3, 300])
def test_tensorboard_events_past_the_step_go(tmp_path, last):
    steps = [0, 1, 3, 127, 128, 300, 100_000]
    path = write_events(tmp_path, steps)
    kept = [step for step in steps if step <= last]
    assert cut_events(path, last) == len(steps) - len(kept)
    assert steps_of_events(path) == kept


def test_a_torn_event_goes(tmp_path):
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
    dropped = cut_logs([first, second, tmp_path / "absent"], 1)
    assert dropped == {first / "vis_data" / "scalars.json": 2, events: 2}
