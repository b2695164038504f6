import os
import subprocess
import sys
from pathlib import Path

import torch
from ranks import free_port
from ranks_program import whole_values
from safetensors.torch import load_file
from saved_state import hidden

from mmtrain.checkpoint import open_checkpoint

PROGRAM = Path(__file__).parent / "ranks_program.py"


def run_ranks(size: int, *arguments: str) -> None:
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    path = os.pathsep.join([str(PROGRAM.parents[3]), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error::UserWarning:mmtrain", str(PROGRAM), *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * size, "\n".join(errors)


def test_saved_by_two_loaded_by_one_and_three(tmp_path):
    """FSDP2 over gloo; see ranks_program.py for what is checked inside."""
    run_ranks(2, "save", str(tmp_path))
    assert hidden(tmp_path) == []
    assert not (tmp_path / "iter_3.pth").exists()

    expected = whole_values() | {"3.running_mean": torch.ones(1)}
    for name in ("iter_1.pth", "iter_2.pth"):
        checkpoint = open_checkpoint(tmp_path / name)
        assert checkpoint.manifest.world_size == 2
        assert checkpoint.state() == {"rank": 0}
        assert [int(checkpoint.rng(rank)["rank"]) for rank in range(2)] == [0, 1]
        into = {key: torch.full_like(tensor, 9) for key, tensor in expected.items()}
        checkpoint.load("model", into)
        assert all(torch.equal(into[key], expected[key]) for key in expected)
        moments = {key: torch.zeros(expected[key.partition("/")[0]].shape) for key in ("0.weight/exp_avg",)}
        checkpoint.load("optimizer", moments, strict=False)
        assert torch.equal(moments["0.weight/exp_avg"], expected["0.weight"] * 2)
        steps = [key for key in checkpoint.tensor_names("optimizer") if key.endswith("/step")]
        assert [float(checkpoint.read("optimizer", key)) for key in steps]
        writers = {p.file for key in steps for p in checkpoint.tensor_info("optimizer", key).shards}
        assert len(writers) == 2, "full tensors of the optimizer are spread over the ranks"

    shard = load_file(tmp_path / "iter_1.pth" / "model" / "rank_00001_part_00000.safetensors")
    assert torch.equal(shard["0.weight"], expected["0.weight"][4:])
    run_ranks(3, "load", str(tmp_path))
