"""Modules with a state of their own under every strategy: a resume is exact."""

from importlib.util import find_spec

import pytest
from exactness import assert_same, left_behind

STRATEGIES = {
    "ddp": {"type": "DDPStrategy"},
    "fsdp": {"type": "FSDPStrategy", "wrap": ["TinyBlock"]},
    **{f"zero{stage}": {"type": "DeepSpeedStrategy", "zero_optimization": {"stage": stage}} for stage in (0, 2, 3)},
}


QUICK = ("ddp", "fsdp", "zero3")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES]
)
def test_a_resume_is_exact(pair, tmp_path, name):
    if name.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is optional and not installed")
    results = []
    for folder, crash in (("whole", None), ("broken", ["iteration", 23]), ("broken", None)):
        work_dir = str(tmp_path / folder)
        results += pair.run("model_state_jobs", "train", work_dir=work_dir, crash=crash, strategy=STRATEGIES[name])
    assert results[:2] == results[4:]
    assert results[0] != results[1], "the ranks hold the same, so this shows nothing about what each has of its own"
    assert_same(left_behind(tmp_path / "whole"), left_behind(tmp_path / "broken"))
