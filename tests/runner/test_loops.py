"""The train loop: its order, its windows, its units and its ends."""

import pytest
import torch
from parts import Journal, Net, NoisyPoints, logged, make_runner
from torch import nn

from mmtrain.errors import ConfigError, RunError
from mmtrain.randomness import STREAM_BUILD, mix, seed_generators
from mmtrain.runner.train_schedule import TrainSchedule


class Plain(nn.Module):
    """No dropout and no batch norm: what it learns depends only on the data and the mathematics."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(6, 2)

    def forward(self, x, y):
        return {"loss": nn.functional.cross_entropy(self.line(x), y)}


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_hooks_run_in_the_order_of_the_loop(tmp_path):
    journal = Journal()
    make_runner(
        tmp_path,
        train_cfg={"by_epoch": True, "max_iters": None, "max_epochs": 2, "val_interval": 2},
        train_dataloader={"batch_size": 22},
        custom_hooks=[journal],
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1, "by_epoch": True, "async_save": False}},
    ).train()
    assert journal.lines == [
        "before_run",
        "before_train",
        "before_train_epoch 0",
        "before_train_iter 0 0",
        "after_train_iter 0 0",
        "before_train_iter 1 1",
        "after_train_iter 1 1",
        "after_train_epoch 0",
        "after_save_checkpoint epoch_1.pth",
        "before_train_epoch 1",
        "before_train_iter 2 0",
        "after_train_iter 2 0",
        "before_train_iter 3 1",
        "after_train_iter 3 1",
        "after_train_epoch 1",
        "after_val_epoch 3 ['accuracy', 'loss']",
        "after_save_checkpoint epoch_2.pth",
        "after_train",
        "after_run",
    ]


def test_epochs_and_iterations_are_one_loop(tmp_path):
    # 44 samples in batches of 8: 6 iterations per epoch.
    by_iter = make_runner(tmp_path / "iter", train_cfg={"max_iters": 12}).train()
    by_epoch = make_runner(tmp_path / "epoch", train_cfg={"by_epoch": True, "max_iters": None, "max_epochs": 2}).train()
    assert torch.equal(weights(by_iter), weights(by_epoch))
    assert logged(tmp_path / "iter", "loss", "lr") == logged(tmp_path / "epoch", "loss", "lr")


def test_the_mathematics_are_those_of_a_bare_loop(tmp_path):
    """Same data, same seed: bit-identical to a loop written by hand."""
    model = make_runner(
        tmp_path,
        model=Plain(),
        train_dataloader={"dataset": NoisyPoints(augment=False), "shuffle": False, "drop_last": True},
        train_cfg={"max_iters": 15},
    ).train()

    torch.manual_seed(0)
    bare = Plain()
    bare.load_state_dict(make_runner(tmp_path / "fresh", model=_fresh(), train_cfg={"max_iters": 1}).model.state_dict())
    optimizer = torch.optim.AdamW(bare.parameters(), lr=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 15)
    data = NoisyPoints(augment=False)
    for iteration in range(15):
        start = (iteration % 5) * 8
        loss = bare(data.x[start : start + 8], data.y[start : start + 8])["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert torch.allclose(weights(model), weights(bare), rtol=1e-6, atol=1e-7)


def _fresh():
    seed_generators(mix(STREAM_BUILD, 5))
    return Plain()


@pytest.fixture(autouse=True)
def _same_start():
    seed_generators(mix(STREAM_BUILD, 5))


def test_accumulation_equals_one_big_batch(tmp_path):
    data = {"dataset": NoisyPoints(size=48, augment=False), "shuffle": False}
    sgd = {"optimizer": {"type": "SGD", "lr": 0.1}}
    big = make_runner(
        tmp_path / "big", model=_fresh(), param_scheduler=None, optim_wrapper=sgd,
        train_dataloader={**data, "batch_size": 24}, train_cfg={"max_iters": 4},
    ).train()  # fmt: skip
    small = make_runner(
        tmp_path / "small", model=_fresh(), param_scheduler=None, optim_wrapper={**sgd, "accumulative_counts": 3},
        train_dataloader={**data, "batch_size": 8}, train_cfg={"max_iters": 12},
    ).train()  # fmt: skip
    assert torch.allclose(weights(big), weights(small), rtol=1e-6, atol=1e-7)


def test_the_last_window_is_divided_by_its_true_length(tmp_path):
    data = {"dataset": NoisyPoints(size=48, augment=False), "shuffle": False, "batch_size": 8}
    sgd = {"optimizer": {"type": "SGD", "lr": 0.1}}
    runner = make_runner(
        tmp_path / "a", model=_fresh(), param_scheduler=None, optim_wrapper={**sgd, "accumulative_counts": 4},
        train_dataloader=data, train_cfg={"max_iters": 6},
    )  # fmt: skip
    model = runner.train()
    assert runner.progress.update == 2
    points, bare = NoisyPoints(size=48, augment=False), _fresh()
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1)
    for begin, end in ((0, 32), (32, 48)):
        bare(points.x[begin:end], points.y[begin:end])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.allclose(weights(model), weights(bare), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("flush", "updates"), [(False, [4, 8, 12]), (True, [4, 6, 10, 12])])
def test_windows_span_epochs_unless_flushed(tmp_path, flush, updates):
    seen = []

    class Updates:
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.update_result is not None:
                seen.append(runner.iter + 1)

    make_runner(
        tmp_path, optim_wrapper={"accumulative_counts": 4}, custom_hooks=[Updates()],
        train_cfg={"by_epoch": True, "max_iters": None, "max_epochs": 2, "flush_at_epoch_end": flush},
    ).train()  # fmt: skip
    assert seen == updates


def test_a_save_inside_a_window_is_taken_at_its_end(tmp_path):
    journal = Journal()
    make_runner(
        tmp_path, optim_wrapper={"accumulative_counts": 4}, train_cfg={"max_iters": 12}, custom_hooks=[journal],
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 5}},
    ).train()  # fmt: skip
    assert [line.split()[1] for line in journal.lines if line.startswith("after_save")] == ["iter_8.pth", "iter_12.pth"]


def test_a_run_stops_at_the_end_of_a_window_and_saves(tmp_path):
    class Stopper:
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter == 4:
                runner.request_stop("enough")

    runner = make_runner(
        tmp_path, optim_wrapper={"accumulative_counts": 4}, custom_hooks=[Stopper()],
        default_hooks={"checkpoint": {"type": "CheckpointHook"}},
    )  # fmt: skip
    runner.train()
    assert runner.progress.iteration == 8
    assert (tmp_path / "iter_8.pth" / "manifest.json").exists()


def test_dropout_is_a_function_of_the_iteration(tmp_path):
    """A hook that draws random numbers changes nothing."""

    class Draws:
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            torch.randn(17)

    plain = make_runner(tmp_path / "a", model=_net()).train()
    drawn = make_runner(tmp_path / "b", model=_net(), custom_hooks=[Draws()]).train()
    assert torch.equal(weights(plain), weights(drawn))


def _net():
    seed_generators(1)
    return Net()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(tmp_path, workers):
    alone = make_runner(tmp_path / "0", train_dataloader={"num_workers": 0}).train()
    helped = make_runner(tmp_path / "n", train_dataloader={"num_workers": workers}).train()
    assert torch.equal(weights(alone), weights(helped))
    assert logged(tmp_path / "0", "loss") == logged(tmp_path / "n", "loss")


def test_validation_does_not_disturb_training(tmp_path):
    often = make_runner(tmp_path / "often", train_cfg={"val_interval": 1}).train()
    never = make_runner(tmp_path / "never", val_dataloader=None).train()
    assert torch.equal(weights(often), weights(never))
    assert list(logged(tmp_path / "often", "loss", mode="val")) == list(range(1, 21))


@pytest.mark.parametrize("batch_size", [8, 11])
def test_the_validation_loss_is_the_mean_over_samples(tmp_path, batch_size):
    runner = make_runner(tmp_path, val_dataloader={"batch_size": batch_size})
    runner.train()
    data = NoisyPoints(size=20, augment=False)
    runner.model.eval()
    with torch.no_grad():
        expected = runner.model(data.x, data.y)
    assert runner.metrics["loss"] == pytest.approx(float(expected["loss"]), rel=1e-6)
    assert runner.metrics["accuracy"] == pytest.approx(float(expected["accuracy"]), rel=1e-6)


def test_several_validation_sets_by_name(tmp_path):
    points = {"type": "NoisyPoints", "size": 20, "augment": False}
    runner = make_runner(
        tmp_path,
        val_dataloader=None,
        **{"train_cfg": {"max_iters": 2, "val_interval": 2}},
    )
    assert runner.val_loop is None
    from mmengine.config import Config
    from parts import config

    from mmtrain.runner import FlexibleRunner

    cfg = config(tmp_path / "named", train_cfg={"max_iters": 2, "val_interval": 2})
    cfg["val_dataloader"] = {
        "small": {"dataset": points, "batch_size": 4},
        "large": {"dataset": {**points, "size": 40}, "batch_size": 4},
    }
    runner = FlexibleRunner.from_cfg(Config(cfg))
    runner.train()
    assert set(runner.metrics) == {"small/loss", "small/accuracy", "large/loss", "large/accuracy"}


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_iteration(tmp_path):
    journal = Journal()
    with pytest.raises(RunError, match="iteration 9 is nan"):
        make_runner(tmp_path, model={"nan_at": 9}, custom_hooks=[journal]).train()
    assert journal.lines[-1] == "on_exception RunError"
    assert (tmp_path / "iter_7.pth" / "manifest.json").exists()


def test_a_loss_that_is_not_a_number_can_be_skipped(tmp_path):
    runner = make_runner(tmp_path, model={"nan_at": 9}, train_cfg={"nonfinite": "skip"})
    runner.train()
    assert (runner.progress.iteration, runner.progress.update, runner.progress.skipped) == (20, 19, 1)
    assert torch.isfinite(weights(runner.model)).all()
    rates = logged(tmp_path, "lr")
    assert rates[10] == rates[9]  # nothing ticked


def test_a_loss_without_gradient_is_refused(tmp_path):
    class NoGradient(Plain):
        def forward(self, x, y):
            return {"loss": super().forward(x, y)["loss"].detach()}

    with pytest.raises(RunError, match="loss of iteration 1 does not require grad"):
        make_runner(tmp_path, model=NoGradient()).train()


@pytest.mark.parametrize("train_cfg", [{}, {"max_iters": 19}, {"max_iters": 19, "flush_at_epoch_end": True}])
def test_a_model_with_its_own_train_step(tmp_path, train_cfg):
    class Own(Plain):
        def train_step(self, data, optim_wrapper):
            with optim_wrapper.optim_context(self):
                loss = self(**data)["loss"]
            optim_wrapper.update_params(loss)
            return {"loss": loss}

    own = _fresh()
    own.__class__ = Own
    options = {"optim_wrapper": {"accumulative_counts": 4}, "train_cfg": train_cfg}
    stepped = make_runner(tmp_path / "own", model=own, **options)
    plain = make_runner(tmp_path / "plain", model=_fresh(), **options)
    assert torch.equal(weights(stepped.train()), weights(plain.train()))
    assert stepped.progress.update == plain.progress.update


@pytest.mark.parametrize("own_train_step", [False, True])
def test_the_optimizer_steps_only_after_a_save_was_staged(tmp_path, own_train_step):
    """A save in the background copies parameters and moments; the step that follows waits for that."""

    class Own(Plain):
        def train_step(self, data, optim_wrapper):
            loss = self(**data)["loss"]
            optim_wrapper.update_params(loss)
            return {"loss": loss}

    class Noting:
        def before_train(self, runner):
            runner.checkpointer.wait_staged = lambda: waited_at.append(weights(runner.model).clone())

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            self.before = weights(runner.model).clone()

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            after = weights(runner.model)
            assert torch.equal(self.before, after) == (runner.update_result is None)
            if runner.update_result is not None:
                assert torch.equal(waited_at[-1], self.before)

    waited_at = []
    model = _fresh()
    if own_train_step:
        model.__class__ = Own
    make_runner(tmp_path, model=model, optim_wrapper={"accumulative_counts": 2}, custom_hooks=[Noting()]).train()
    assert len(waited_at) >= 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"max_epochs": 1, "max_iters": 1}, "exactly one"),
    ],
)
def test_an_impossible_schedule_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainSchedule(**options)


def test_when_validation_is_due():
    schedule = TrainSchedule(max_iters=100, val_begin=20, val_interval=10, dynamic_intervals=((50, 5),))
    due = [done for done in range(1, 101) if schedule.validates_after(done, is_end=done == 100)]
    assert due == [20, 30, 40, *range(50, 101, 5)]


def test_asking_for_the_names_of_metrics_changes_nothing(tmp_path):
    """It runs the model, without changing batch norm's statistics, the generators or a frozen layer's mode."""
    runner = make_runner(tmp_path)
    runner.model.train()
    runner.model.norm.eval()
    before = {name: value.clone() for name, value in runner.model.state_dict().items()}
    torch.manual_seed(4)
    expected = torch.randn(3)
    torch.manual_seed(4)
    assert runner.val_loop.metric_names() == ["loss", "accuracy"]
    assert torch.equal(torch.randn(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in runner.model.state_dict().items())
    assert (runner.model.training, runner.model.drop.training, runner.model.norm.training) == (True, True, False)
    runner.model.norm.train()
    runner.val_loop.metric_names()
    assert all(torch.equal(value, before[name]) for name, value in runner.model.state_dict().items())
    runner.release()
