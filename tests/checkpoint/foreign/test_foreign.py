import builtins
import collections
import functools
import http.server
import json
import os
import pickle
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mmtrain.checkpoint import CheckpointStore, load_weights
from mmtrain.errors import CheckpointError

STATE = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2).bfloat16()}


def assert_state(weights, kind=None):
    assert weights.tensors.keys() == STATE.keys()
    assert all(torch.equal(weights.tensors[name], STATE[name]) for name in STATE)
    assert kind is None or weights.kind == kind


@pytest.fixture(params=["zip", "legacy"])
def save(request):
    return functools.partial(torch.save, _use_new_zipfile_serialization=request.param == "zip")


def mmengine_file() -> dict:
    from mmengine.logging import HistoryBuffer

    history = HistoryBuffer([1.0, 2.0], [1, 1])
    scalars = collections.OrderedDict({"train/loss": history})
    message_hub = {"log_scalars": scalars, "runtime_info": {"iter": np.int64(3), "seen": collections.defaultdict(list)}}
    return {
        "meta": {"epoch": 1, "cfg": "x=1"},
        "state_dict": collections.OrderedDict(STATE),
        "message_hub": message_hub,
    }


def test_mmengine(tmp_path, save):
    save(mmengine_file(), tmp_path / "epoch_1.pth")
    weights = load_weights(tmp_path / "epoch_1.pth")
    assert_state(weights, "MMEngine checkpoint")
    assert "mmengine.logging.history_buffer.HistoryBuffer" in weights.ignored


@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "module", "model_state_dict"])
def test_state_dicts(tmp_path, save, wrap):
    state = {f"module.{name}": tensor for name, tensor in STATE.items()}
    save({wrap: state, "epoch": 3} if wrap else {**state, "version": 2}, tmp_path / "a.pth")
    assert_state(load_weights(tmp_path / "a.pth"))


def test_parameters_and_shared_memory(tmp_path, save):
    model = nn.Linear(3, 3)
    save({"a": model.weight, "b": model.weight, "row": model.weight[1]}, tmp_path / "a.pth")
    tensors = load_weights(tmp_path / "a.pth").tensors
    assert torch.equal(tensors["a"], model.weight)
    assert torch.equal(tensors["row"], model.weight[1])


def test_checkpoints_of_mmtrain(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save("iter_1.pth", {"model": STATE, "ema": {"w": torch.zeros(1)}}, blocking=True)
    store.close()
    assert_state(load_weights(tmp_path / "iter_1.pth"), "mmtrain checkpoint")
    assert load_weights(tmp_path / "iter_1.pth", section="ema").tensors.keys() == {"w"}
    (file,) = (tmp_path / "iter_1.pth" / "model").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=file.name):
        load_weights(tmp_path / "iter_1.pth")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("sharded", [False, True])
def test_hugging_face(tmp_path, ending, sharded):
    stem = "model" if ending == "safetensors" else "pytorch_model"
    write = save_file if ending == "safetensors" else torch.save
    if sharded:
        names = {name: f"{stem}-{i}.{ending}" for i, name in enumerate(STATE)}
        for name, file in names.items():
            write({name: STATE[name]}, tmp_path / file)
        (tmp_path / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": names}))
    else:
        write(STATE, tmp_path / f"{stem}.{ending}")
    (tmp_path / "config.json").write_text("{}")
    assert_state(load_weights(tmp_path), "Hugging Face directory")
    if sharded:
        assert_state(load_weights(tmp_path / f"{stem}.{ending}.index.json"), "sharded weights")
        (tmp_path / f"{stem}-1.{ending}").unlink()
        with pytest.raises(CheckpointError, match=rf"{stem}-1\.{ending}: missing"):
            load_weights(tmp_path)
    else:
        assert_state(load_weights(tmp_path / f"{stem}.{ending}"))


def test_deepspeed(tmp_path, save):
    (tmp_path / "global_step5").mkdir()
    (tmp_path / "latest").write_text("global_step5")
    save(
        {"module": STATE, "dp_world_size": 2, "optimizer": None},
        tmp_path / "global_step5" / "mp_rank_00_model_states.pt",
    )
    assert_state(load_weights(tmp_path), "DeepSpeed directory")
    assert_state(load_weights(tmp_path / "global_step5"), "DeepSpeed directory")
    (tmp_path / "global_step5" / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"zero_to_fp32\.py"):
        load_weights(tmp_path)


def test_urls(tmp_path):
    save_file(STATE, tmp_path / "a b.safetensors")
    assert_state(load_weights((tmp_path / "a b.safetensors").as_uri()))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.func.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            assert_state(load_weights(f"{address}/a%20b.safetensors"))
            with pytest.raises(CheckpointError, match=r"gone.pth: cannot be downloaded .*404"):
                load_weights(f"{address}/gone.pth")
        finally:
            server.shutdown()
            thread.join()


def test_fsspec_urls(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    save_file(STATE, tmp_path / "model.safetensors")
    with fsspec.open("memory://bucket/run/model.safetensors", "wb") as file:
        file.write((tmp_path / "model.safetensors").read_bytes())
    assert_state(load_weights("memory://bucket/run/model.safetensors"))
    assert_state(load_weights("memory://bucket/run"), "Hugging Face directory")
    for address in ("memory://bucket/gone.pth", "nonsense://x"):
        with pytest.raises(CheckpointError, match="cannot be fetched"):
            load_weights(address)


def test_files_without_weights_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.pth").write_bytes(b"junk")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "junk.index.json").write_text("[]")
    (tmp_path / "out.index.json").write_text(json.dumps({"weight_map": {"w": "../x"}}))
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "nothing.pth")
    torch.save({0: torch.ones(2)}, tmp_path / "numbered.pth")
    torch.save({"w": torch.eye(2).to_sparse()}, tmp_path / "sparse.pth")
    (tmp_path / "blank.pth").touch()
    for name, reason in {
        "gone.pth": "no such file",
        "empty": "no weights of a known kind",
        "junk.pth": "cannot be read as weights",
        "junk.safetensors": "cannot be read as safetensors",
        "junk.index.json": "not an index",
        "out.index.json": "is not a file beside it",
        "list.pth": "expected a dict of tensors, found a list",
        "nothing.pth": "no tensors by name",
        "numbered.pth": "no tensors by name",
        "sparse.pth": "'w' is a sparse tensor",
        "blank.pth": "it is empty",
    }.items():
        with pytest.raises(CheckpointError, match=f"{name}.*{reason}"):
            load_weights(tmp_path / name)


# ---- no code in a file is ever run


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


PLACES = {
    "top": lambda evil: evil,
    "beside": lambda evil: {"state_dict": STATE, "meta": {"hook": [evil]}},
    "inside": lambda evil: {"state_dict": {**STATE, "x": evil}},
    "message_hub": lambda evil: {**mmengine_file(), "message_hub": {"log_scalars": evil}},
    "module": lambda evil: {"module": STATE, "optimizer": evil},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_malicious_pickle_runs_no_code(tmp_path, save, place):
    marker = tmp_path / "ran"
    evils = [
        (os.system, f"touch {marker}"),
        (builtins.eval, f"open({str(marker)!r}, 'w')"),
        (builtins.exec, f"open({str(marker)!r}, 'w')"),
        (os.mkdir, str(marker)),
        (torch.hub.load, "x", "y"),
        (pickle.loads, b"x"),
        (__import__, "antigravity"),
    ]
    targets = ["a.pth", "mp_rank_00_model_states.pt", "pytorch_model.bin"]
    for number, (function, *arguments) in enumerate(evils):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        file = folder / targets[number % 3]
        save(PLACES[place](Malicious(function, *arguments)), file)
        with pytest.raises(CheckpointError, match=rf"{file.name}: refused, it contains code.*{function.__name__}"):
            load_weights(folder if number % 3 else file)
        assert not marker.exists()


def test_a_pickled_model_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"contains code.*torch\.nn\.modules\.linear\.Linear"):
        load_weights(tmp_path / "model.pth")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(CheckpointError, match="TorchScript"):
        load_weights(tmp_path / "script.pt")


def test_classes_of_other_packages_are_never_imported(tmp_path, monkeypatch):
    (tmp_path / "evil_package.py").write_text("class Config:\n    def __setstate__(self, s): raise SystemExit\n")
    monkeypatch.syspath_prepend(tmp_path)
    import evil_package

    config = evil_package.Config()
    config.x = 1
    torch.save({"state_dict": STATE, "cfg": config}, tmp_path / "a.pth")
    monkeypatch.delitem(__import__("sys").modules, "evil_package")
    weights = load_weights(tmp_path / "a.pth")
    assert_state(weights)
    assert weights.ignored == ["evil_package.Config"]
    assert "evil_package" not in __import__("sys").modules
