"""The text of log lines, in MMEngine's format."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

# What the head of a line says already, or formats differently.
_HEAD = ("epoch", "iter", "step", "eta")
_TIMES = ("time", "data_time", "memory")


@dataclass(frozen=True, slots=True)
class LinePosition:
    """What a line reports on: ``done`` of ``total`` iterations (or batches), in ``epoch`` (from 1) of ``epochs``."""

    kind: str
    by_epoch: bool
    done: int
    total: int | None = None
    epoch: int = 0
    epochs: int | None = None

    def __str__(self) -> str:
        of = f"/{self.total}" if self.total is not None else ""
        count = f"[{str(self.done).rjust(len(of) - 1)}{of}]"
        if not self.by_epoch:
            return f"Iter({self.kind}) {count}"
        epoch = f"[{self.epoch}]".rjust(len(str(self.epochs or "")) + 2) if self.epoch else ""
        return f"Epoch({self.kind}) {epoch}{count}"


def format_train_line(
    scalars: Mapping[str, Any], position: LinePosition, *, eta: float | None = None, digits: int = 4
) -> str:
    """One line of training: position, lr, eta (given in seconds), times, memory, then the losses and the rest.

    What saves cost (``save_*``) is in the scalars file only: each save has a log line already.

    ``Epoch(train) [1][ 50/312]  lr: 1.0000e-03  eta: 0:01:12  time: 0.0123  data_time: 0.0010  memory: 312  loss: 2.1``
    """
    rates = [name for name in scalars if is_rate(name)]
    items = [f"{name}: {_exponent(scalars[name], digits)}" for name in rates]
    if eta is not None:
        items.append(f"eta: {format_seconds(eta)}")
    items += [f"{name}: {_number(scalars[name], digits)}" for name in _TIMES if name in scalars]
    rest = [name for name in scalars if name not in {*rates, *_HEAD, *_TIMES} and not name.startswith("save_")]
    rest.sort(key=lambda name: name != "loss")
    items += [f"{name}: {_number(scalars[name], digits)}" for name in rest]
    return "  ".join([str(position), *items])


def format_val_line(metrics: Mapping[str, Any], position: LinePosition, *, digits: int = 4) -> str:
    """One line of validation or test: position and metrics. ``Epoch(val) [1][20/20]  loss: 1.2345``"""
    items = [f"{name}: {_number(value, digits)}" for name, value in metrics.items() if name not in _HEAD]
    return "  ".join([str(position), *items])


def format_seconds(seconds: float) -> str:
    """``0:01:12``, or ``2 days, 3:00:00``."""
    return str(timedelta(seconds=int(seconds)))


def is_rate(name: str) -> bool:
    """Whether a scalar is a learning rate, which is printed with an exponent."""
    return name == "lr" or name.startswith("lr/") or name.endswith(("_lr", ".lr")) or ".lr/" in name


def _exponent(value: Any, digits: int) -> str:
    return f"{value:.{digits}e}"


def _number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)
