"""One contract for all strategies: the same mathematics, exact resume, and a resume that moves to another strategy."""

import itertools
import json
from importlib.util import find_spec

import pytest
import strategy_parts
from exactness import assert_same, left_behind
from ranks import Group
from same_run import assert_same_run


def zero(stage, **options):
    return {"type": "DeepSpeedStrategy", "zero_optimization": {"stage": stage, **options}}


STRATEGIES = {
    "single": None,
    "ddp": {"type": "DDPStrategy"},
    "fsdp": {"type": "FSDPStrategy", "wrap": ["TinyBlock"]},
    **{f"zero{stage}": zero(stage) for stage in range(4)},
}
VARIANTS = {
    "ddp-unused": {"type": "DDPStrategy", "find_unused_parameters": True},
    "ddp-views": {"type": "DDPStrategy", "gradient_as_bucket_view": True, "broadcast_buffers": False},
    "fsdp-root": {"type": "FSDPStrategy"},
    "fsdp-small": {"type": "FSDPStrategy", "min_params": 100, "reshard_after_forward": False},
    "fsdp-recompute": {"type": "FSDPStrategy", "wrap": "TinyBlock", "activation_checkpointing": "TinyBlock"},
    "fsdp-hybrid": {"type": "FSDPStrategy", "mesh": {"replicate": 2, "shard": 1}},
    "zero1-aligned": zero(1, parameter_alignment=True),
    "zero2-offload": zero(2, offload_optimizer={"device": "cpu"}),
    "zero2-overlap": zero(2, overlap_comm=True),
    "zero3-offload": zero(3, offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}),
    "zero3-none-kept": zero(3, stage3_param_persistence_threshold=0),
    "zero3-sub-groups": zero(3, sub_group_size=100),
}
BF16 = {f"zero{stage}-bf16": {**zero(stage), "bf16": {"enabled": True}} for stage in range(4)}


def quick_first(quick, all_of_them):
    """The quick cases unmarked, the others as slow ones."""
    return [
        *quick,
        *(
            pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.slow)
            for case in all_of_them
            if case not in quick
        ),
    ]


@pytest.fixture(scope="module")
def train(pair):
    """Trains in one process or in the pair, as the strategy's name says."""

    def start(name, work_dir, **options):
        if name == "single":
            return strategy_parts.train(str(work_dir), world=1, **options)
        strategy = {**STRATEGIES, **VARIANTS, **BF16}[name]
        if strategy["type"] == "DeepSpeedStrategy" and find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is optional and not installed")
        results = pair.run("strategy_parts", "train", work_dir=str(work_dir), world=2, strategy=strategy, **options)
        assert results[0] == results[1], "the ranks ended with different weights"
        return results[0]

    return start


@pytest.fixture(scope="module")
def reference(train, tmp_path_factory):
    """One process, 100 iterations, 50 updates; the last batch of an epoch has 3 samples, or 1."""
    folder = tmp_path_factory.mktemp("reference")
    for size in (43, 41):
        train("single", folder / str(size), size=size)
    return folder


SIZES = [(name, size) for name in STRATEGIES if name != "single" for size in (43, 41)]
SIZES_QUICK = [("ddp", 43), ("ddp", 41), ("fsdp", 43), ("fsdp", 41), ("zero2", 43), ("zero3", 41)]


@pytest.mark.parametrize(("name", "size"), quick_first(SIZES_QUICK, SIZES))
def test_the_same_mathematics_as_one_process(train, reference, tmp_path, name, size):
    train(name, tmp_path, size=size)
    assert_same_run(tmp_path, reference / str(size))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_options_do_not_change_results(train, reference, tmp_path, name):
    train(name, tmp_path)
    assert_same_run(tmp_path, reference / "43")


@pytest.mark.slow
def test_a_static_graph_does_not_change_results(pair, train, tmp_path):
    train("single", tmp_path / "one", accumulation=1)
    static = {"type": "DDPStrategy", "static_graph": True}
    options = {"world": 2, "strategy": static, "accumulation": 1}
    pair.run("strategy_parts", "train", work_dir=str(tmp_path / "two"), **options)
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("name", quick_first(["ddp", "fsdp", "zero2", "zero3"], [*STRATEGIES, *BF16]))
def test_a_resume_is_exact(train, tmp_path, name):
    """Interrupted in a window after a checkpoint in the middle of an epoch, with dropout; all that is left is the same."""
    options = {"dropout": 0.2, "iterations": 40}
    train(name, tmp_path / "uninterrupted", **options)
    train(name, tmp_path / "broken", crash=["iteration", 23], **options)
    train(name, tmp_path / "broken", **options)
    assert_same(left_behind(tmp_path / "uninterrupted"), left_behind(tmp_path / "broken"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3"])
def test_a_resume_of_three_ranks_is_exact(tmp_path, name):
    """The rounding of a sum over three depends on its bucket, so no bucket may have moved."""
    group = Group(3)
    options = {"world": 3, "dropout": 0.2, "iterations": 40, "strategy": STRATEGIES[name]}
    try:
        for folder, crash in (("uninterrupted", None), ("broken", ["iteration", 23]), ("broken", None)):
            group.run("strategy_parts", "train", work_dir=str(tmp_path / folder), crash=crash, **options)
    finally:
        group.close()
    assert_same(left_behind(tmp_path / "uninterrupted"), left_behind(tmp_path / "broken"))


MOVES = [
    *itertools.permutations(["single", "ddp", "fsdp"], 2),
    ("zero2", "single"), ("zero2", "ddp"), ("zero2", "fsdp"), ("zero2", "zero3"), ("zero3", "zero1"),
    ("zero3", "single"), ("zero1", "zero2"), ("single", "zero2"), ("ddp", "zero3"), ("fsdp", "zero1"),
    ("zero0", "zero2"), ("zero3", "zero0"),
]  # fmt: skip
QUICK = [("single", "fsdp"), ("fsdp", "ddp"), ("ddp", "single"), ("zero2", "single"), ("ddp", "zero3")]


@pytest.mark.parametrize("move", QUICK, ids="-".join)
def test_a_resume_moves_to_another_strategy(train, reference, tmp_path, move):
    moved(train, reference, tmp_path, move)


@pytest.mark.slow
@pytest.mark.parametrize("move", [move for move in MOVES if move not in QUICK], ids="-".join)
def test_a_resume_moves_to_every_other_strategy(train, reference, tmp_path, move):
    moved(train, reference, tmp_path, move)


def moved(train, reference, folder, move):
    """Every logged loss is that of the unmoved run, so no sample was lost or repeated."""
    train(move[0], folder, crash=["iteration", 35])
    train(move[1], folder)
    assert_same_run(folder, reference / "43")
    second = sorted(folder.glob("*/vis_data/scalars.json"))[1]
    assert json.loads(second.read_text().splitlines()[0])["step"] == 29, "it did not go on behind iter_28"
