"""Micro-batches of unequal sizes: an update is that of one batch of all samples, or tokens, of its window."""

import importlib.util

import pytest
import torch
import window_jobs
from parts import logged
from torch.utils.data import DataLoader

from mmtrain.errors import RunError

WHOLE = (12, 1)  # one batch of 12


def assert_equal(found, expected, tolerance=2e-6):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        difference = (torch.tensor(found[name]) - torch.tensor(values)).abs().max()
        assert difference < tolerance, f"{name} differs by {difference:g}"


LOADERS = {
    "map-style": {},
    "own sampler": {"loader": {"sampler": {"type": "InOrder"}}},
    "iterable": {"data": {"type": "StreamedSentences"}, "loader": {"sampler": None}},
}
TOKENS = [None, "tensor", "int"]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("sizes", [(8, 2), (5, 3), (7, 2)])
def test_a_window_is_one_batch(sizes, name, tokens, tmp_path):
    """8 + 4, 5 + 5 + 2 and 7 + 5 samples, each a window of its own in every epoch."""
    options = {**LOADERS[name], "model": {"tokens": tokens}}
    expected = window_jobs.train(tmp_path / "whole", *WHOLE, **options)
    assert_equal(window_jobs.train(tmp_path / "parts", *sizes, **options), expected)


def test_a_ready_made_loader(tmp_path):
    expected = window_jobs.train(tmp_path / "whole", *WHOLE)
    loader = DataLoader(window_jobs.Sentences(), batch_size=8)
    found = window_jobs.train(tmp_path / "parts", 8, 2, loader={"sampler": None}, ready_made=loader)
    assert_equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"model": {"type": "OwnStepRegressor"}},
        {"wrapper": "OwnStepWrapper"},
        {"model": {"tokens": "tensor"}, "wrapper": "OwnStepWrapper"},
    ],
    ids=["train_step", "step", "step, tokens"],
)
@pytest.mark.parametrize("name", LOADERS)
def test_models_and_wrappers_with_a_step_of_their_own(name, options, tmp_path):
    plain = {**options, "model": {"tokens": options.get("model", {}).get("tokens")}, "wrapper": "OptimWrapper"}
    expected = window_jobs.train(tmp_path / "whole", *WHOLE, **LOADERS[name], **plain)
    assert_equal(window_jobs.train(tmp_path / "parts", 8, 2, **LOADERS[name], **options), expected)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", LOADERS)
def test_windows_that_straddle_epochs(name, tokens, tmp_path):
    """20 samples in batches of 8, 8 and 4; windows of two: (8, 8), (4 of one epoch, 8 of the next), (8, 4)."""
    kind = LOADERS[name].get("data", {}).get("type", "Sentences")
    options = {**LOADERS[name], "model": {"tokens": tokens}, "data": {"type": kind, "size": 20}, "epochs": 2}
    found = window_jobs.train(tmp_path / "run", 8, 2, **options)
    torch.manual_seed(0)
    model = window_jobs.Regressor(tokens)
    start = window_jobs.train(tmp_path / "start", 8, 2, **{**options, "epochs": 1, "optim_wrapper": {
        "optimizer": {"type": "SGD", "lr": 0.0}}})  # fmt: skip
    model.load_state_dict({name: torch.tensor(value) for name, value in start.items()})
    data = window_jobs.Sentences(20)
    for window in (range(16), [16, 17, 18, 19, *range(8)], range(8, 20)):
        batch = {key: torch.stack([data[index][key] for index in window]) for key in ("x", "y", "mask")}
        model.zero_grad()
        model(**batch)["loss"].backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
    assert_equal(found, {name: value.tolist() for name, value in model.state_dict().items()})


@pytest.mark.parametrize("tokens", ["tensor", "int"])
def test_equal_sizes_change_no_bit(tokens, tmp_path):
    """With as many tokens in each micro-batch, counting them has the very result of not counting them."""
    data = {"type": "Sentences", "equal": True, "size": 16}
    plain = window_jobs.train(tmp_path / "plain", 4, 2, data=data)
    assert window_jobs.train(tmp_path / "counted", 4, 2, data=data, model={"tokens": tokens}) == plain


def test_clipping_sees_the_weighted_gradients(tmp_path):
    clip = {"optim_wrapper": {"clip_grad": {"max_norm": 0.05}}}
    options = {**LOADERS["iterable"], **clip}
    expected = window_jobs.train(tmp_path / "whole", *WHOLE, **options)
    assert_equal(window_jobs.train(tmp_path / "parts", 8, 2, **options), expected)


def test_a_count_that_comes_and_goes_is_an_error(tmp_path, monkeypatch):
    forward, calls = window_jobs.Regressor.forward, []

    def now_and_then(self, **batch):
        calls.append(1)
        outputs = forward(self, **batch)
        return outputs if len(calls) % 2 else {"loss": outputs["loss"]}

    monkeypatch.setattr(window_jobs.Regressor, "forward", now_and_then)
    with pytest.raises(RunError, match="Regressor returned num_tokens for some micro-batches"):
        window_jobs.train(tmp_path, 6, 2, model={"tokens": "int"})


def test_the_loss_of_a_validation_is_the_mean_over_tokens(tmp_path):
    data = {"type": "Sentences"}
    for size in (5, 12):
        validation = {"dataset": data, "batch_size": size}
        window_jobs.train(tmp_path / str(size), 12, 1, model={"tokens": "tensor"}, validation=validation)
    assert logged(tmp_path / "5", "loss", mode="val").keys() == {1, 2, 3}
    for step, (value,) in logged(tmp_path / "12", "loss", mode="val").items():
        assert logged(tmp_path / "5", "loss", mode="val")[step][0] == pytest.approx(value, rel=1e-6)


STRATEGIES = {
    "ddp": {"type": "DDPStrategy"},
    "fsdp": {"type": "FSDPStrategy"},
    **{f"zero{stage}": {"type": "DeepSpeedStrategy", "zero_optimization": {"stage": stage}} for stage in (0, 1, 3)},
}


@pytest.fixture(scope="module")
def on_two_ranks(pair):
    def run(function, name, *args, **options):
        if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("DeepSpeed is optional and not installed")
        work_dir, batch_size, accumulation = args
        results = pair.run(
            "window_jobs", function, work_dir=str(work_dir), batch_size=batch_size, accumulation=accumulation,
            strategy=STRATEGIES[name], **options,
        )  # fmt: skip
        assert results[0] == results[1]
        return results[0]

    return run


@pytest.mark.parametrize("name", STRATEGIES)
def test_samples_over_ranks_and_micro_batches(on_two_ranks, tmp_path, name):
    """12 samples as (8, 4): 4 + 4 on two ranks, then 2 + 2; and as (10, 2)."""
    expected = window_jobs.train(tmp_path / "whole", *WHOLE)
    for size in (4, 5):
        assert_equal(on_two_ranks("train", name, tmp_path / f"parts{size}", size, 2), expected)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero0"])
@pytest.mark.parametrize("sizes", [(4, 2), (6, 1), (1, 6), (5, 2)])
def test_tokens_over_ranks_and_micro_batches(on_two_ranks, tmp_path, name, sizes):
    """Also with an incomplete micro-batch, of which one rank has no sample."""
    options = {"model": {"tokens": "tensor"}, "data": {"type": "Sentences", "size": 11 if sizes[0] == 5 else 12}}
    expected = window_jobs.train(tmp_path / "whole", *WHOLE, **options)
    assert_equal(on_two_ranks("train", name, tmp_path / "parts", *sizes, **options), expected)
    losses = [logged(tmp_path / folder, "loss") for folder in ("whole", "parts")]
    if sizes == (6, 1):  # the mean over tokens of both ranks
        for step, (value,) in losses[0].items():
            assert losses[1][step][0] == pytest.approx(value, rel=1e-5)


def test_what_zero_cannot_weight_is_refused(on_two_ranks, tmp_path):
    text = on_two_ranks("refused", "zero1", tmp_path / "tokens", 4, 2, model={"tokens": "tensor"})
    assert text.startswith("RunError: the micro-batches of an update have unequal sizes")
    assert "accumulative_counts=1, or FSDPStrategy" in text
    options = LOADERS["iterable"]
    text = on_two_ranks("refused", "zero1", tmp_path / "stream", 4, 2, **options)
    assert text.startswith("ConfigError: optim_wrapper.accumulative_counts=2")
    assert "set train_dataloader.drop_last=True" in text
    dropping = {**options, "loader": {"sampler": None, "drop_last": True}}
    assert on_two_ranks("refused", "zero1", tmp_path / "dropping", 4, 2, **dropping) == "nothing was refused"
