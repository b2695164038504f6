"""Ranks that take different branches of the model: found before they exchange what does not belong together."""

import re
from importlib.util import find_spec

import pytest
from commands import SOON, first_line, run, write_config


def fsdp(**options):
    return {"type": "FSDPStrategy", **options}


def zero(stage, **options):
    return {"type": "DeepSpeedStrategy", "zero_optimization": {"stage": stage, **options}}


WRAP = ["TinyBlock", "Expert"]
STRATEGIES = {
    "fsdp": fsdp(),
    "fsdp-wrapped": fsdp(wrap=WRAP),
    "fsdp-repeated": fsdp(wrap=WRAP, mesh={"replicate": 2, "shard": 1}),
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3),
    "zero3-none-kept": zero(3, stage3_param_persistence_threshold=0),
}
DDP = {"type": "DDPStrategy", "find_unused_parameters": True}
TOOK = "RunError: the ranks ran different branches of the model at update {}"


@pytest.fixture
def trained(pair, tmp_path):
    """How runs of two ranks end, which both must report alike."""

    def run(kind, strategy, folder="run", **options):
        if strategy["type"] == "DeepSpeedStrategy" and find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is optional and not installed")
        options |= {"kind": kind, "strategy": strategy}
        first, second = pair.run("branch_jobs", "trained", work_dir=str(tmp_path / folder), **options)
        assert first == second
        return first

    return run


GRADIENTS = {  # what is said of gradients of whole updates
    "expert": "experts.0.line.weight, experts.0.line.bias got gradients only on rank 0; experts.1.line.weight, "
    "experts.1.line.bias got gradients only on rank 1.",
    "head": "heads.0.weight, heads.0.bias got gradients only on rank 0; heads.1.weight, heads.1.bias got gradients only "
    "on rank 1.",
    "unused": "heads.1.weight, heads.1.bias got gradients only on rank 0.",
    "skip": "blocks.1.norm.weight, blocks.1.norm.bias, blocks.1.up.weight, blocks.1.up.bias and 2 more got gradients "
    "only on rank 0.",
    "no loss": "experts.1.line.weight, experts.1.line.bias got gradients only on rank 0.",
}
MODULES = {  # what is said of modules that are gathered
    "expert": "rank 0 entered experts.0, rank 1 entered experts.1.",
    "skip": "rank 0 entered blocks.1, rank 1 entered experts.0.",
    "order": "rank 0 entered experts.0, rank 1 entered experts.1.",
    "no loss": "rank 0 ended the forward, rank 1 entered experts.0.",
}
LAYERS = {
    "expert": "rank 0 entered experts.0.line, rank 1 entered experts.1.line.",
    "head": "rank 0 entered heads.0, rank 1 entered heads.1.",
    "unused": "rank 0 entered heads.1, rank 1 ended the forward.",
    "skip": "rank 0 entered blocks.1.norm, rank 1 entered experts.0.line.",
    "order": "rank 0 entered experts.0.line, rank 1 entered experts.1.line.",
    "no loss": "rank 0 entered head, rank 1 entered experts.0.line.",
}
BUCKETS = {  # which of a layer's gradients comes first is autograd's choice
    "expert": r"rank 0 got a gradient of experts\.0\.line\.\w+, rank 1 got a gradient of experts\.1\.line\.\w+\.",
    "head": r"rank 0 got a gradient of heads\.0\.\w+, rank 1 got a gradient of heads\.1\.\w+\.",
    "unused": r"rank 0 got a gradient of heads\.1\.\w+, rank 1 got a gradient of heads\.0\.\w+\.",
    "skip": r"rank 0 got a gradient of blocks\.1\.down\.\w+, rank 1 got a gradient of blocks\.0\.down\.\w+\.",
    "order": r"rank 0 got a gradient of experts\.1\.line\.\w+, rank 1 got a gradient of experts\.0\.line\.\w+\.",
    "no loss": r"rank 0 got a gradient of experts\.1\.line\.\w+, rank 1 got a gradient of experts\.0\.line\.\w+\.",
}
SAID = {
    "fsdp": GRADIENTS, "fsdp-wrapped": {**GRADIENTS, **MODULES},
    "fsdp-repeated": {"expert": GRADIENTS["expert"], "unused": "rank 0 had gradients of the model"},
    "zero1": GRADIENTS, "zero2": BUCKETS, "zero3": LAYERS, "zero3-none-kept": LAYERS,
}  # fmt: skip
CASES = [(name, kind) for name, kinds in SAID.items() for kind in kinds]
QUICK = [
    *(("fsdp", kind) for kind in GRADIENTS), ("fsdp-wrapped", "expert"), ("fsdp-wrapped", "no loss"),
    ("fsdp-repeated", "unused"), ("zero1", "head"), ("zero2", "order"), ("zero3", "unused"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES if case not in QUICK)],
)
@pytest.mark.parametrize("start", [0, 2])
def test_the_first_updates_stop_before_anything_wrong_is_exchanged(trained, name, kind, start):
    said, saved = trained(kind, STRATEGIES[name], start=start)
    assert said.startswith(TOOK.format(start + 1)), said
    assert re.search(SAID[name][kind], said), said
    assert "diff_rank_seed=False" in said
    assert saved == []


@pytest.mark.parametrize("name", ["fsdp-wrapped", "zero2"])
def test_a_branch_of_one_micro_batch_is_found(trained, name):
    said, _ = trained("expert", STRATEGIES[name], start=4, accumulation=3)
    assert said.startswith(TOOK.format(2)), said


LATER = [("fsdp", "expert"), ("fsdp", "head"), ("fsdp-wrapped", "order"), ("zero1", "expert"), ("zero2", "order")]


@pytest.mark.parametrize(("name", "kind"), LATER)
def test_later_nothing_wrong_is_saved(trained, name, kind):
    """Sizes fit, so the exchange itself does not fail; the parameters and the update are named all the same."""
    said, saved = trained(kind, STRATEGIES[name], start=20, iterations=40, saves=14)
    assert said.startswith(TOOK.format(21)), said
    names = ("experts.0", "experts.1") if kind != "head" else ("heads.0.weight", "heads.1.weight")
    assert all(words in said for words in names), said
    assert saved == ["iter_14.pth"]


@pytest.mark.parametrize("name", ["fsdp", pytest.param("zero1", marks=pytest.mark.slow)])
def test_later_it_is_found_without_a_save(trained, name):
    said, saved = trained("head", STRATEGIES[name], start=20, iterations=100)
    assert said.startswith(TOOK.format(21)), said
    assert saved == []


@pytest.mark.parametrize("name", ["fsdp", "zero2"])
def test_branches_that_all_ranks_take_are_no_difference(trained, name):
    for kind in ("skip", "expert", "order", "unused"):
        said, saved = trained(kind, STRATEGIES[name], folder=kind, start=3, alike=True, iterations=12)
        assert said.startswith("loss "), said
        assert saved == ["iter_12.pth"]


def test_a_choice_that_is_drawn_alike_trains(trained):
    said, _ = trained("drawn", STRATEGIES["fsdp-wrapped"], iterations=20, randomness={"diff_rank_seed": False})
    assert said.startswith("loss ")
    said, _ = trained("drawn", STRATEGIES["fsdp-wrapped"], folder="apart", iterations=20)
    assert said.startswith("RunError: the ranks ran different branches of the model at update "), said
    assert trained("drawn", DDP, folder="ddp", iterations=20)[0].startswith("loss ")


@pytest.mark.parametrize("kind", ["expert", "skip"])
def test_what_is_advised_is_the_mathematics_of_the_mean(trained, kind):
    """Stage 0 exchanges zeros for what a rank has not used, as DDP does with find_unused_parameters."""
    assert trained(kind, DDP, folder="ddp") == trained(kind, zero(0), folder="zero")


def test_the_command_says_it_once(tmp_path):
    model = {"type": "Branching", "kind": "unused"}
    imports = {"imports": ["branch_jobs"]}
    path = write_config(tmp_path, "run", model=model, strategy=fsdp(), custom_imports=imports)
    statuses, errors, seconds = run(path)
    assert statuses == [1, 1]
    assert first_line(errors[0]).startswith("error: the ranks ran different branches of the model at update 1 of")
    assert "heads.1.weight" in errors[0]
    assert first_line(errors[1]) == ""
    assert seconds < SOON
