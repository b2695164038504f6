import json
import math
import random
import warnings
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import EarlyStoppingHook as Theirs
from parts import make_runner as make_run

from mmtrain.errors import ConfigError, RunError
from mmtrain.evaluation.metric_rule import infer_rule
from mmtrain.hooks import EarlyStoppingHook


def validate(hook, runner, values, name="loss"):
    """The number of the validation that asked for a stop, from 1."""
    for number, value in enumerate(values, 1):
        hook.after_val_epoch(runner, metrics={name: value})
        if runner.stops:
            return number
    return None


@pytest.mark.parametrize("seed", range(60))
def test_it_stops_where_mmengine_stops(make_runner, seed):
    source = random.Random(seed)
    name = source.choice(["loss", "acc"])
    options = {
        "monitor": name,
        "min_delta": source.choice([0.0, 0.1, 0.5]),
        "patience": source.randint(1, 5),
        "stopping_threshold": source.choice([None, None, 0.2]),
        "rule": source.choice([None, "greater", "less"]),
    }
    values = [source.choice([0.1, 0.25, 0.5, 0.5, 0.75, 1.0, math.inf]) for _ in range(25)]
    theirs = Theirs(**options)
    loop = SimpleNamespace(stop_training=False)
    other = SimpleNamespace(train_loop=loop, logger=SimpleNamespace(info=lambda text: None))
    expected = None
    for number, value in enumerate(values, 1):
        theirs.after_val_epoch(other, {name: value})
        if loop.stop_training:
            expected = number
            break
    assert validate(EarlyStoppingHook(**options), make_runner(), values, name) == expected


@pytest.mark.parametrize(("rule", "values"), [("less", [1.0, 0.5, 0.0]), ("greater", [0.0, 0.5, 1.0])])
def test_exactly_min_delta_is_an_improvement(make_runner, rule, values):
    hook = EarlyStoppingHook("loss", rule, min_delta=0.5, patience=1)
    assert validate(hook, make_runner(), values) is None


def test_patience_survives_a_restart(make_runner):
    values = [1.0, 0.5, 0.49, 0.48, 0.47, 0.46, 0.45]
    runner = make_runner()
    first = EarlyStoppingHook("loss", patience=4)
    assert validate(first, runner, values[:4]) is None
    second = EarlyStoppingHook("loss", patience=4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert validate(second, runner, values[4:]) == 2
    assert runner.stops == ["loss did not improve in 4 validations; best value: 0.5 (EarlyStoppingHook)"]


def test_the_state_of_another_metric_is_ignored(make_runner):
    hook = EarlyStoppingHook("acc")
    hook.load_state_dict({"monitor": "loss", "best_score": 0.1, "wait_count": 4})
    assert (hook.best_score, hook.wait_count) == (None, 0)


def test_a_missing_metric_is_an_error_that_lists_what_there_is(make_runner):
    with pytest.raises(RunError, match="did not report 'top1'; it reported acc, loss"):
        EarlyStoppingHook("top1").after_val_epoch(make_runner(), metrics={"loss": 1.0, "acc": 0.5})


def test_not_strict_warns_once(make_runner):
    runner = make_runner()
    hook = EarlyStoppingHook("top1", strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            hook.after_val_epoch(runner, metrics={})
    assert len(runner.recorder.warnings) == 1
    assert runner.stops == []


def test_nan_stops_at_once_and_counts_as_no_improvement_otherwise(make_runner):
    assert validate(EarlyStoppingHook("loss"), make_runner(), [1.0, math.nan]) == 2
    hook = EarlyStoppingHook("loss", check_finite=False, patience=2)
    assert validate(hook, make_runner(), [math.nan, 1.0, math.nan, math.nan]) == 4


def test_a_tensor_is_a_metric_too(make_runner):
    hook = EarlyStoppingHook("loss")
    hook.after_val_epoch(make_runner(), metrics={"loss": torch.tensor(0.5)})
    assert hook.state_dict() == {"monitor": "loss", "best_score": 0.5, "wait_count": 0, "last_score": 0.5}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"monitor": "score"}, "'score' does not say"),
        ({"monitor": "loss", "rule": "smaller"}, "rule is 'smaller'"),
        ({"monitor": "loss", "patience": 0}, "patience is 0"),
    ],
)
def test_wrong_arguments(options, text):
    with pytest.raises(ConfigError, match=text):
        EarlyStoppingHook(**options)


@pytest.mark.parametrize(
    "name", ["acc", "loss", "accuracy/top1", "coco/bbox_mAP", "mIoU", "AR@100", "val_loss", "auc", "loss_acc"]
)
def test_the_rule_is_mmengines(name):
    assert infer_rule(name) == Theirs(name).rule


def test_the_rule_of_a_named_set_is_that_of_its_metric():
    assert infer_rule("topics/loss") == "less"  # MMEngine takes "top" for a greater-is-better metric
    assert infer_rule("accuracy/mean") == "greater"
    assert infer_rule("score") is None
    assert infer_rule("score", greater=["score"]) == "greater"


def test_a_run_that_ended_early_ends_at_once_when_it_is_started_again(tmp_path, capfd):
    def train(**options):
        hook = {"type": "EarlyStoppingHook", "monitor": "loss", "min_delta": 100.0, **options}
        runner = make_run(
            tmp_path, custom_hooks=[hook], resume=True, train_cfg={"max_iters": 30, "val_interval": 5},
            default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 5}}, log_level="INFO",
        )  # fmt: skip
        runner.train()
        return runner.progress.iteration

    assert train(patience=2) == 15
    assert train(patience=2) == 15
    errors = capfd.readouterr().err
    assert errors.count("loss did not improve in 2 validations") == 2
    assert "--resume" not in errors  # it would not continue
    assert train(patience=3) == 20
