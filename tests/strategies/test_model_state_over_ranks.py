"""Modules with a state of their own under every strategy: a resume is exact."""

from importlib.util import find_spec

import pytest
from exactness import assert_same, left_behind

STRATEGIES = {
    "ddp": {"type": "DDPStrategy"},
    "fsdp": {"type": "FSDPStrategy", "wrap": ["TinyBlock"]},
    **{f"zero{stage}": {"type": "DeepSpeedStrategy", "zero_optimization": {"stage": stage}} for stage in (0, 2, 3)},
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_resume_is_exact(pair, tmp_path, name):
    if name.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is optional and not installed")
    results = []
    for folder, crash in (("whole", None), ("broken", ["iteration", 23]), ("broken", None)):
        work_dir = str(tmp_path / folder)
        results += pair.run("model_state_jobs", "train", work_dir=work_dir, crash=crash, strategy=STRATEGIES[name])
    assert results[0] == results[1] == results[4] == results[5]
    assert_same(left_behind(tmp_path / "whole"), left_behind(tmp_path / "broken"))
