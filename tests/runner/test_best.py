"""The best value of each metric, and the checkpoint that has it."""

import logging

import pytest

from mmtrain.errors import ConfigError, RunError
from mmtrain.runner.best import BestRecords

LOG = logging.getLogger("test_best")


def records(metric="loss", rule="less"):
    best = BestRecords([metric], [rule])
    best.check_metrics([metric])
    best.forget_other_rules(LOG)
    return best


@pytest.mark.parametrize(("rule", "values", "improved"), [
    ("less", [3.0, 2.0, 2.0, 5.0, 1.0], [True, True, False, False, True]),
    ("greater", [3.0, 2.0, 3.5, 3.5], [True, False, True, False]),
    ("less", [float("nan"), 4.0, float("-inf"), 3.0], [False, True, False, True]),
])  # fmt: skip
def test_only_finite_improvements_count(rule, values, improved):
    best = records(rule=rule)
    assert [best.observe({"loss": value}, iteration=5) == ["loss"] for value in values] == improved


def test_a_record_is_saved_once_its_checkpoint_is_complete():
    best = records()
    best.observe({"loss": 1.0}, iteration=5)
    assert best.checkpoints == set()
    best.assign("iter_5.pth")
    assert best.checkpoints == {"iter_5.pth"}
    assert best.saved == {}
    assert not best.confirm("iter_4.pth")
    assert best.confirm("iter_5.pth")
    assert best.saved == {"loss": {"value": 1.0, "checkpoint": "iter_5.pth", "iteration": 5}}


def test_after_a_failed_save_of_the_best_the_previous_one_is_the_best():
    best = records()
    best.observe({"loss": 2.0}, iteration=5)
    best.assign("iter_5.pth")
    best.confirm("iter_5.pth")
    best.observe({"loss": 1.0}, iteration=10)
    best.assign("iter_10.pth")
    best.drop_failed({"iter_10.pth"})
    assert best.records["loss"]["value"] == 2.0
    assert best.observe({"loss": 1.5}, iteration=15) == ["loss"]


def test_the_first_best_is_dropped_if_its_save_failed():
    best = records()
    best.observe({"loss": 2.0}, iteration=5)
    best.assign("iter_5.pth")
    best.drop_failed({"iter_5.pth"})
    assert best.observe({"loss": 9.0}, iteration=10) == ["loss"]


def test_the_state_continues_the_search():
    best = records()
    best.observe({"loss": 2.0}, iteration=5)
    best.assign("iter_5.pth")
    resumed = BestRecords(["loss"], ["less"])
    resumed.load_state_dict(best.state_dict())
    resumed.check_metrics(["loss"])
    assert not resumed.forget_other_rules(LOG)
    assert resumed.observe({"loss": 3.0}, iteration=10) == []
    resumed.restore_saved(["iter_5.pth"])
    assert resumed.saved["loss"]["checkpoint"] == "iter_5.pth"


def test_a_record_found_by_another_rule_is_dropped(caplog):
    best = records()
    best.observe({"loss": 2.0}, iteration=5)
    other = BestRecords(["loss"], ["greater"])
    other.load_state_dict(best.state_dict())
    other.check_metrics(["loss"])
    assert other.forget_other_rules(LOG)
    assert "found with rule='less'; with rule='greater' the search starts over" in caplog.text
    assert other.observe({"loss": 1.0}, iteration=10) == ["loss"]


@pytest.mark.parametrize("keys", [("score",), ["score"]])
def test_rules_are_inferred_from_keys(keys):
    best = BestRecords(["score"], greater_keys=keys)
    best.check_metrics(["score"])
    best.observe({"score": 1.0}, iteration=1)
    assert best.observe({"score": 2.0}, iteration=2) == ["score"]
    with pytest.raises(ConfigError, match="cannot infer whether a greater or a smaller 's' is better"):
        BestRecords(["s"], greater_keys=keys).check_metrics(["s"])


def test_a_metric_that_validation_does_not_report():
    with pytest.raises(
        ConfigError, match="save_best is 'mIoU', which validation does not report; it reports acc, loss"
    ):
        BestRecords(["mIoU"], ["greater"]).check_metrics(["loss", "acc"])


def test_a_metric_that_goes_missing_is_a_failed_run():
    best = records("mIoU", "greater")
    with pytest.raises(RunError, match=r"did not report 'mIoU'; it reported \['loss'\]"):
        best.observe({"loss": 1.0}, iteration=1)


def test_one_rule_serves_all_metrics_and_auto_is_the_first():
    best = BestRecords(["a", "b"], ["less"])
    best.check_metrics(["a", "b"])
    assert best.observe({"a": 1.0, "b": 1.0}, iteration=1) == ["a", "b"]
    assert best.observe({"a": 0.5, "b": 2.0}, iteration=2) == ["a"]
    auto = BestRecords(["auto"])
    auto.check_metrics(["loss", "acc"])
    assert auto.metrics == ["loss"]
