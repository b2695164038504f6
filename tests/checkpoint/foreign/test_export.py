import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mmtrain.checkpoint import CheckpointStore
from mmtrain.checkpoint.foreign import export
from mmtrain.errors import CheckpointError, ConfigError


class Small(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.first = nn.Linear(4, width)
        self.last = nn.Linear(width, 4, bias=False)
        self.register_buffer("count", torch.tensor(7))


class Pretrained(nn.Module):
    """What a Hugging Face model looks like from outside."""

    def __init__(self):
        super().__init__()
        self.config = {"width": 4}
        self.line = nn.Linear(4, 4)

    def save_pretrained(self, directory):
        from pathlib import Path

        Path(directory).mkdir()
        (Path(directory) / "config.json").write_text("{}")
        torch.save(self.state_dict(), Path(directory) / "weights.pth")


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.llm, self.head = Pretrained(), nn.Linear(4, 1)


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = Small()
    model.last.weight.data = model.last.weight.data.bfloat16()
    averages = {"first.weight": torch.ones(3, 4), "last.weight": torch.full((4, 3), 1 / 3)}
    state = {"progress": {"iteration": 5}, "hooks.ema": {"steps": 5, "averages": averages}}
    store = CheckpointStore(tmp_path / "work")
    fields = {"position": {"iteration": 5, "epoch": 1}, "seed": 3, "config": "model = dict()\n"}
    store.save("iter_5.pth", {"model": model.state_dict()}, state=state, manifest_fields=fields, blocking=True)
    store.close()
    return store.open("iter_5.pth")


def test_weights_are_those_that_were_saved(checkpoint):
    weights = export.read_weights(checkpoint)
    assert list(weights) == ["count", "first.bias", "first.weight", "last.weight"]
    assert weights["last.weight"].dtype is torch.bfloat16
    assert weights["count"].item() == 7


def test_averages_take_the_type_of_the_weights(checkpoint):
    weights = export.read_weights(checkpoint, average="ema")
    assert torch.equal(weights["first.weight"], torch.ones(3, 4))
    assert torch.equal(weights["last.weight"], torch.full((4, 3), 1 / 3).bfloat16())
    assert torch.equal(weights["first.bias"], export.read_weights(checkpoint)["first.bias"])


def test_safetensors(checkpoint, tmp_path):
    weights = export.read_weights(checkpoint)
    export.write_safetensors(tmp_path / "out.safetensors", weights)
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    assert len(found) == len(weights)


def test_mmengine_file_is_plain_and_mmengine_reads_it(checkpoint, tmp_path):
    from mmengine.runner import load_checkpoint

    path = tmp_path / "out.pth"
    weights = export.cast(export.read_weights(checkpoint), torch.float32)
    export.write_mmengine(path, weights, export.mmengine_meta(checkpoint.manifest))
    meta = torch.load(path, weights_only=True)["meta"]
    assert (meta["iter"], meta["epoch"], meta["seed"], meta["cfg"]) == (5, 1, 3, "model = dict()\n")
    model = Small()
    load_checkpoint(model, str(path), strict=True)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_cast_does_not_change_integers(checkpoint):
    weights = export.cast(export.read_weights(checkpoint), torch.float16)
    assert {name: value.dtype for name, value in weights.items()} == {
        "count": torch.int64, "first.bias": torch.float16, "first.weight": torch.float16, "last.weight": torch.float16,
    }  # fmt: skip


def test_fill_names_weights_that_do_not_fit(checkpoint):
    weights = export.read_weights(checkpoint)
    with pytest.raises(CheckpointError, match=r"first.weight is \[3, 4\] in the checkpoint and \[5, 4\] in the model"):
        export.fill(Small(5), weights)
    with pytest.raises(CheckpointError, match=r"the model does not have first\.bias"):
        export.fill(nn.Linear(4, 3), weights)


def test_frozen_parameters_can_be_taken_from_the_model(checkpoint):
    weights = export.read_weights(checkpoint)
    del weights["first.weight"]
    model = Small()
    with pytest.raises(CheckpointError, match=r"the checkpoint does not have first\.weight"):
        export.fill(model, weights, partial=True)
    model.first.weight.requires_grad_(False)
    kept = model.first.weight.clone()
    filled = export.fill(model, weights, partial=True)
    assert torch.equal(filled["first.weight"], kept)
    assert torch.equal(filled["first.bias"], weights["first.bias"])


def test_huggingface_part_of_a_model(tmp_path):
    model = Holder()
    left_out = export.write_huggingface(tmp_path / "out", model, dtype=torch.bfloat16)
    assert left_out == ["head.weight", "head.bias"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "weights.pth"]
    assert torch.load(tmp_path / "out" / "weights.pth", weights_only=True)["line.weight"].dtype is torch.bfloat16


def test_a_model_that_is_not_a_huggingface_model(tmp_path):
    with pytest.raises(ConfigError, match="Small is not a Hugging Face model"):
        export.write_huggingface(tmp_path / "out", Small())


def test_huggingface_loads_what_was_written(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    assert export.write_huggingface(tmp_path / "out", model) == []
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


def test_huggingface_loads_the_weights_of_an_interval(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    for _ in range(2):  # a resumed run writes some of them a second time
        export.write_pretrained(tmp_path / "iter_3", model, model.state_dict())
    again, loading_info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "iter_3", output_loading_info=True
    )
    assert not any(loading_info.values()), loading_info
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    plain = load_file(tmp_path / "iter_3" / "model.safetensors")
    assert plain.keys() == model.state_dict().keys()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "out.pth"
    export.write_mmengine(path, {"a": torch.ones(1)}, {})

    def full(value, target):
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"out.pth could not be written: .*No space left"):
        export.write_mmengine(path, {"a": torch.zeros(1)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["out.pth"]
    assert torch.load(path, weights_only=True)["state_dict"]["a"].item() == 1
