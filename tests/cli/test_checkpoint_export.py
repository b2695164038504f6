"""``tools/checkpoint.py export``: the files that other programs read."""

import importlib
import shutil
import sys
from pathlib import Path

import torch
from parts import config, make_runner
from safetensors.torch import load_file

from mmtrain.checkpoint import CheckpointStore


# ---- export
def test_export_safetensors(trained, tmp_path, run):
    out = tmp_path / "weights.safetensors"
    status, output, _ = run("export", trained, out, "--dtype", "bfloat16")
    assert (status, output) == (0, f"wrote {out} (safetensors, 9 tensors from {trained / 'iter_20.pth'})\n")
    found, checkpoint = load_file(out), CheckpointStore(trained).open("iter_20.pth")
    assert torch.equal(found["last.weight"], checkpoint.read("model", "last.weight").bfloat16())
    assert found["norm.num_batches_tracked"].dtype is torch.int64
    status, _, err = run("export", trained, out)
    assert status == 2
    assert "overwrite it with --force" in err
    assert run("export", trained, out, "--force")[0] == 0


def test_export_mmengine_with_averages(trained, tmp_path, run):
    out = tmp_path / "weights.pth"
    assert run("export", trained / "iter_14.pth", out, "--ema")[0] == 0
    found = torch.load(out, weights_only=True)
    averages = CheckpointStore(trained).open("iter_14.pth").state()["hooks.ema"]["averages"]
    assert torch.equal(found["state_dict"]["first.weight"], averages["first.weight"])
    assert found["meta"]["iter"] == 14
    status, _, err = run("export", trained, tmp_path / "x.pth", "--ema", "Counter")
    assert (status, "has no weight averages of that hook, only of ema" in err) == (2, True)


def test_export_with_a_config(trained, tmp_path, run):
    path = tmp_path / "net.py"
    lines = ["custom_imports = dict(imports=['parts'])", *(f"{k} = {v!r}" for k, v in config(tmp_path / "w").items())]
    path.write_text("\n".join(lines) + "\n")
    out = tmp_path / "weights.safetensors"
    assert run("export", trained, out, "--config", path)[0] == 0
    status, _, err = run("export", trained, tmp_path / "x.pth", "--config", path, "--cfg-options", "model.hidden=9")
    assert status == 1
    assert "first.weight is [8, 6] in the checkpoint and [9, 6] in the model" in err
    status, _, err = run("export", trained, tmp_path / "hf", "--format", "huggingface", "--config", path)
    assert (status, "Net is not a Hugging Face model" in err) == (2, True)
    status, _, err = run("export", trained, tmp_path / "hf", "--format", "huggingface")
    assert (status, "--format huggingface needs --config" in err) == (2, True)
    assert not (tmp_path / "hf").exists()


def test_export_without_the_frozen_parameters(tmp_path, run):
    changes = {"model": {"type": "Net", "frozen": True}}
    saves = {"type": "CheckpointHook", "interval": 7, "save_frozen": False}
    make_runner(tmp_path / "work", default_hooks={"checkpoint": saves}, **changes).train()
    status, _, err = run("export", tmp_path / "work", tmp_path / "a.pth")
    assert (status, "was saved without frozen parameters" in err) == (0, True)
    path = tmp_path / "net.py"
    text = "custom_imports = dict(imports=['parts'])\n"
    path.write_text(text + "\n".join(f"{k} = {v!r}" for k, v in config(tmp_path / "w", **changes).items()))
    assert run("export", tmp_path / "work", tmp_path / "b.pth", "--config", path)[2] == ""
    partial, complete = (torch.load(tmp_path / f"{name}.pth", weights_only=True)["state_dict"] for name in "ab")
    assert set(complete) - set(partial) == {"first.weight", "first.bias"}
    torch.manual_seed(0)
    assert torch.equal(complete["first.weight"], make_runner(tmp_path / "other", **changes).model.first.weight)


def test_export_of_frozen_parameters_from_load_from(trained, tmp_path, run):
    changes = {
        "model": {"type": "Net", "frozen": True},
        "load_from": str(trained / "iter_20.pth"),
        "randomness": {"seed": 77},
    }
    saves = {"type": "CheckpointHook", "interval": 7, "save_frozen": False}
    runner = make_runner(tmp_path / "work", default_hooks={"checkpoint": saves}, **changes)
    runner.train()
    path = tmp_path / "net.py"
    text = "custom_imports = dict(imports=['parts'])\n"
    path.write_text(text + "\n".join(f"{k} = {v!r}" for k, v in config(tmp_path / "w", **changes).items()))
    assert run("export", tmp_path / "work", tmp_path / "b.pth", "--config", path)[2] == ""
    complete = torch.load(tmp_path / "b.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(value, complete[name]) for name, value in runner.model.state_dict().items())
    without = ("export", tmp_path / "work", tmp_path / "c.pth", "--config", path, "--cfg-options", "load_from=None")
    status, _, err = run(*without)
    assert (status, "the 2 frozen parameters of this model are different" in err) == (1, True)
    assert not (tmp_path / "c.pth").exists()


def test_export_of_a_model_that_keeps_its_state_in_its_own_way(tmp_path, run):
    module = tmp_path / "own_state_model.py"
    module.write_text(OWN_STATE)
    changes = {"model": {"type": "RunningNet"}}
    text = "custom_imports = dict(imports=['parts', 'own_state_model'])\n"
    path = tmp_path / "net.py"
    path.write_text(text + "\n".join(f"{k} = {v!r}" for k, v in config(tmp_path / "w", **changes).items()))
    sys.path.insert(0, str(tmp_path))
    try:
        importlib.import_module("own_state_model")
        trained = make_runner(tmp_path / "work", **changes)
        trained.train()
        out = tmp_path / "weights.safetensors"
        assert run("export", tmp_path / "work", out, "--config", path)[0] == 0
    finally:
        sys.path.remove(str(tmp_path))
    found = load_file(out)
    assert found["history"].tolist() == [1.0] * 20
    assert torch.equal(found["total"], trained.model.total)


OWN_STATE = """
import torch
from parts import Net

from mmtrain.registry import MODELS


@MODELS.register_module()
class RunningNet(Net):
    def __init__(self):
        super().__init__()
        self.total = torch.zeros(())
        self.register_buffer("history", torch.empty(0))

    def forward(self, x, y):
        if self.training:
            self.total = self.total + x.sum()
            self.history = torch.cat([self.history, torch.ones(1)])
        return super().forward(x, y)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "total"] = self.total.clone()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.total = state_dict.pop(prefix + "total")
        super()._load_from_state_dict(state_dict, prefix, *args)
"""


def test_averages_that_are_no_tensors_are_refused(trained, tmp_path, run):
    work = Path(shutil.copytree(trained, tmp_path / "work"))
    store = CheckpointStore(work)
    old = store.newest_good()[0]
    state, sections = old.state(), {s: {n: old.read(s, n) for n in old.tensor_names(s)} for s in old.sections()}
    averages = next(one["averages"] for name, one in state.items() if name.startswith("hooks.") and "averages" in one)
    averages[next(iter(averages))] = float("inf")
    store.save(old.name, sections, state=state, rng=old.rng(), blocking=True)
    store.close()
    status, _, err = run("export", work / old.name, tmp_path / "out.safetensors", "--ema")
    assert status == 1
    assert "there is no weight" in err
