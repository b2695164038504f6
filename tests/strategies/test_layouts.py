"""Parameters in unusual layouts and types: trained as by DDP, or refused by name before training starts."""

from importlib.util import find_spec

import pytest

ADAMW, SGD = {"type": "AdamW", "lr": 0.01}, {"type": "SGD", "lr": 0.1, "momentum": 0.9}
DDP, FSDP = {"type": "DDPStrategy"}, {"type": "FSDPStrategy"}
deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is optional and not installed")
ZERO = {stage: {"type": "DeepSpeedStrategy", "zero_optimization": {"stage": stage}} for stage in range(4)}
SHARDING = [
    FSDP,
    pytest.param({"type": "FSDPStrategy", "wrap": ["TinyBlock", "Conv2d"]}, marks=pytest.mark.slow),
    pytest.param(ZERO[0], marks=[deepspeed, pytest.mark.slow]),
    pytest.param(ZERO[1], marks=[deepspeed, pytest.mark.slow]),
    pytest.param(ZERO[2], marks=deepspeed),
    pytest.param(ZERO[3], marks=deepspeed),
]


@pytest.fixture
def trained(pair, tmp_path):
    """The last loss, or what was raised, the same on both ranks."""

    def run(layout, strategy, optimizer=ADAMW, folder="run"):
        options = {"layout": layout, "strategy": strategy, "optimizer": optimizer}
        first, second = pair.run("layout_jobs", "trained", work_dir=str(tmp_path / folder), **options)
        assert first == second
        return first

    return run


@pytest.mark.parametrize("layout", ["transposed", "channels_last"])
@pytest.mark.parametrize("optimizer", [ADAMW, pytest.param(SGD, marks=pytest.mark.slow)], ids=["AdamW", "SGD"])
@pytest.mark.parametrize("strategy", SHARDING, ids=str)
def test_parameters_in_any_layout_train_as_under_ddp(trained, layout, optimizer, strategy):
    expected = trained("plain", DDP, optimizer, "plain")
    assert trained(layout, strategy, optimizer) == pytest.approx(expected, rel=1e-5)


def test_a_changed_layout_is_reported(pair, tmp_path):
    (found, _) = pair.run("layout_jobs", "notices", work_dir=str(tmp_path), layout="channels_last", strategy=FSDP)
    assert [line for line in found if "contiguous" in line] == [
        "FSDPStrategy stores conv.weight contiguously, not in the memory layout that the model set"
    ]


@pytest.mark.parametrize(
    ("kind", "strategy", "words"),
    [
        ("expanded", FSDP, ["elements of mix share memory"]),
        ("float64", FSDP, ["embed.weight is torch.float32 and odd is torch.float64", "strategy.wrap"]),
        ("complex", FSDP, ["odd is torch.complex64"]),
        ("empty", FSDP, ["odd has shape (0, 2) and no elements"]),
        ("scalar", FSDP, ["odd to a 1D tensor"]),
        pytest.param("expanded", ZERO[2], ["elements of mix share memory"], marks=deepspeed),
        pytest.param("float64", ZERO[1], ["odd is torch.float64", "DDPStrategy"], marks=deepspeed),
        pytest.param("bfloat16", ZERO[2], ["odd is torch.bfloat16"], marks=deepspeed),
        pytest.param("empty", ZERO[3], ["odd has shape (0, 2) and no elements"], marks=deepspeed),
    ],
    ids=str,
)
def test_what_an_engine_cannot_take_is_refused_by_name(trained, kind, strategy, words):
    said = trained(kind, strategy)
    assert said.startswith("ConfigError: "), said
    assert all(word in said for word in words), said


@pytest.mark.parametrize("kind", ["one element", "frozen int8", "five dimensions"])
@pytest.mark.parametrize("strategy", [FSDP, pytest.param(ZERO[3], marks=deepspeed)], ids=str)
def test_parameters_of_unusual_shapes_train_as_under_ddp(trained, kind, strategy):
    assert trained(kind, strategy) == pytest.approx(trained(kind, DDP, folder="ddp"), rel=1e-5)
