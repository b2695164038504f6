import pytest
from mmengine.evaluator import BaseMetric
from mmengine.evaluator import Evaluator as Theirs
from mmengine.structures import BaseDataElement

from mmtrain.errors import ConfigError, RunError
from mmtrain.evaluation import Evaluator, build_evaluator
from mmtrain.registry import METRICS


class Accuracy(BaseMetric):
    default_prefix = "acc"

    def process(self, data_batch, data_samples):
        self.results += [sample["right"] for sample in data_samples]

    def compute_metrics(self, results):
        return {"top1": sum(results) / len(results), "count": len(results)}


class Counter:
    """A metric that does not use MMEngine."""

    dataset_meta = None

    def __init__(self, name="seen"):
        self.name, self.seen = name, []

    def process(self, data_batch, data_samples):
        self.seen.append((data_batch, data_samples))

    def evaluate(self, size):
        return {self.name: size}


@pytest.fixture(autouse=True)
def registered():
    METRICS.register_module(module=Accuracy, name="TestAccuracy", force=True)
    yield
    METRICS.module_dict.pop("TestAccuracy")


BATCHES = [[{"right": 1}, {"right": 0}], [{"right": 1}]]


def test_metrics_are_those_of_mmengines_evaluator():
    ours, theirs = build_evaluator({"type": "TestAccuracy"}), Theirs(Accuracy())
    for evaluator in (ours, theirs):
        for batch in BATCHES:
            evaluator.process(data_samples=batch, data_batch={"x": 1})
    assert ours.evaluate(3) == theirs.evaluate(3) == {"acc/top1": 2 / 3, "acc/count": 3}
    ours.process(data_samples=[{"right": 0}])
    assert ours.evaluate(1) == {"acc/top1": 0.0, "acc/count": 1}  # it started again


@pytest.mark.parametrize(
    "cfg",
    [
        {"type": "TestAccuracy", "prefix": "a"},
        [{"type": "TestAccuracy", "prefix": "a"}],
        {"type": "Evaluator", "metrics": [{"type": Accuracy, "prefix": "a"}]},
        {"type": Theirs, "metrics": {"type": "TestAccuracy", "prefix": "a"}},
        {"metrics": Accuracy(prefix="a")},
        [Accuracy(prefix="a")],
        Accuracy(prefix="a"),
    ],
)
def test_every_form_of_an_evaluator(cfg):
    evaluator = build_evaluator(cfg)
    assert isinstance(evaluator, Evaluator)
    evaluator.process(data_samples=BATCHES[0])
    assert evaluator.evaluate(2) == {"a/top1": 0.5, "a/count": 2}


def test_none_and_an_evaluator_object():
    own = Evaluator([Counter()])
    assert build_evaluator(None) is None
    assert build_evaluator(own) is own


def test_data_elements_reach_metrics_as_dicts():
    counter = Counter()
    evaluator = Evaluator(counter)
    element = BaseDataElement(right=1)
    evaluator.process(data_samples=[element, {"right": 0}], data_batch="batch")
    assert counter.seen == [("batch", [{"right": 1}, {"right": 0}])]
    evaluator.process(data_samples="whatever the model gave", data_batch=None)
    assert counter.seen[1] == (None, "whatever the model gave")


def test_the_meta_of_the_data_reaches_every_metric():
    evaluator = Evaluator([Counter("a"), Accuracy()])
    evaluator.dataset_meta = {"classes": ("cat",)}
    assert evaluator.dataset_meta == {"classes": ("cat",)}
    assert [metric.dataset_meta for metric in evaluator.metrics] == [{"classes": ("cat",)}] * 2


def test_a_repeated_name_is_an_error():
    with pytest.raises(RunError, match="two metrics return the name 'seen'; set a different prefix"):
        Evaluator([Counter(), Counter()]).evaluate(1)


@pytest.mark.parametrize(
    ("cfg", "text"),
    [
        ({"type": "TestAcuracy"}, r"val_evaluator\.type.*TestAccuracy"),
        ([{"type": "TestAccuracy"}, {"type": "TestAccuracy", "prefx": 1}], r"val_evaluator\[1\].*prefix"),
        ([object()], r"val_evaluator\[0\] is a object without a method 'process'"),
        ({"metrics": [3]}, r"val_evaluator\.metrics\[0\] is a int"),
    ],
)
def test_mistakes_are_reported_with_their_path(cfg, text):
    with pytest.raises(ConfigError, match=f"(?s){text}"):
        build_evaluator(cfg, path="val_evaluator")
