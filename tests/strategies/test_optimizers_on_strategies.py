"""Every optimizer of torch on every strategy: it trains and continues exactly, or it is refused before training."""

import pytest
from torch_optimizers import ELEMENTWISE

STRATEGIES = {
    "ddp": {"type": "DDPStrategy"},
    "fsdp": {"type": "FSDPStrategy", "wrap": "TinyBlock"},
    "zero 1": {"type": "DeepSpeedStrategy", "zero_optimization": {"stage": 1}},
    "zero 2": {"type": "DeepSpeedStrategy", "zero_optimization": {"stage": 2}},
    "zero 3": {"type": "DeepSpeedStrategy", "zero_optimization": {"stage": 3}},
}
FAST = {("SGD", "fsdp"), ("Adagrad", "fsdp"), ("SGD", "zero 1")}
CASES = [
    pytest.param(kind, strategy, marks=() if (kind, strategy) in FAST else pytest.mark.slow)
    for kind in ELEMENTWISE
    for strategy in STRATEGIES
]


@pytest.mark.parametrize(("kind", "strategy"), CASES)
def test_elementwise_optimizers_are_exact(pair, tmp_path, kind, strategy):
    wrapper = {"accumulative_counts": 2, "optimizer": {"type": kind, "lr": 0.01, **ELEMENTWISE[kind]}}
    chosen = STRATEGIES[strategy]
    results = pair.run(
        "strategy_jobs", "exact_over_a_crash", work_dir=str(tmp_path), optim_wrapper=wrapper, strategy=chosen
    )
    if kind == "Adagrad" and strategy.startswith("zero"):
        assert all("DeepSpeed replaces" in result for result in results), results
    elif (kind, strategy) == ("Rprop", "fsdp"):
        assert all("Rprop cannot train the sharded parameters" in result for result in results), results
    else:
        assert results == ["", ""]


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        ("zero 1", "does not update each element by itself"),
        ("zero 3", "does not update each element by itself"),
        ("fsdp", "cannot train the sharded parameters of FSDPStrategy"),
    ],
)
def test_adafactor_is_refused_where_parameters_are_divided(pair, tmp_path, strategy, words):
    wrapper = {"optimizer": {"type": "Adafactor", "lr": 0.01}}
    results = pair.run(
        "strategy_jobs", "refused", work_dir=str(tmp_path), optim_wrapper=wrapper, strategy=STRATEGIES[strategy]
    )
    for message in results:
        assert message.startswith("ConfigError: optim_wrapper.optimizer: Adafactor")
        assert words in message
        assert "\n" not in message
