import pytest
import torch
from safetensors.torch import load_file
from saved_state import save, tensors_of
from torch import nn

from mmtrain.checkpoint import CheckpointStore
from mmtrain.errors import CheckpointError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    store = CheckpointStore(tmp_path_factory.mktemp("reader"))
    save(store, 4)
    store.close()
    return store.open("iter_4.pth")


def test_listings(checkpoint):
    assert checkpoint.sections() == ["model", "optimizer"]
    assert checkpoint.tensor_names("model") == ["b", "count", "none", "tied", "w"]
    assert checkpoint.tensor_names("nothing") == []
    assert checkpoint.tensor_info("model", "b").dtype == "BF16"
    assert checkpoint.tensor_info("model", "w").shape == (16, 8)
    assert checkpoint.rng(1) is None


def test_other_readers_of_safetensors_read_the_files(checkpoint):
    (file,) = (checkpoint.path / "model").iterdir()
    loaded = load_file(file)
    assert torch.equal(loaded["tied"], tensors_of(4)["model"]["w"])
    assert "w" not in loaded  # one memory, written once; tensors.json says that it is `tied`


def test_load_into_parameters_other_layouts_and_types(checkpoint):
    expected = tensors_of(4)["model"]
    linear = nn.Parameter(torch.zeros(16, 8))
    into = {"w": linear, "tied": torch.zeros(8, 16).t(), "b": torch.zeros(8), "count": torch.tensor(0.0)}
    into["none"] = torch.zeros(0, 2)
    report = checkpoint.load("model", into)
    assert report.cast == ["b", "count"]
    assert torch.equal(linear, expected["w"])
    assert torch.equal(into["tied"], expected["w"])
    assert torch.equal(into["b"], expected["b"].float())
    assert into["count"] == 4
    assert linear.requires_grad


def test_strict_refuses_before_anything_changes(checkpoint):
    good = torch.zeros(16, 8)
    into = {"w": good, "b": torch.zeros(9), "new": torch.zeros(1), "none": torch.zeros(0, 2), "count": torch.tensor(0)}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load("model", into)
    message = str(caught.value)
    assert "1 missing in the checkpoint: new" in message
    assert "1 not in this run: tied" in message
    assert "1 with a different shape: b (saved [8], here [9])" in message
    assert not good.any()
    report = checkpoint.load("model", into, strict=False)
    assert (report.matched, report.missing, report.unexpected) == (["w", "none", "count"], ["new"], ["tied"])
    assert good.any()
    with pytest.raises(CheckpointError, match=r"100 missing.*x0, x1, x2, x3, x4 and 95 more"):
        checkpoint.load("absent", {f"x{i}": good for i in range(100)})


def test_read_one_tensor(checkpoint):
    assert torch.equal(checkpoint.read("model", "w"), tensors_of(4)["model"]["w"])
    with pytest.raises(CheckpointError, match="no tensor 'v' in section 'model'"):
        checkpoint.read("model", "v")


def test_a_file_that_shrank_after_it_was_opened(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 4)
    store.close()
    checkpoint = store.open("iter_4.pth")
    (file,) = (checkpoint.path / "model").iterdir()
    file.write_bytes(file.read_bytes()[:-600])
    for target in (torch.zeros(16, 8), torch.zeros(8, 16).t()):
        with pytest.raises(CheckpointError, match="it ends before byte"):
            checkpoint.load("model", {"w": target}, strict=False)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        checkpoint.load("model", {"w": torch.zeros(16, 8)}, strict=False)
