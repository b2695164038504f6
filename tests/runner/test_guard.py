"""The first NaN or Inf loss is named."""

import pytest
import torch
from parts import make_runner

from mmtrain.errors import RunError
from mmtrain.runner.guards import NonfiniteGuard


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_on_the_cpu_the_run_stops_before_the_update(value):
    guard = NonfiniteGuard("stop", torch.device("cpu"))
    guard.observe(6, torch.tensor(1.0))
    guard.before_update()
    guard.observe(7, torch.tensor(value))
    guard.observe(8, torch.tensor(1.0))
    with pytest.raises(RunError, match=f"iteration 7 is {value}"):
        guard.before_update()


def test_an_accelerator_reports_at_the_check_and_names_the_first():
    guard = NonfiniteGuard("stop", torch.device("cuda"))
    for iteration, value in enumerate([1.0, 2.0, float("nan"), float("inf")], 1):
        guard.observe(iteration, torch.tensor(value, dtype=torch.bfloat16))
        guard.before_update()  # waits for nothing
    with pytest.raises(RunError, match="iteration 3 is nan"):
        guard.check()
    guard.check()  # reported once


def test_skip_leaves_it_to_the_optimizer():
    guard = NonfiniteGuard("skip", torch.device("cpu"))
    guard.observe(1, torch.tensor(float("nan")))
    guard.before_update()
    guard.check()


def test_a_parameter_that_is_unfrozen_later_is_reported(tmp_path):
    """The optimizer does not have it: it would keep its value, and no loss would show it."""

    class Unfreeze:
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            runner.model.first.requires_grad_(runner.iter >= 4)

    with pytest.raises(RunError, match=r"first\.weight was frozen when the optimizer was made"):
        make_runner(tmp_path, model={"frozen": True}, custom_hooks=[Unfreeze()]).train()


def test_a_parameter_that_the_optimizer_holds_may_be_frozen_and_unfrozen(tmp_path):
    class Freeze:
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            runner.model.first.requires_grad_(runner.iter >= 4)

    make_runner(tmp_path, custom_hooks=[Freeze()]).train()
