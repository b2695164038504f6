import math

import torch

from mmtrain.hooks import ProgressBarHook
from mmtrain.logging import LiveLine, ProgressBar


def test_the_bar_costs_nothing_where_there_is_no_terminal(make_runner, capsys):
    runner = make_runner()
    hook = ProgressBarHook()
    hook.before_train(runner)
    assert hook._bar.due == math.inf
    runner.step(hook)
    hook.after_val_iter(runner, batch_idx=0)
    hook.after_train(runner)
    hook.on_exception(runner, error=RuntimeError())
    assert capsys.readouterr() == ("", "")


def test_the_bar_shows_the_last_logged_values_and_reads_nothing(make_runner, monkeypatch, tmp_path):
    shown = []
    line = LiveLine()
    monkeypatch.setattr(LiveLine, "available", True)
    monkeypatch.setattr(line, "show", shown.append)
    runner = make_runner(per_epoch=10, max_epochs=10)
    hook = ProgressBarHook()
    hook._bar = ProgressBar(line)
    hook.before_train(runner)
    runner.step(hook)
    assert "loss - lr 1.0e-01" in shown[-1]
    reader = runner.scalars.reader("log")
    for name, value in {"loss": torch.tensor(2.5), "time": 0.2, "data_time": 0.05}.items():
        runner.scalars.record(name, value)
    reader.read()
    runner.scalars.record("loss", torch.tensor(9.0))
    monkeypatch.setattr(torch.Tensor, "item", None)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    runner.optim_wrapper.param_groups[0]["lr"] = torch.tensor(0.5)
    hook._bar.due = -math.inf
    runner.step(hook)
    assert "2/100 loss 2.5 lr - " in shown[-1]
    assert "data 25%" in shown[-1]
    hook._bar.due = -math.inf
    hook.after_val_iter(runner, batch_idx=4)
    assert "[val 5·" in shown[-1]


def test_other_ranks_show_no_bar(make_runner, monkeypatch):
    monkeypatch.setattr(LiveLine, "available", True)
    runner = make_runner()
    runner.rank = 1
    hook = ProgressBarHook()
    hook.before_train(runner)
    assert not hook._bar.live
