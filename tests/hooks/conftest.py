from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmtrain.progress import Progress
from mmtrain.types import StepResult


class Recorder:
    """A logger and a writer that record what they get."""

    def __init__(self):
        self.infos, self.warnings, self.lines, self.flushes = [], [], [], 0

    def info(self, message, *arguments):
        self.infos.append(message % arguments if arguments else message)

    def warning(self, message, *arguments):
        self.warnings.append(message % arguments if arguments else message)

    def write(self, scalars, step, *, kind="train", text=None):
        self.lines.append((kind, step, dict(scalars), text))

    def flush(self):
        self.flushes += 1


class FakeRunner(SimpleNamespace):
    """The attributes of a runner that hooks may use, and a loop reduced to counting."""

    def __init__(self, tmp_path, *, model=None, per_epoch=5, max_epochs=4, by_epoch=True):
        from mmtrain.logging import Scalars
        from mmtrain.runner.hook_points import HookList

        recorder = Recorder()
        super().__init__(
            cfg={}, work_dir=str(tmp_path / "work"), log_dir=str(tmp_path / "work" / "20260101_000000"),
            timestamp="20260101_000000", experiment_name="exp", logger=recorder, writers=[recorder], recorder=recorder,
            model=model if model is not None else nn.Linear(2, 2), device=torch.device("cpu"), rank=0, world_size=1,
            scalars=Scalars(), progress=Progress(), iter=0, epoch=0, iterations_per_epoch=per_epoch,
            max_epochs=max_epochs if by_epoch else None, max_iters=per_epoch * max_epochs, update_result=None,
            optim_wrapper=SimpleNamespace(param_groups=[{"lr": 0.1}]), val_dataloader=range(20),
            test_dataloader=range(7), stops=[], hooks=HookList([]),
        )  # fmt: skip
        self.train_loop = SimpleNamespace(by_epoch=by_epoch)
        self.checkpointer = SimpleNamespace(failure=None)

    @property
    def strategy(self):
        from mmtrain.strategies import SingleDeviceStrategy

        found = SingleDeviceStrategy()
        found.model = self.model
        return found

    def set_schedule(self):
        """Nothing is scheduled, unless a test puts a function here."""

    def request_stop(self, reason, *, for_good=False):
        self.stops.append(reason)

    def step(self, *hooks, applied=True, last=True, samples=2, outputs=None):
        """One iteration: the position moves as the loop moves it, then ``after_train_iter`` of the hooks."""
        progress = self.progress
        self.iter, self.epoch = progress.iteration, progress.epoch
        index = progress.epoch_iteration
        for hook in hooks:
            hook.before_train_iter(self, batch_idx=index, data_batch=None)
        epoch_end = index + 1 == self.iterations_per_epoch
        progress.advance(samples, epoch_end=epoch_end)
        self.set_schedule()
        self.update_result = StepResult(None, applied) if last else None
        for hook in hooks:
            hook.after_train_iter(self, batch_idx=index, data_batch=None, outputs=outputs)
        if epoch_end:
            for hook in hooks:
                hook.after_train_epoch(self)


@pytest.fixture
def make_runner(tmp_path):
    def make(**options):
        return FakeRunner(tmp_path, **options)

    return make
