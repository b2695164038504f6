"""The named table of everything that is saved, in the order in which it is restored."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmtrain import dist, randomness
from mmtrain.dtensor import full_state, full_tensor
from mmtrain.errors import CheckpointError
from mmtrain.types import Stateful

if TYPE_CHECKING:
    from mmtrain.runner.flexible_runner import FlexibleRunner
    from mmtrain.strategies.base import Strategy


def small_state_table(runner: "FlexibleRunner") -> dict[str, Stateful]:
    """Name to object, for everything but the model's and the optimizer's tensors and the generators.

    ``progress`` comes first, because the others may want to know the position when they are restored.
    """
    table: dict[str, Stateful] = {"progress": runner.progress, "log": runner.scalars}
    if runner.optim_wrapper is not None:
        table["scaler"] = runner.optim_wrapper
    if runner.ledger is not None:
        table["ledger"] = runner.ledger
    if runner.schedules is not None:
        table["schedules"] = runner.schedules
    extra = ModuleExtras(runner.model)
    if extra.modules:
        table["modules"] = extra
    for name, hook in runner.hooks.named.items():
        if isinstance(hook, Stateful):
            table[f"hooks.{name}"] = hook
    for name, metric in _metrics(runner):
        if isinstance(metric, Stateful):
            table[f"metrics.{name}"] = metric
    return table


class ModuleExtras:
    """What modules keep beside their tensors: torch's ``get_extra_state`` and ``set_extra_state``, by module name."""

    def __init__(self, model: nn.Module) -> None:
        plain = nn.Module.get_extra_state
        self.modules = {n: module for n, module in model.named_modules() if type(module).get_extra_state is not plain}

    def state_dict(self) -> dict[str, Any]:
        return {name: module.get_extra_state() for name, module in self.modules.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for name, module in self.modules.items():
            if name in state_dict:
                module.set_extra_state(state_dict[name])


def _metrics(runner: "FlexibleRunner") -> Iterator[tuple[str, Any]]:
    """The metrics of validation, by set, class and place: ``val.Recall_0``."""
    for name, (_, evaluator) in (runner.val_loop.sets if runner.val_loop is not None else {}).items():
        for index, metric in enumerate(getattr(evaluator, "metrics", ())):
            yield f"{name or 'val'}.{type(metric).__name__}_{index}", metric


def capture_small_state(runner: "FlexibleRunner") -> dict[str, Any]:
    """The state of everything in the table, by name."""
    state = {name: item.state_dict() for name, item in small_state_table(runner).items()}
    return full_state(state) if runner.strategy.forward_is_collective else state


def gather_weights(strategy: "Strategy") -> dict[str, Tensor]:
    """The whole model's tensors by name, on rank 0 (where sharded on the CPU, one at a time); empty elsewhere."""
    weights = {}
    for name, value in strategy.model_state().items():
        gathered = full_tensor(value)
        if dist.is_main():
            weights[name] = gathered if gathered is value else gathered.cpu()
    return weights


def capture_tensors(
    runner: "FlexibleRunner", *, optimizer: bool = True, left_out: Collection[str] = ()
) -> dict[str, dict[str, Tensor]]:
    """The model's and the optimizer's tensors by section; they share memory with the run.

    The model's tensors named in ``left_out`` are not among them.
    """
    model = {name: value for name, value in runner.strategy.model_state().items() if name not in left_out}
    sections = {"model": model}
    if optimizer:
        sections["optimizer"] = runner.strategy.optimizer_state()
    return sections


@dataclass
class Report:
    """What a resume did: names that were restored, that the checkpoint lacks, and that this run has no place for."""

    restored: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """One line for each kind that has any entry."""
        kinds = {"restored": self.restored, "not in the checkpoint": self.absent, "not used by this run": self.unused}
        return [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names] + self.notices


def restore_small_state(runner: "FlexibleRunner", state: Mapping[str, Any]) -> Report:
    """Put back what `capture_small_state` gave.

    A hook that is new, or gone, since the checkpoint was written is reported and keeps, or loses, its state.
    Raises CheckpointError when the position itself is missing.
    """
    if "progress" not in state:
        raise CheckpointError("the checkpoint's state.json has no 'progress': it does not say where its run stood")
    report = Report()
    table = small_state_table(runner)
    for name, item in table.items():
        if name in state:
            notices = item.load_state_dict(state[name])
            if isinstance(notices, list):  # schedules tell what did not fit
                report.notices += notices
            report.restored.append(name)
        else:
            report.absent.append(name)
    report.unused = [name for name in state if name not in table and name != "extra"]
    return report


def capture_rank_state(runner: "FlexibleRunner") -> dict[str, Any]:
    """What every rank has of its own: the states of its generators, and what its stream of data must remember."""
    return {"generators": randomness.capture(), "data": runner.train_dataloader.state_dict()}
