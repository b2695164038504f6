"""Where a run begins: choose the checkpoint, verify it, restore it, and say what happened."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmtrain import dist, randomness
from mmtrain.checkpoint import Checkpoint, CheckpointStore, Disks, copy_matched, describe, load_weights
from mmtrain.checkpoint.discover import newest_good
from mmtrain.checkpoint.format.manifest import MANIFEST, Manifest
from mmtrain.checkpoint.format.verify import Problem, Verify
from mmtrain.checkpoint.reader import saved_dtype
from mmtrain.errors import CheckpointError, ConfigError
from mmtrain.logging import LogPosition, cut_logs, note_start
from mmtrain.runner import compare
from mmtrain.runner.frozen import Frozen, frozen_names
from mmtrain.runner.hook_points import HookList
from mmtrain.runner.state import restore_small_state
from mmtrain.strategies.base import SavedTensor
from mmtrain.strategies.zero import universal

if TYPE_CHECKING:
    from mmtrain.runner.flexible_runner import FlexibleRunner


class Resume:
    """The choice made from ``resume`` and ``load_from``, before anything that draws random numbers is built.

    ``checkpoint`` is the one to continue from, or None; ``weights_from`` the path whose weights alone are loaded.
    """

    def __init__(self, store: CheckpointStore, logger: logging.Logger, *, verify: Verify = "full") -> None:
        self.store = store
        self._verify: Verify = verify
        self.checkpoint: Checkpoint | None = None
        self.weights_from: str | None = None
        self.moved_by: Any = None  # ``resume_data``, where it moves this run to other data or another place of them
        self._logger = logger
        self._named = False  # the config names the checkpoint
        self._begins_again = False  # asked to continue, but no start before this one came to a checkpoint
        self._lines: list[str] = []
        self._warnings: list[str] = []

    @property
    def seed(self) -> int | None:
        """The seed of the run that is continued."""
        return self.checkpoint.manifest.seed if self.checkpoint is not None else None

    @classmethod
    def choose(
        cls, cfg: Any, work_dir: Path, hooks: HookList, *, logger: logging.Logger, task: str, disks: Disks
    ) -> Resume:
        """Choose by the table in docs/resume.md; ``disks`` says which ranks see the same checkpoints.

        Raises ConfigError or CheckpointError that names the fault.
        """
        root = checkpoint_root(work_dir, hooks)
        # A training run holds the work dir's lock, so whatever another process left half-written there is dead.
        store = CheckpointStore(root, exclusive=task == "train", disks=disks)
        self = cls(store, logger, verify=(cfg.get("load_options") or {}).get("verify", "full"))
        if store.divided:
            self._lines.append(f"The ranks do not share {root}: {store.disks}; each disk keeps a part of a checkpoint.")
        if task == "train":
            universal.remove_leftovers(root)
        resume, load_from = cfg.get("resume", False), cfg.get("load_from")
        if task != "train":
            if load_from is None:
                raise ConfigError(f"{task} needs weights: set load_from, or name a checkpoint on the command line")
            self.weights_from = str(load_from)
        elif resume == "auto" or (resume is True and load_from is None):
            self._choose_newest(load_from if resume == "auto" else None)
        elif resume is True:
            self._choose_there(Path(load_from).expanduser())
        elif isinstance(resume, str):
            self._choose_by_name(resume, Path(load_from).expanduser() if load_from is not None else store.root)
        elif load_from is not None:
            self.weights_from = str(load_from)
        return self

    def _choose_newest(self, weights: str | None) -> None:
        checkpoint, problems = self.store.newest_good(self._verify)
        if self._take_newest(checkpoint, problems, self.store.root):
            return
        self._begins_again = True
        if weights is not None:
            self.weights_from = weights
            self._lines.append(f"No checkpoint in {self.store.root}: starting from the weights of {weights}.")
        else:
            self._lines.append(f"No checkpoint in {self.store.root}: starting from scratch.")

    def _take_newest(self, checkpoint: Checkpoint | None, problems: list[Problem], root: Path) -> bool:
        """Take the newest good checkpoint of a directory, telling of those passed over; False where it holds none."""
        for problem in problems if dist.is_main() else ():
            self._logger.warning("Skipped a checkpoint that is not good: %s", problem)
        if checkpoint is not None:
            self.checkpoint = checkpoint
            self._lines.append(f"Auto resumed from the latest checkpoint {checkpoint.path}.")
        elif problems:
            raise CheckpointError(f"no checkpoint in {root} is good: " + "; ".join(map(str, problems)))
        return checkpoint is not None

    def _choose_there(self, path: Path) -> None:
        """A checkpoint, or a directory of checkpoints: the newest good one in it."""

        def is_one() -> bool:
            in_root = not path.is_absolute() and (self.store.root / path).exists()
            return in_root or not path.is_dir() or (path / MANIFEST).exists() or path.suffix == ".pth"

        if dist.on_main(is_one):
            self._choose_exactly(path)
            return
        entry, problems = dist.on_main(lambda: newest_good(path, verify=self._verify))
        checkpoint = None if entry is None else self.store.open_on_all(path / entry.name, "size")
        if not self._take_newest(checkpoint, problems, path):
            raise CheckpointError(f"{path}: it is no checkpoint and holds no checkpoint, so there is nothing to resume")

    def _choose_by_name(self, name: str, folder: Path) -> None:
        """The checkpoint of that name in ``folder``; a ``load_from`` that is a checkpoint itself decides alone."""
        if dist.on_main(lambda: folder.is_file() or (folder / MANIFEST).exists()):
            self._logger.warning("resume=%r does not count, because load_from names a checkpoint: %s", name, folder)
            self._choose_exactly(folder)
        else:
            self._choose_exactly(folder / name)

    def _choose_exactly(self, path: Path) -> None:
        if path.is_file():
            raise ConfigError(
                f"resume=True needs a checkpoint directory, and {str(path)!r} is a file of weights, which does not say "
                "where its run stood; start from it with resume=False, load_from=..."
            )
        self.checkpoint, self._named = self.store.open_on_all(path, self._verify), True
        self._lines.append(f"Resumed from the checkpoint {self.checkpoint.path}.")

    # ---- restoring ----------------------------------------------------------------------------------------------
    def prepare(self, runner: FlexibleRunner) -> None:
        """Restore the chosen checkpoint, or load weights, or leave the fresh state as it is.

        Raises ConfigError where the engine's own format cannot be kept on disks that are not shared.
        """
        native = runner.strategy.native(frozen=True) if self.store.divided else None
        if native is not None and native.description["stage"] < 3:
            raise ConfigError(
                f"the ranks do not share {self.store.root}, and with ZeRO stage {native.description['stage']} "
                "DeepSpeed's rank 0 alone writes the weights that all ranks read back; use stage 3, or a work_dir that "
                "all nodes share"
            )
        runner.saving.frozen = Frozen(runner.model)
        if self.checkpoint is not None:
            self._restore(runner, self.checkpoint)
        else:
            self.load_weights(runner)
            if self._begins_again:
                self._cut_logs(runner, LogPosition(0, 0, runner.scale.global_batch))
        if dist.is_main():  # after the cut: a start that did not come so far has logged nothing
            with suppress(OSError):  # without it these logs are cut by steps
                note_start(runner.log_dir, _log_position(runner))
        self._begin_generation(runner)

    def _begin_generation(self, runner: FlexibleRunner) -> None:
        """Go on in the generation of the newest checkpoint, or begin the next: what is saved now is the newest."""
        newest, chosen = self.store.newest_entry(), self.checkpoint
        own = chosen if chosen is not None and chosen.path.parent.resolve() == self.store.root.resolve() else None
        following = 0 if newest is None else newest.generation + 1
        if own is None:
            runner.saving.begin(following, since=following, began="" if chosen is not None else runner.timestamp)
            if newest is not None:
                self._lines.append(
                    f"{self.store.root} holds checkpoints of an earlier run, the newest is {newest.name}; they are "
                    "left alone but for those of the same name, and from now on this run's are the newest."
                )
            return
        manifest = own.manifest
        if self._named:
            runner.saving.named.add(own.name)
        goes_on = newest is None or (
            (newest.name, newest.created) == (own.name, manifest.created)
            and runner.progress.iteration >= newest.iteration
        )
        since, began = int(manifest.meta.get("since", 0)), str(manifest.meta.get("began", ""))
        runner.saving.begin(manifest.generation if goes_on else following, since=since, began=began)

    def load_weights(self, runner: FlexibleRunner) -> None:
        """Copy the weights of ``load_from`` into the model; optimizer, schedule and position stay as they are."""
        if self.weights_from is None:
            return
        options = dict(runner.cfg.get("load_options") or {})
        revise_keys = {"revise_keys": options["revise_keys"]} if "revise_keys" in options else {}
        weights = load_weights(self.weights_from, verify=self._verify == "full", **revise_keys)
        own = runner.strategy.model_state()
        report = copy_matched(
            weights.tensors, own, source=weights.source, allow_mismatch=options.get("allow_mismatch", False)
        )
        runner.strategy.commit_model_state(own)
        self._lines.append(f"Loaded the weights of {weights.source} ({weights.kind}): {'; '.join(describe(report))}.")

    def _restore(self, runner: FlexibleRunner, checkpoint: Checkpoint) -> None:
        manifest = checkpoint.manifest
        compare.refuse_other_optimizer(manifest.meta.get("optimizer", ""), runner.optimizer_name)
        values, choice = compare.flatten(runner.cfg), runner.cfg.get("resume_data")
        same_data = compare.same_data(manifest.data_fingerprint, runner.data_fingerprint)
        if choice in (None, "continue"):
            compare.refuse_other_data(manifest.data_fingerprint, runner.data_fingerprint)
        elif same_data and compare.switched_before(manifest.meta.get("config_values", {}), values):
            self._lines.append(
                f"resume_data={choice!r} was done by the run that saved this checkpoint, so its position counts."
            )
        else:
            self.moved_by = choice
        self._restore_tensors(runner, checkpoint)
        state = checkpoint.state()
        report = restore_small_state(runner, state)
        self._restore_position(runner, checkpoint, self.moved_by)
        own = self.store.own_rng(checkpoint)
        if own is not None:
            randomness.restore(own["generators"])
            if self.moved_by is None:  # else it is that of other data, or of another place
                runner.train_dataloader.load_state_dict(own["data"])
        runner.hooks.call("after_load_checkpoint", runner, checkpoint=dict(state.get("extra", {})))
        self._lines += report.lines()
        samples, batch = int(manifest.position["samples"]), _saved_scale(manifest).global_batch
        position = LogPosition(manifest.iteration, samples, batch)
        self._cut_logs(runner, position, began=manifest.meta.get("began", ""))
        for line in compare.differences(manifest.meta.get("config_values", {}), values):
            self._lines.append(f"changed since the checkpoint: {line}")

    def _cut_logs(self, runner: FlexibleRunner, position: LogPosition, *, began: str = "") -> None:
        """Cut what earlier starts in this work dir logged past the checkpoint: those iterations are done again.

        ``began`` is the name of the first start's log directory; those before it are another run's and stay whole.
        """
        if self.store.leads:  # rank 0; with disks of their own each leader, for rank 0 may have been on another node
            log_dirs = [path.parent for path in Path(runner.work_dir).glob("*/vis_data")]
            log_dirs.sort(key=lambda path: _in_time(path.name))
            cut_logs([path for path in log_dirs if _in_time(path.name) >= _in_time(began)], position)

    def _restore_tensors(self, runner: FlexibleRunner, checkpoint: Checkpoint) -> None:
        meta = checkpoint.manifest.meta
        native = meta.get("native")
        partial = not checkpoint.manifest.has_frozen
        if partial and runner.cfg.get("resume") == "auto" and runner.cfg.get("load_from") is not None:
            self.weights_from = str(runner.cfg["load_from"])
            self.load_weights(runner)  # what was frozen lies nowhere else
        if native is not None and runner.strategy.takes_native(native):
            runner.strategy.load_native(checkpoint.path, native)
        else:
            with self._by_name(checkpoint, native) as source:
                self._restore_by_name(runner, source, meta, partial=partial)
        if partial:
            runner.saving.frozen.check(meta.get("frozen") or {}, runner.strategy, where=str(checkpoint.path))

    def _by_name(self, checkpoint: Checkpoint, native: Any) -> AbstractContextManager[Any]:
        """The tensors by name, also of a checkpoint that an engine wrote in its own format."""
        if native is None:
            return nullcontext(checkpoint)
        if self.store.divided:
            raise CheckpointError(
                f"{checkpoint.path} was saved by {native['world']} processes in ZeRO stage {native['stage']}, and what "
                "reads it elsewhere must see all of its files, which lie on several disks; copy them onto one"
            )
        self._lines.append(
            f"The checkpoint is DeepSpeed's (ZeRO stage {native['stage']}, {native['world']} processes) and was read "
            "through its universal format."
        )
        return universal.opened(checkpoint.path, native, room=self.store.root)

    def _restore_by_name(self, runner: FlexibleRunner, source: Any, meta: Any, *, partial: bool) -> None:
        own = runner.strategy.model_state()
        if partial:
            saved, frozen = set(source.tensor_names("model")), frozen_names(runner.model)
            own = {name: value for name, value in own.items() if name in saved or name not in frozen}
            runner.saving.frozen.remove(saved)
        source.load("model", own)
        runner.strategy.commit_model_state(own)
        if meta.get("has_optimizer", True):
            targets = runner.strategy.optimizer_targets(_saved(source, "optimizer"))
            source.load("optimizer", targets)
            runner.strategy.load_optimizer_state(targets)
        else:
            self._lines.append("The checkpoint has no optimizer state (save_optimizer=False): moments start anew.")

    def _restore_position(self, runner: FlexibleRunner, checkpoint: Checkpoint, choice: Any) -> None:
        """Put the run where the checkpoint stood, counted at today's batch size."""
        manifest, progress, today = checkpoint.manifest, runner.progress, runner.scale
        saved = _saved_scale(manifest)
        if isinstance(choice, Mapping) and not runner.train_dataloader.can_skip:
            kind = type(runner.train_dataloader.dataset).__name__
            raise ConfigError(
                f"resume_data={dict(choice)}: {kind} can only be iterated over, so nothing of it can be skipped "
                "without reading it; let the data set begin where it should, and use resume_data='restart'"
            )
        moved = compare.switch_data(compare.rescale(progress, saved, today, same_data=choice is None), choice, today)
        epoch, offset = runner.train_dataloader.seek(moved.epoch, moved.offset)
        if (epoch, offset) != (moved.epoch, moved.offset):
            in_epoch = moved.epoch_iteration if offset else 0
            moved = replace(moved, epoch=epoch, offset=offset, epoch_iteration=in_epoch)
        progress.load_state_dict(moved.state_dict())
        runner.iter, runner.epoch = progress.iteration, progress.epoch
        lr = next(iter(runner.optim_wrapper.optimizers.values())).param_groups[0].get("initial_lr")
        told, self._warnings = compare.scale_lines(saved, today, lr=lr)
        self._warnings += compare.seed_lines(manifest.seed, runner.seed)
        self._lines += told
        if progress.iteration != manifest.iteration:
            self._lines.append(
                f"Steps count at global batch {today.global_batch} from here: iteration {progress.iteration} is what "
                f"was {manifest.iteration}."
            )

    def announce(self, runner: FlexibleRunner) -> None:
        """Log what was chosen and restored, where the run stands, and what to know about its set-up."""
        for line in [*self._lines, *runner.notices]:
            self._logger.info("%s", line)
        for line in self._warnings if dist.is_main() else ():  # all ranks know them alike
            self._logger.warning("%s", line)
        progress, total = runner.progress, runner.max_iters
        if self.checkpoint is not None:
            of = f" of {total}" if total is not None else ""
            self._logger.info(
                "The run stands at iteration %d%s, epoch %d, sample %d of the epoch, update %d.",
                progress.iteration, of, progress.epoch + 1, progress.offset, progress.update,
            )  # fmt: skip
        if self.checkpoint is not None and runner.train_loop is not None and runner.train_loop.finished:
            self._logger.info("Nothing is left to train: to go on, raise max_epochs or max_iters in train_cfg.")


def _saved_scale(manifest: Manifest) -> compare.Scale:
    """How the run that saved a checkpoint counted."""
    batch = manifest.meta.get("batch_size")
    return compare.Scale(
        global_batch=batch * manifest.meta.get("data_size", manifest.world_size) if batch else None,
        accumulative_counts=manifest.meta.get("accumulative_counts", 1),
        iterations_per_epoch=manifest.meta.get("iterations_per_epoch"),
    )


def _log_position(runner: FlexibleRunner) -> LogPosition:
    """Where a run's logs go on, and how they count."""
    stream, progress = runner.train_dataloader, runner.progress
    known = stream.samples and stream.iterations_per_epoch
    mean = stream.samples / stream.iterations_per_epoch if known else None
    return LogPosition(progress.iteration, progress.samples, runner.scale.global_batch, mean)


def _saved(checkpoint: Checkpoint | universal.Universal, section: str) -> dict[str, SavedTensor]:
    if isinstance(checkpoint, universal.Universal):
        return checkpoint.saved(section)
    infos = {name: checkpoint.tensor_info(section, name) for name in checkpoint.tensor_names(section)}
    return {name: SavedTensor(info.shape, saved_dtype(info)) for name, info in infos.items()}


def _in_time(log_dir: str) -> tuple[str, int, str]:
    """What orders log directories: second, and number within it (``20260101_120000_10`` is after ``..._9``)."""
    return log_dir[:15], len(log_dir), log_dir


def checkpoint_root(work_dir: Path, hooks: HookList) -> Path:
    """Where checkpoints lie: the work dir, or ``<out_dir>/<name of the work dir>`` where the hook says so."""
    out_dir = next((hook.out_dir for hook in hooks if getattr(hook, "out_dir", None) and hasattr(hook, "policy")), None)
    return Path(out_dir).absolute() / work_dir.name if out_dir else work_dir
