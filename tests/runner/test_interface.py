"""What hooks may use of a runner: the Protocol, the real runner and the documentation agree."""

from pathlib import Path

from parts import make_runner

from mmtrain.runner import FlexibleRunner, Runner
from mmtrain.runner.interface import CheckpointerView, EvaluationLoopView, TrainLoopView


def names(protocol):
    """The public names of a Protocol: its annotations, properties and methods."""
    return {name for name in {*protocol.__annotations__, *vars(protocol)} if not name.startswith("_")}


def test_the_runner_has_every_name_of_its_protocol(tmp_path):
    runner = make_runner(tmp_path)
    assert isinstance(runner, FlexibleRunner)
    for part, protocol in (
        (runner, Runner),
        (runner.train_loop, TrainLoopView),
        (runner.val_loop, EvaluationLoopView),
        (runner.checkpointer, CheckpointerView),
    ):
        assert names(protocol) <= {*dir(part)}, protocol.__name__
    assert {"request_save", "request_stop", "progress", "optim_wrapper", "max_iters"} <= names(Runner)
    runner.release()


def test_a_hook_sees_these_names_while_training(tmp_path):
    seen = {}

    class Look:
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            seen.update({name: getattr(runner, name) for name in names(Runner)})

    make_runner(tmp_path, custom_hooks=[Look()], train_cfg={"max_iters": 2}).train()
    assert seen["iter"] == 1
    assert seen["max_iters"] == 2
    assert seen["train_loop"].finished
    assert Path(seen["work_dir"]) == tmp_path
