"""One contract for all strategies: the same mathematics, exact resume, and a resume that moves to another strategy."""

import itertools
import json

import pytest
import strategy_parts
from exactness import assert_same, left_behind
from parts import logged
from ranks import Group

from mmtrain.checkpoint import CheckpointStore

STRATEGIES = {
    "single": None,
    "ddp": {"type": "DDPStrategy"},
    "fsdp": {"type": "FSDPStrategy", "wrap": ["TinyBlock"]},
}
VARIANTS = {
    "ddp-unused": {"type": "DDPStrategy", "find_unused_parameters": True},
    "ddp-views": {"type": "DDPStrategy", "gradient_as_bucket_view": True, "broadcast_buffers": False},
    "fsdp-root": {"type": "FSDPStrategy"},
    "fsdp-small": {"type": "FSDPStrategy", "min_params": 100, "reshard_after_forward": False},
    "fsdp-recompute": {"type": "FSDPStrategy", "wrap": "TinyBlock", "activation_checkpointing": "TinyBlock"},
    "fsdp-hybrid": {"type": "FSDPStrategy", "mesh": {"replicate": 2, "shard": 1}},
}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def train(pair):
    """Trains in one process or in the pair, as the strategy's name says."""

    def start(name, work_dir, **options):
        if name == "single":
            return strategy_parts.train(str(work_dir), world=1, **options)
        strategy = {**STRATEGIES, **VARIANTS}[name]
        results = pair.run("strategy_parts", "train", work_dir=str(work_dir), world=2, strategy=strategy, **options)
        assert results[0] == results[1], "the ranks ended with different weights"
        return results[0]

    return start


@pytest.fixture(scope="module")
def reference(train, tmp_path_factory):
    """One process, 100 iterations, 50 updates; the last batch of a pass has 3 samples, or 1."""
    folder = tmp_path_factory.mktemp("reference")
    for size in (43, 41):
        train("single", folder / str(size), size=size)
    return folder


def assert_close(found, expected, *, tolerance=TOLERANCE):
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=tolerance, abs=1e-7), f"step {step}"


def assert_same_run(folder, expected, *, tolerance=TOLERANCE):
    """Losses, norms and rates of every iteration, metrics of every validation, and the last weights and averages."""
    names = ("loss", "accuracy", "lr")
    assert_close(logged(folder, *names), logged(expected, *names), tolerance=tolerance)
    norms = [{k: v for k, v in logged(f, "grad_norm").items() if v[0] is not None} for f in (folder, expected)]
    assert_close(*norms, tolerance=10 * tolerance)
    assert_close(
        logged(folder, "loss", "accuracy", mode="val"), logged(expected, "loss", "accuracy", mode="val"),
        tolerance=tolerance,
    )  # fmt: skip
    last, other = (CheckpointStore(path).newest_good()[0] for path in (folder, expected))
    assert last.name == other.name
    for section in ("model", "optimizer"):
        assert sorted(last.tensor_names(section)) == sorted(other.tensor_names(section))
        for name in last.tensor_names(section):
            a, b = last.read(section, name).double(), other.read(section, name).double()
            assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-9, f"{section}/{name}"
    averages = [checkpoint.state()["hooks.EMAHook"]["averages"] for checkpoint in (last, other)]
    assert averages[0].keys() == averages[1].keys()
    assert all((averages[0][name] - averages[1][name]).abs().max() < 1e-5 for name in averages[0])


@pytest.mark.parametrize("size", [43, 41])
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_the_same_mathematics_as_one_process(train, reference, tmp_path, name, size):
    train(name, tmp_path, size=size)
    assert_same_run(tmp_path, reference / str(size))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_options_move_no_number(train, reference, tmp_path, name):
    train(name, tmp_path)
    assert_same_run(tmp_path, reference / "43")


@pytest.mark.slow
def test_a_static_graph_moves_no_number(pair, train, tmp_path):
    train("single", tmp_path / "one", accumulation=1)
    static = {"type": "DDPStrategy", "static_graph": True}
    options = {"world": 2, "strategy": static, "accumulation": 1}
    pair.run("strategy_parts", "train", work_dir=str(tmp_path / "two"), **options)
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_resume_is_exact(train, tmp_path, name):
    """Interrupted in a window after a checkpoint in mid-epoch, with dropout; everything that is left is the same."""
    options = {"dropout": 0.2, "iterations": 40}
    train(name, tmp_path / "whole", **options)
    train(name, tmp_path / "broken", crash=["iteration", 23], **options)
    train(name, tmp_path / "broken", **options)
    assert_same(left_behind(tmp_path / "whole"), left_behind(tmp_path / "broken"))


@pytest.mark.slow
def test_a_resume_of_three_ranks_is_exact(tmp_path):
    """Sums over three are rounded by where they are made: no bucket may have moved."""
    group = Group(3)
    options = {"world": 3, "dropout": 0.2, "iterations": 40}
    try:
        for folder, crash in (("whole", None), ("broken", ["iteration", 23]), ("broken", None)):
            group.run("strategy_parts", "train", work_dir=str(tmp_path / folder), crash=crash, **options)
    finally:
        group.close()
    assert_same(left_behind(tmp_path / "whole"), left_behind(tmp_path / "broken"))


MOVES = list(itertools.permutations(STRATEGIES, 2))
QUICK = [("single", "fsdp"), ("fsdp", "ddp"), ("ddp", "single")]


@pytest.mark.parametrize("move", QUICK, ids="-".join)
def test_a_resume_moves_to_another_strategy(train, reference, tmp_path, move):
    moved(train, reference, tmp_path, move)


@pytest.mark.slow
@pytest.mark.parametrize("move", [move for move in MOVES if move not in QUICK], ids="-".join)
def test_a_resume_moves_to_every_other_strategy(train, reference, tmp_path, move):
    moved(train, reference, tmp_path, move)


def moved(train, reference, folder, move):
    """Every logged loss is that of the unmoved run: no sample is lost or repeated, or it would be another."""
    train(move[0], folder, crash=["iteration", 35])
    train(move[1], folder)
    assert_same_run(folder, reference / "43")
    second = sorted(folder.glob("*/vis_data/scalars.json"))[1]
    assert json.loads(second.read_text().splitlines()[0])["step"] == 29, "it did not go on behind iter_28"
