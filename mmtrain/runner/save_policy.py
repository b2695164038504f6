"""How checkpoints are saved: the arguments of `CheckpointHook` that are not about when."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from mmtrain.checkpoint import Retention
from mmtrain.evaluation.metric_rule import GREATER_KEYS, LESS_KEYS
from mmtrain.runner.best import BestRecords


@dataclass(frozen=True, slots=True)
class SavePolicy:
    """The names are those of `CheckpointHook`; ``by_epoch`` None is the unit of the run."""

    by_epoch: bool | None = None
    save_optimizer: bool = True
    save_param_scheduler: bool = True
    save_frozen: bool = True
    save_last: bool = False
    async_save: bool = True
    on_save_error: str = "continue"
    out_dir: str | None = None
    filename_tmpl: str | None = None
    max_keep_ckpts: int = -1
    keep_every: int | None = None
    save_best: tuple[str, ...] = ()
    rule: tuple[str, ...] = ()
    greater_keys: tuple[str, ...] = GREATER_KEYS
    less_keys: tuple[str, ...] = LESS_KEYS
    published_keys: tuple[str, ...] = ()

    def retention(self, *, since: int, run: str) -> Retention:
        """What stays of the checkpoints that ``run`` saved in the generations from ``since`` on."""
        return Retention(
            max_keep_ckpts=self.max_keep_ckpts,
            keep_every=self.keep_every or 0,
            unit="epoch" if self.by_epoch else "iteration",
            since=since,
            run=run,
        )

    def best_records(self) -> BestRecords:
        """The records that ``save_best`` asks for, still empty."""
        rules = self.rule if self.save_best else ()
        return BestRecords(self.save_best, rules, greater_keys=self.greater_keys, less_keys=self.less_keys)

    def checkpoint_name(self, *, epoch: int, iteration: int, at_epoch_end: bool) -> str:
        """The name of a checkpoint: ``epoch_3.pth`` at the end of an epoch of an epoch-based run, else ``iter_N.pth``.

        ``filename_tmpl`` counts in the unit of the interval and names only the checkpoints counted in it.
        """
        by_epoch = bool(self.by_epoch) and at_epoch_end
        template = self.filename_tmpl if by_epoch == bool(self.by_epoch) else None
        return (template or ("epoch_{}.pth" if by_epoch else "iter_{}.pth")).format(epoch if by_epoch else iteration)


def find_save_policy(hooks: Iterable[Any], *, by_epoch: bool) -> SavePolicy:
    """The policy of the last hook that has one (`CheckpointHook.save_policy`), in the unit of the run by default."""
    policy = SavePolicy()
    for hook in hooks:
        policy = getattr(hook, "save_policy", policy)
    return policy if policy.by_epoch is not None else replace(policy, by_epoch=by_epoch)
