"""What DeepSpeed's config may say: keys, presets, and what must agree with the run's config."""

import json
from importlib.util import find_spec

import pytest
import torch

from mmtrain.errors import ConfigError
from mmtrain.strategies import DeepSpeedStrategy
from mmtrain.strategies.zero import library
from mmtrain.strategies.zero.config_check import settled
from mmtrain.strategies.zero.options import PRESETS, check_models, joined, preset_or_file

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is optional and not installed")
CPU = torch.device("cpu")


def run_config(optim=None, batch=4):
    optim = {"optimizer": {"type": "AdamW", "lr": 0.1}, **(optim or {})}
    return {"optim_wrapper": optim, "train_dataloader": {"batch_size": batch}}


def settle(config, optim=None, *, batch=4, world=2, **arguments):
    return settled(joined(config, arguments), run_config(optim, batch), world=world, device=CPU)


def error_of(function, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- agreement with the run ------------------------------------------------------------------------------------------
def test_auto_takes_everything_from_the_run():
    optim = {"accumulative_counts": 3, "clip_grad": {"max_norm": 0.5}}
    found = settle(PRESETS["zero2"], optim)
    assert found["gradient_accumulation_steps"] == 3
    assert found["train_micro_batch_size_per_gpu"] == 4
    assert found["gradient_clipping"] == 0.5
    assert found["bf16"] == found["fp16"] == {"enabled": False}
    assert found["zero_optimization"] == {"stage": 2}


def test_by_default_nothing_is_switched_on():
    found = settle(None)
    assert found == {
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
    }


@pytest.mark.parametrize(("dtype", "key"), [("bfloat16", "bf16"), ("float16", "fp16"), (torch.bfloat16, "bf16")])
def test_auto_takes_the_precision_of_amp(dtype, key):
    found = settle(PRESETS["zero3"], {"type": "AmpOptimWrapper", "dtype": dtype})
    assert {name: found[name]["enabled"] for name in ("bf16", "fp16")} == {"bf16": key == "bf16", "fp16": key == "fp16"}


def test_the_same_value_twice_is_not_a_contradiction():
    optim = {"type": "AmpOptimWrapper", "dtype": "bfloat16", "accumulative_counts": 2, "clip_grad": {"max_norm": 1}}
    config = {
        "gradient_accumulation_steps": 2, "gradient_clipping": 1.0, "train_batch_size": 16, "bf16": {"enabled": True},
    }  # fmt: skip
    assert settle(config, optim)["bf16"]["enabled"]


@pytest.mark.parametrize(
    ("config", "optim", "words"),
    [
        ({"gradient_accumulation_steps": 4}, None, ["gradient_accumulation_steps is 4", "optim_wrapper.accumulative_counts"]),
        ({"train_micro_batch_size_per_gpu": 8}, None, ["train_micro_batch_size_per_gpu is 8", "train_dataloader.batch_size"]),
        ({"train_batch_size": 9}, None, ["train_batch_size is 9", "is 8", "2 processes"]),
        ({"gradient_clipping": 1.0}, None, ["gradient_clipping is 1.0", "optim_wrapper.clip_grad", "max_norm=1.0"]),
        ({"gradient_clipping": 1.0}, {"clip_grad": {"max_norm": 2}}, ["gradient_clipping is 1.0", "'max_norm': 2"]),
        ({}, {"clip_grad": {"max_norm": 2, "norm_type": 1}}, ["optim_wrapper.clip_grad", "2-norm"]),
        ({}, {"clip_grad": {"type": "value", "clip_value": 1}}, ["optim_wrapper.clip_grad", "2-norm"]),
        ({}, {"clip_grad": {"max_norm": 1, "error_if_nonfinite": True}}, ["error_if_nonfinite"]),
        ({}, {"type": "AmpOptimWrapper", "dtype": "bfloat16"}, ["optim_wrapper.dtype", "bfloat16", "strategy.bf16 is not enabled"]),
        ({"fp16": {"enabled": True}}, {"type": "AmpOptimWrapper", "dtype": "bfloat16"}, ["optim_wrapper.dtype", "bf16"]),
        ({"bf16": {"enabled": False}}, {"type": "AmpOptimWrapper"}, ["optim_wrapper.type", "strategy.config.bf16 is not enabled"]),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, None, ["bf16", "fp16", "both enabled"]),
        (
            {"fp16": {"enabled": True, "loss_scale": 128}},
            {"type": "AmpOptimWrapper", "dtype": "float16", "loss_scale": 64},
            ["fp16.loss_scale is 128", "optim_wrapper.loss_scale is 64"],
        ),
    ],
)  # fmt: skip
def test_a_contradiction_names_both_places(config, optim, words):
    sentence = error_of(settle, config, optim)
    assert all(word in sentence for word in words), sentence


# ---- keys ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"zero_optimisation": {"stage": 2}},
            ["strategy.config.zero_optimisation", "did you mean 'zero_optimization'"],
        ),
        ({"optimizer": {"type": "Adam"}}, ["strategy.config.optimizer", "optim_wrapper.optimizer"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["strategy.config.scheduler", "param_scheduler"]),
        ({"amp": {"enabled": True}}, ["strategy.config.amp", "bf16"]),
        ({"aio": {"block_sise": 1}}, ["strategy.config.aio.block_sise", "'block_size'"]),
        ({"gradient_clipping": "1.0"}, ["gradient_clipping is '1.0'", "number"]),
        ({"steps_per_print": "auto"}, ["steps_per_print", "'auto'"]),
        ({"activation_checkpointing": True}, ["activation_checkpointing", "table"]),
        ([1], ["strategy.config is [1]", "path of a JSON file"]),
    ],
)
def test_an_unknown_key_is_refused(config, words):
    sentence = error_of(joined, config, {})
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"zero_optimization": {"stag": 2}}, ["zero_optimization.stag", "did you mean 'stage'"]),
        ({"zero_optimization": {"stage": 7}}, ["zero_optimization.stage is 7"]),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, ["offload_optimizer.devise", "'device'"]),
        ({"zero_optimization": {"cpu_offload": True}}, ["zero_optimization.cpu_offload", "offload_optimizer"]),
        ({"fp16": {"enabled": True, "loss_scal": 1}}, ["fp16.loss_scal", "'loss_scale'"]),
        ({"bf16": {"enabled": [1]}}, ["bf16.enabled is [1]"]),
    ],
)
def test_deepspeeds_config_models_check_the_keys(config, words):
    library.load()
    sentence = error_of(check_models, joined(config, {}))
    assert all(word in sentence for word in words), sentence


def test_a_file_is_named_with_its_key(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"gradient_clipping": 2.0, "zero_optimization": {"stage": 1}}))
    assert joined(str(path), {}).stage == 1
    sentence = error_of(joined, str(path), {"gradient_clipping": 1.0})
    assert f"{path}: gradient_clipping is 2.0" in sentence
    assert "strategy.gradient_clipping is 1.0" in sentence
    assert f"{path}: gradient_clipping is 2.0" in error_of(settle, str(path))


@pytest.mark.parametrize(
    ("text", "words"), [(None, "cannot be read"), ("{", "not valid JSON"), ("[]", "expected a JSON object")]
)
def test_a_file_that_cannot_be_read(tmp_path, text, words):
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    assert words in error_of(joined, str(path), {})


# ---- presets ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_deepspeed_takes(name):
    library.load()
    found = joined(preset_or_file(f"deepspeed_{name}"), {})
    check_models(found)
    assert found.stage == int(name[4])


def test_a_preset_is_a_copy():
    preset_or_file("zero2")["zero_optimization"]["stage"] = 0
    assert preset_or_file("zero2")["zero_optimization"]["stage"] == 2


def test_no_such_preset():
    assert "did you mean 'zero2'" in error_of(preset_or_file, "zero_2")


def test_mmengines_arguments_are_accepted():
    strategy = DeepSpeedStrategy(
        config={"bf16": {"enabled": True}}, zero_optimization={"stage": 2}, gradient_clipping="auto",
        inputs_to_half=["x"], activation_checkpointing={"profile": False}, aio={"block_size": 1048576},
        train_micro_batch_size_per_gpu=4, gradient_accumulation_steps=1, steps_per_print=10,
        exclude_frozen_parameters=True,
    )  # fmt: skip
    strategy.device = CPU
    strategy.check_config(run_config())
    assert strategy.dtype is torch.bfloat16
