"""The directory that DeepSpeed's engine leaves inside mmtrain's transaction: what is in it, what reads it, what damages it."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import parts
import pytest
import strategy_parts
import torch
from parts import logged
from ranks import RankError
from safetensors.torch import load_file

from mmtrain.checkpoint import CheckpointStore, load_weights
from mmtrain.checkpoint.format import manifest
from mmtrain.cli.checkpoint import main
from mmtrain.errors import CheckpointError
from mmtrain.files import hash_file
from mmtrain.runner import FlexibleRunner
from mmtrain.strategies.zero import library, universal

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is optional and not installed")
SHARDS = [f"zero_pp_rank_{rank}_mp_rank_00" for rank in range(2)]
FILES = {
    2: ["mp_rank_00_model_states.pt", *(f"{shard}_optim_states.pt" for shard in SHARDS)],
    3: [f"{shard}_{kind}_states.pt" for shard in SHARDS for kind in ("model", "optim")],
}


def zero(stage, **options):
    return {"type": "DeepSpeedStrategy", "zero_optimization": {"stage": stage}, **options}


@pytest.fixture(scope="module")
def made(pair, tmp_path_factory):
    """Work dirs with iter_14.pth and iter_28.pth, by stage."""
    folder = tmp_path_factory.mktemp("made")
    for stage in FILES:
        options = {"work_dir": str(folder / str(stage)), "world": 2, "strategy": zero(stage), "iterations": 28}
        pair.run("strategy_parts", "train", **options)
    return folder


@pytest.fixture(params=FILES)
def stage(request):
    return request.param


@pytest.fixture
def work(made, tmp_path, stage):
    """A copy that may be damaged."""
    return Path(shutil.copytree(made / str(stage), tmp_path / "work"))


def newest(work):
    checkpoint, problems = CheckpointStore(work).newest_good()
    return checkpoint, [str(problem) for problem in problems]


def test_names_are_deepspeeds_and_nothing_is_written_twice(work, stage):
    checkpoint, problems = newest(work)
    assert problems == []
    listed = [name for name in checkpoint.manifest.files if name.endswith(".pt")]
    assert sorted(listed) == sorted(FILES[stage])
    assert checkpoint.tensor_names("model") == checkpoint.tensor_names("optimizer") == []
    assert [path.name for path in work.iterdir() if path.suffix == ".py"] == []
    native = checkpoint.manifest.meta["native"]
    assert {key: native[key] for key in ("format", "world", "stage", "dtype", "frozen")} == {
        "format": "deepspeed", "world": 2, "stage": stage, "dtype": "float32", "frozen": True,
    }  # fmt: skip


def test_in_bfloat16_the_names_say_so(pair, tmp_path):
    strategy = zero(1, bf16={"enabled": True}, exclude_frozen_parameters=True)
    pair.run("strategy_parts", "train", work_dir=str(tmp_path), world=2, strategy=strategy, iterations=14)
    names = {path.name for path in (tmp_path / "iter_14.pth").glob("*.pt")}
    assert names == {"mp_rank_00_model_states.pt", *(f"bf16_{shard}_optim_states.pt" for shard in SHARDS)}
    weights = load_weights(tmp_path / "iter_14.pth").tensors
    assert "frozen.weight" not in weights
    assert weights["blocks.0.up.weight"].dtype == torch.float32, "the masters, not what they were rounded to"
    pair.run("strategy_parts", "train", work_dir=str(tmp_path), world=2, strategy=strategy, iterations=16)


# ---- damage ----------------------------------------------------------------------------------------------------------
def test_a_flipped_bit_in_any_file_is_found(work, stage):
    for name in FILES[stage]:
        path = work / "iter_28.pth" / name
        before = path.read_bytes()
        data = bytearray(before)
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        checkpoint, problems = newest(work)
        assert checkpoint.name == "iter_14.pth"
        assert name in problems[0]
        path.write_bytes(before)


def test_a_damaged_one_is_skipped_in_a_resume(pair, work, stage):
    path = work / "iter_28.pth" / FILES[stage][-1]
    path.write_bytes(path.read_bytes()[:-7])
    options = {"work_dir": str(work), "world": 2, "strategy": zero(stage), "iterations": 30}
    pair.run("strategy_parts", "train", **options)
    assert newest(work)[0].name == "iter_30.pth"


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", [3, pytest.param(2, marks=pytest.mark.slow)], indirect=True)
def test_a_rank_with_a_full_disk_fails_the_save_and_not_the_run(pair, tmp_path, stage, rank):
    options = {"work_dir": str(tmp_path), "strategy": zero(stage), "iterations": 28}
    results = pair.run("strategy_jobs", "train_with_a_full_disk", fails_on=rank, **options)
    assert results[0] == results[1]
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_28.pth"]
    assert newest(tmp_path)[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_save_does_not_change_results(pair, made, tmp_path, stage):
    options = {"work_dir": str(tmp_path), "world": 2, "strategy": zero(stage), "iterations": 28}
    pair.run("strategy_parts", "train", **options, default_hooks={
        "logger": {"type": "LoggerHook", "interval": 1}, "checkpoint": {"type": "CheckpointHook", "interval": 1000},
    })  # fmt: skip
    assert logged(tmp_path, "loss", "grad_norm") == logged(made / str(stage), "loss", "grad_norm")


class Payload:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def poison(work, name, marker):
    """Put code into a file, and its hash into the manifest, as an attacker would."""
    folder = work / "iter_28.pth"
    contents = torch.load(folder / name, weights_only=False)
    torch.save({**contents, "extra": Payload(marker)}, folder / name)
    found = manifest.decode((folder / "manifest.json").read_bytes())
    found.files[name] = manifest.FileRecord((folder / name).stat().st_size, hash_file(folder / name))
    (folder / "manifest.json").write_bytes(manifest.encode(found))


@pytest.mark.parametrize("stage", [2], indirect=True)
def test_code_in_a_file_is_refused_and_does_not_run(pair, work, tmp_path, stage):
    library.load()
    marker = tmp_path / "ran"
    poison(work, "mp_rank_00_model_states.pt", marker)
    options = {"work_dir": str(work), "iterations": 30}
    with pytest.raises(RankError, match="CheckpointError: .*iter_28.pth: refused because it may contain code"):
        pair.run("strategy_parts", "train", world=2, strategy=zero(2), **options)
    with pytest.raises(CheckpointError, match="refused because it may contain code; nothing in it was run"):
        strategy_parts.train(**options, world=1)
    with pytest.raises(CheckpointError, match="refused, it contains code"):
        load_weights(work / "iter_28.pth")
    assert not marker.exists()


# ---- reading it elsewhere --------------------------------------------------------------------------------------------
def test_the_loaded_weights_are_the_masters(work):
    path = work / "iter_28.pth"
    library.load()
    with universal.opened(path, newest(work)[0].manifest.meta["native"], room=work) as source:
        expected = {name: source.read("model", name) for name in source.tensor_names("model")}
    found = load_weights(path)
    assert "ZeRO" in found.kind
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], expected[name]) for name in expected)
    assert found.tensors["head.weight"] is found.tensors["embed.weight"]


def test_a_missing_file_of_a_rank_is_reported(work, stage):
    (work / "iter_28.pth" / FILES[stage][-1]).unlink()
    with pytest.raises(CheckpointError, match=FILES[stage][-1]):
        load_weights(work / "iter_28.pth")
    (work / "iter_28.pth" / "manifest.json").unlink()  # as DeepSpeed alone would leave it
    with pytest.raises(CheckpointError, match="written by 2 ranks, but has files of 1"):
        load_weights(work / "iter_28.pth")


def test_the_command_line_reads_it(work, tmp_path, capsys):
    store = str(work)
    assert main(["list", store]) == 0
    assert main(["show", str(work / "iter_28.pth")]) == 0
    assert "weights and optimizer state in" in capsys.readouterr().out
    assert main(["verify", store]) == 0
    assert main(["verify", str(work / "iter_28.pth")]) == 0
    assert main(["diff", str(work / "iter_28.pth"), str(work / "iter_28.pth")]) == 0
    assert "DeepSpeed's files" in capsys.readouterr().out
    assert main(["diff", str(work / "iter_14.pth"), str(work / "iter_28.pth")]) == 1
    assert main(["export", str(work / "iter_28.pth"), str(tmp_path / "weights.safetensors")]) == 0
    exported = load_file(tmp_path / "weights.safetensors")
    expected = load_weights(work / "iter_28.pth").tensors
    assert all(torch.equal(exported[name], expected[name]) for name in exported)
    assert len(exported) in (len(expected), len(expected) - 1)  # tied names are written once


def test_evaluation_takes_its_weights_and_needs_no_engine(work):
    from mmengine.config import Config

    expected = load_weights(work / "iter_28.pth").tensors
    found = []
    for strategy in (None, zero(3)):
        changes = {**strategy_parts.changes(1, strategy), "load_from": str(work / "iter_28.pth")}
        runner = FlexibleRunner.from_cfg(Config(parts.config(work / f"value_{len(found)}", **changes)), task="val")
        found.append(runner.val())
        assert all(torch.equal(value, expected[name]) for name, value in runner.model.state_dict().items())
    assert found[0] == found[1]


# ---- the converter ---------------------------------------------------------------------------------------------------
def converted_folders(work):
    return [path.name for path in work.iterdir() if path.name.startswith(universal.PREFIX)]


@pytest.mark.parametrize("stage", [2], indirect=True)
@pytest.mark.parametrize("variable", ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"])
def test_torchs_variables_about_pickles_change_nothing(work, tmp_path, monkeypatch, variable):
    """The first is a common remedy for files of MMEngine; nothing in a file is run all the same."""
    monkeypatch.setenv(variable, "1")
    checkpoint = newest(work)[0]
    with universal.opened(checkpoint.path, checkpoint.manifest.meta["native"], room=tmp_path) as source:
        names = source.tensor_names("model")
        assert torch.equal(source.read("model", names[0]), load_weights(checkpoint.path).tensors[names[0]])
    torch.save(newest, tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match="nothing in it was run"), library.plain_files("file"):
        torch.load(tmp_path / "code.pt", weights_only=False)
    assert os.environ[variable] == "1"


def test_a_full_disk_while_converting_damages_nothing(work, monkeypatch):
    library.load()
    from deepspeed.checkpoint import ds_to_universal

    def full(args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ds_to_universal, "main", full)
    with pytest.raises(CheckpointError, match="cannot be converted in .*No space left on device"):
        strategy_parts.train(str(work), world=1, iterations=30)
    assert converted_folders(work) == []
    assert newest(work)[1] == []


@pytest.mark.parametrize("stage", [2], indirect=True)
def test_leftovers_of_a_killed_conversion_are_removed_at_the_next_start(work):
    (work / f"{universal.PREFIX}iter_28.pth-0").mkdir()
    strategy_parts.train(str(work), world=1, iterations=30)
    assert converted_folders(work) == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_moments_that_the_universal_format_drops_are_refused(pair, tmp_path, stage):
    changes = {
        "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}}, "iterations": 14,
        "work_dir": str(tmp_path),
    }  # fmt: skip
    pair.run("strategy_parts", "train", world=2, strategy=zero(stage), **changes)
    with pytest.raises(CheckpointError, match="momentum_buffer.*takes Adam's exp_avg and exp_avg_sq alone"):
        strategy_parts.train(**{**changes, "iterations": 20}, world=1)
    pair.run("strategy_parts", "train", world=2, strategy=zero(stage), **{**changes, "iterations": 20})


@pytest.mark.slow
def test_round_robin_is_resumed_as_it_is_and_refused_elsewhere(pair, tmp_path):
    """DeepSpeed's converter gives parameters the values of others then, so it must not be used."""
    strategy = {"type": "DeepSpeedStrategy", "zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    options = {"strategy": strategy, "work_dir": str(tmp_path), "world": 2}
    pair.run("strategy_parts", "train", **options, iterations=14)
    path = tmp_path / "iter_14.pth"
    module = torch.load(path / FILES[2][0], weights_only=True)["module"]
    weights = load_weights(path).tensors
    assert all(torch.equal(weights[name], module[name]) for name in module)
    with pytest.raises(CheckpointError, match="round_robin_gradients"):
        strategy_parts.train(str(tmp_path), world=1, iterations=20)
    pair.run("strategy_parts", "train", **options, iterations=20)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"round_robin_gradients": True}, {"parameter_alignment": True}, {"stage": 3}])
def test_masters_are_found_by_name(pair, tmp_path, options):
    strategy = {"type": "DeepSpeedStrategy", "zero_optimization": {"stage": 2, **options}}
    for result in pair.run("strategy_jobs", "changed_by_state_round_trip", work_dir=str(tmp_path), strategy=strategy):
        assert result == []


def test_one_process_of_zero_continues_from_two(work, stage):
    strategy_parts.train(str(work), world=1, strategy=zero(2), iterations=30)
    assert newest(work)[0].manifest.meta["native"]["world"] == 1
    assert converted_folders(work) == []
