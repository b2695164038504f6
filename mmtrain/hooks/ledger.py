"""The hook that records which samples each update consumed."""

from collections.abc import Mapping
from typing import Any

from mmtrain.data.ledger import Ledger
from mmtrain.hooks.base import Hook
from mmtrain.registry import HOOKS
from mmtrain.runner.interface import Runner
from mmtrain.types import StateDict


@HOOKS.register_module()
class LedgerHook(Hook):
    """Records the samples of every iteration in a `Ledger`, which is saved with every checkpoint.

    ``train_cfg.ledger=True`` adds it; ``tools/checkpoint.py audit`` proves from its record that no sample was lost or
    repeated.
    """

    priority = "HIGHEST"
    state_name = "ledger"  # in state.json

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def before_train(self, runner: Runner) -> None:
        """Record where the run, or what a resume continues, begins."""
        self._ledger.begin(runner.progress, moved_by=runner.data_moved_by)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Record the batch of the iteration in progress."""
        loop, result = runner.train_loop, runner.update_result
        assert loop is not None
        assert loop.batch is not None
        applied = result is not None and result.applied  # an update that the position counts already
        self._ledger.observe(
            loop.batch,
            iteration=runner.iter,
            update=runner.progress.update - applied,
            micro=loop.micro_batch.index,
        )

    def state_dict(self) -> StateDict:
        """Return the history of all starts; a collective."""
        return self._ledger.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue the history of a checkpoint."""
        self._ledger.load_state_dict(state_dict)
