"""Validation in one process and in two, with shares and losses that differ between ranks."""

from importlib.util import find_spec

import evaluation_jobs
import pytest
from ranks import RankError

FSDP = {"type": "FSDPStrategy"}
ZERO3 = {"type": "DeepSpeedStrategy", "zero_optimization": {"stage": 3}}
STRATEGIES = {"ddp": None, "fsdp": FSDP, "zero3": ZERO3}


@pytest.fixture
def both(pair, tmp_path):
    """The metrics of one process, and of both ranks of two, which must be the same."""

    def run(dataset, strategy=None, **options):
        if strategy is not None and strategy["type"] == "DeepSpeedStrategy" and find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is optional and not installed")
        alone = evaluation_jobs.validated(str(tmp_path / "alone"), dataset, **options)
        options |= {"dataset": dataset, "strategy": strategy}
        first, second = pair.run("evaluation_jobs", "validated", work_dir=str(tmp_path / "two"), **options)
        assert first == second
        return alone, first

    return run


def assert_alike(alone, two):
    assert list(alone) == list(two)
    assert two == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("evaluator", [True, False], ids=["metric", "losses alone"])
def test_ranks_may_report_different_parts_of_the_loss(both, name, evaluator):
    """Batches of one: samples 0, 2, 4, all of rank 0, but only sample 5 of rank 1 is positive, and reports it."""
    dataset = {"type": "MapPoints", "size": 6, "negative": 5}
    alone, two = both(dataset, STRATEGIES[name], batch_size=1, evaluator=evaluator)
    assert_alike(alone, two)
    if not evaluator:
        assert two["positive"] == pytest.approx(float(evaluation_jobs.Points(6).x[5].sum()))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_set_that_is_smaller_than_the_world(both, name):
    alone, two = both({"type": "MapPoints", "size": 1}, STRATEGIES[name], evaluator=name != "ddp")
    assert_alike(alone, two)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("first", [0, pytest.param(1, marks=pytest.mark.slow), 7], ids="rank 0 reads {}".format)
def test_a_stream_without_a_length_is_shared_unequally(both, name, first):
    alone, two = both({"type": "StreamedPoints", "size": 9, "first": first}, STRATEGIES[name])
    assert two["seen"] == 9
    assert_alike(alone, two)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_without_a_length_is_validated_by_one_process(tmp_path, num_workers):
    dataset = {"type": "StreamedPoints", "size": 9, "first": 9}
    assert evaluation_jobs.validated(str(tmp_path), dataset, num_workers=num_workers)["seen"] == 9


def test_an_empty_stream_is_refused_on_all_ranks(pair, tmp_path):
    dataset = {"type": "StreamedPoints", "size": 0, "first": 0}
    with pytest.raises(RankError) as error:
        pair.run("evaluation_jobs", "validated", work_dir=str(tmp_path), dataset=dataset)
    assert [line for line in str(error.value).splitlines() if line.startswith("RunError")] == 2 * [
        "RunError: the val set is empty: its loader returned no batch"
    ]
