"""What is collective, run by two real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import json, os, sys
from types import SimpleNamespace
import torch
from mmengine.evaluator import BaseMetric
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from mmtrain import dist
from mmtrain.evaluation import Evaluator
from mmtrain.hooks import EMAHook
from mmtrain.hooks.memory import average_buffers
from mmtrain.strategies import SingleDeviceStrategy
from mmtrain.logging import Scalars
from mmtrain.progress import Progress
from mmtrain.types import StepResult

dist.init("gloo")
rank, found = dist.rank(), {}

scalars = Scalars()
reader, slow = scalars.reader("a"), scalars.reader("b")
scalars.record("loss", torch.tensor(0.25))
reader.read()
scalars.record("loss", torch.tensor(1.0 + rank))
scalars.record("memory", 100 * (rank + 1))
if rank == 1:
    scalars.record("only", 7.0)
state = scalars.state_dict()
found["means"] = reader.read(), slow.read()
restored = Scalars()
restored.load_state_dict(json.loads(json.dumps(state)))
found["restored"] = [restored.reader(name).read() for name in "ab"]


class Right(BaseMetric):
    default_prefix = "m"

    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        return {"order": results}


evaluator = Evaluator(Right())
evaluator.process(data_samples=[0, 2, 4] if rank == 0 else [1, 3])
found["metrics"] = evaluator.evaluate(5)

norm = torch.nn.BatchNorm1d(2)
norm.running_mean.fill_(rank)
average_buffers(norm)
found["buffers"] = [norm.running_mean.tolist(), norm.running_var.tolist(), norm.num_batches_tracked.item()]

mesh = init_device_mesh("cpu", (2,))
model = torch.nn.Linear(2, 4, bias=False)
model.weight = torch.nn.Parameter(distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)]))
hook = EMAHook(momentum=0.25)
hook.load_state_dict({"steps": 3, "averages": {"weight": torch.arange(8.0).view(4, 2)}})
strategy = SingleDeviceStrategy()
strategy.model = model
runner = SimpleNamespace(
    model=model, strategy=strategy, max_iters=9, max_epochs=1, update_result=StepResult(None), iter=0, epoch=0
)
hook.before_train(runner)
hook.after_train_iter(runner, batch_idx=0)
found["ema"] = hook.averages["weight"].full_tensor().tolist()
hook.before_val_epoch(runner)
found["val"] = model.weight.full_tensor().tolist()
hook.after_val_epoch(runner, metrics={})
found["after"] = model.weight.full_tensor().abs().sum().item()

with open(sys.argv[1], "w") as file:
    json.dump(found, file)
dist.barrier()
dist.shutdown()
os._exit(0)  # gloo's threads now and then abort the interpreter's own way out
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    port = free_port()
    workers = []
    for rank in range(2):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        command = [sys.executable, "-c", WORKER, str(folder / f"{rank}.json")]
        workers.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_all_ranks_have_the_same(found):
    assert found[0] == found[1]


def test_scalars_are_means_over_ranks_and_maxima_maxima(found):
    means = {"loss": 1.5, "memory": 200.0, "only": 7.0}
    assert found[0]["means"] == [means, {**means, "loss": (0.625 + 1.125) / 2}]


def test_scalars_of_every_rank_survive_a_restart(found):
    assert found[0]["restored"] == found[0]["means"]


def test_a_metric_sees_every_sample_of_uneven_ranks_once(found):
    assert found[0]["metrics"] == {"m/order": [0, 1, 2, 3, 4]}


def test_buffers_are_averaged(found):
    assert found[0]["buffers"] == [[0.5, 0.5], [1.0, 1.0], 0]


def test_sharded_weights_are_averaged_and_swapped(found):
    assert found[0]["ema"] == [[0.0, 0.75], [1.5, 2.25], [3.0, 3.75], [4.5, 5.25]]
    assert found[0]["val"] == found[0]["ema"]
    assert found[0]["after"] == 0.0
