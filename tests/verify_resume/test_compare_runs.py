"""What two runs left behind is compared, and the likely causes of a difference are named."""

import json

import pytest

from mmtrain.checkpoint.compare import ComparedGroup, Difference
from mmtrain.errors import RunError
from mmtrain.verify_resume.compare import RunComparison, compare_logs, likely_causes, read_logs
from mmtrain.verify_resume.runs import FinishedRun


# ---- logs
def log(folder, name, *records):
    path = folder / name / "vis_data" / "scalars.json"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def line(step, mode="train", **values):
    return {"mode": mode, "step": step, "iter": step, **values}


def test_logs_are_compared_in_the_order_of_iterations(tmp_path):
    undisturbed = [
        line(1, lr=0.1, loss=1.0, time=3.0),
        line(2, lr=0.1, loss=0.5),
        line(2, "val", loss=0.25),
        line(3, loss=0.1),
    ]
    log(tmp_path / "a", "1", *undisturbed, line(3, "save", save_time=1.0))
    log(tmp_path / "b", "1", line(1, lr=0.1, loss=1.0, time=4.0))
    log(tmp_path / "b", "2", line(2, lr=0.2, loss=0.5), line(2, "val", loss=0.5), line(3))
    groups, first, iteration = compare_logs(read_logs(tmp_path / "a"), read_logs(tmp_path / "b"), [])
    assert {group.name: (group.compared, len(group.differences)) for group in groups} == {
        "loss": (3, 1), "lr": (2, 1), "val loss": (1, 1),
    }  # fmt: skip
    assert (str(first), iteration) == ("lr at iteration 2: 0.1 != 0.2", 2)
    assert str(groups[0].differences[0]) == "loss at iteration 3: only in the undisturbed run"
    _, first, _ = compare_logs(read_logs(tmp_path / "a"), read_logs(tmp_path / "b"), ["l?"])
    assert str(first) == "val loss at iteration 2: 0.25 != 0.5"


def test_an_iteration_that_is_logged_twice(tmp_path):
    log(tmp_path, "1", line(1), line(2))
    log(tmp_path, "2", line(2))
    with pytest.raises(RunError, match="the train line of iteration 2 was logged twice"):
        read_logs(tmp_path)


# ---- causes
def causes(*names, iteration=None, reproducible=True, **facts):
    groups = [ComparedGroup(name, 1, [Difference(name, "differs")]) for name in names]
    killed = FinishedRun("", 0.0, [{"iteration": 0}, {"iteration": 10}])
    facts = {"device": "cpu", "deterministic": False, **facts}
    return " ".join(likely_causes(RunComparison(groups, None, iteration), killed, facts, reproducible=reproducible))


def test_causes():
    assert "no seed controls" in causes("loss", "model tensors", reproducible=False)
    assert "deterministic=True" not in causes("loss", reproducible=False)
    assert causes("loss", reproducible=False, device="cuda").startswith("GPU kernels")
    assert "deterministic=True" in causes("loss", "model tensors", device="cuda")
    assert "GPU" not in causes("loss", "model tensors", device="cuda", deterministic=True)
    assert causes("state hooks.Speed").startswith("the load_state_dict of hook Speed does not restore everything")
    assert "dataset" not in causes("smooth", "state hooks.Counter")
    assert "save_optimizer=False" in causes("loss", "model tensors", iteration=12)
    assert "save_optimizer=False" not in causes("loss", "model tensors", iteration=11)
    assert "randomness.positional" in causes("loss", "model tensors", positional=False)
