import pytest
import torch
from pseudo_terminal import PseudoTerminal

from mmtrain.hooks import ProgressBarHook
from mmtrain.logging import ProgressBar


def hook_that_always_draws():
    hook = ProgressBarHook()
    hook.bar = ProgressBar(clock=lambda: 0.0)  # behind the hook's clock, so that each drawing is due
    return hook


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    made = PseudoTerminal(120)
    yield made
    made.close()


def test_the_bar_costs_nothing_without_a_terminal(make_runner, capsys):
    runner = make_runner()
    hook = ProgressBarHook()
    hook.before_train(runner)
    runner.step(hook)
    hook.after_val_iter(runner, batch_idx=0)
    hook.after_train(runner)
    hook.on_exception(runner, error=RuntimeError())
    assert capsys.readouterr() == ("", "")


def test_the_bar_shows_the_last_logged_values_and_reads_nothing(make_runner, monkeypatch, terminal):
    monkeypatch.setattr("sys.stderr", terminal.stream)
    runner = make_runner(per_epoch=10, max_epochs=10)
    hook = hook_that_always_draws()
    hook.before_train(runner)
    runner.step(hook)
    assert "loss - lr 1.0e-01" in terminal.lines[-1]
    reader = runner.scalars.reader("log")
    for name, value in {"loss": torch.tensor(2.5), "time": 0.2, "data_time": 0.05}.items():
        runner.scalars.record(name, value)
    reader.read()
    runner.scalars.record("loss", torch.tensor(9.0))
    monkeypatch.setattr(torch.Tensor, "item", None)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    runner.optim_wrapper.param_groups[0]["lr"] = torch.tensor(0.5)
    runner.step(hook)
    assert "2/100 loss 2.5 lr - " in terminal.lines[-1]
    assert "data 25%" in terminal.lines[-1]
    hook.after_val_iter(runner, batch_idx=4)
    assert " val 5·" in terminal.lines[-1]
    hook.on_exception(runner, error=RuntimeError())
    assert not any(terminal.lines)


def test_other_ranks_show_no_bar(make_runner, monkeypatch, terminal):
    monkeypatch.setattr("sys.stderr", terminal.stream)
    runner = make_runner()
    runner.rank = 1
    hook = hook_that_always_draws()
    hook.before_train(runner)
    runner.step(hook)
    hook.after_train(runner)
    assert terminal.lines == [""]
