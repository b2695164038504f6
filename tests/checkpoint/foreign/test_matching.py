import pytest
import torch
from torch import nn

from mmtrain.checkpoint import copy_matched, describe, match
from mmtrain.checkpoint.foreign.matching import revise
from mmtrain.errors import CheckpointError


def test_report():
    report = match(
        {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1), "h": torch.ones(1).half()},
        {"a": torch.zeros(2), "b": torch.zeros(4), "d": torch.zeros(1), "h": torch.zeros(1)},
    )
    assert (report.matched, report.missing, report.unexpected, report.cast) == (["a", "h"], ["d"], ["c"], ["h"])
    assert describe(report) == [
        "2 matched",
        "1 missing (they keep their initial values): d",
        "1 unexpected (not used): c",
        "1 wrong shape: b (there [3], here [4])",
        "1 converted to another type: h",
    ]


def test_matching_tensors_are_copied_in_place():
    model = nn.Linear(2, 2)
    report = copy_matched({"weight": torch.eye(2, dtype=torch.float64)}, dict(model.named_parameters()))
    assert report.missing == ["bias"]
    assert torch.equal(model.weight, torch.eye(2))


def test_no_match_or_a_wrong_shape_is_refused_before_anything_changes():
    target = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"x\.pth: no name matches; 0 matched; 2 missing"):
        copy_matched({"module.a": torch.ones(2)}, target, source="x.pth")
    with pytest.raises(CheckpointError, match=r"a shape is wrong.*b \(there \[3\], here \[2\]\)"):
        copy_matched({"a": torch.ones(2), "b": torch.ones(3)}, target)
    assert not target["a"].any()
    copy_matched({"a": torch.ones(2), "b": torch.ones(3)}, target, allow_mismatch=True)
    assert target["a"].all()


def test_revise_keys():
    assert revise(["module.a", "b"], [(r"^module\.", ""), ("^", "net.")]) == {"module.a": "net.a", "b": "net.b"}
    with pytest.raises(CheckpointError, match=r"both 'module\.a' and 'a' become 'a'"):
        revise(["module.a", "a"], [(r"^module\.", "")])
    with pytest.raises(CheckpointError, match="not a valid pattern"):
        revise(["a"], [("(", "")])
