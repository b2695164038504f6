import pytest

from mmtrain.logging import LinePosition, format_seconds, format_train_line, format_val_line

SCALARS = {
    "epoch": 1, "iter": 50, "loss_aux": 0.5, "grad_norm": 1.25, "time": 0.0123, "data_time": 0.001, "memory": 312,
    "lr": 1e-3, "loss": 2.34567,
}  # fmt: skip


def test_a_line_by_epoch():
    position = LinePosition("train", by_epoch=True, done=50, total=312, epoch=1, epochs=12)
    assert format_train_line(SCALARS, position, eta=72.9) == (
        "Epoch(train)  [1][ 50/312]  lr: 1.0000e-03  eta: 0:01:12  time: 0.0123  data_time: 0.0010  memory: 312  "
        "loss: 2.3457  loss_aux: 0.5000  grad_norm: 1.2500"
    )


def test_a_line_by_iteration_without_eta():
    scalars = {"lr": 0.1, "lr/group_1": 0.01, "loss": 1.0, "tokens": 7}
    assert format_train_line(scalars, LinePosition("train", by_epoch=False, done=5, total=1000), digits=2) == (
        "Iter(train) [   5/1000]  lr: 1.00e-01  lr/group_1: 1.00e-02  loss: 1.00  tokens: 7"
    )


def test_an_unknown_length():
    assert str(LinePosition("train", by_epoch=False, done=5)) == "Iter(train) [5]"


@pytest.mark.parametrize(
    ("position", "head"),
    [
        (LinePosition("val", True, 20, 20, 1), "Epoch(val) [1][20/20]"),
        (LinePosition("test", True, 20, 20), "Epoch(test) [20/20]"),
        (LinePosition("val", False, 20, 20), "Iter(val) [20/20]"),
    ],
)
def test_a_line_of_metrics(position, head):
    assert format_val_line({"epoch": 1, "iter": 7, "loss": 1.5, "classes": [1, 2]}, position) == (
        f"{head}  loss: 1.5000  classes: [1, 2]"
    )


def test_format_seconds():
    assert format_seconds(72.9) == "0:01:12"
    assert format_seconds(2 * 86400 + 3 * 3600) == "2 days, 3:00:00"
