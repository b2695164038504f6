"""Log lines: when they are written, and what is in them."""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from mmtrain.errors import ConfigError
from mmtrain.hooks.base import Hook
from mmtrain.logging import LinePosition, ScalarReader, format_train_line, format_val_line
from mmtrain.progress import Progress
from mmtrain.registry import HOOKS
from mmtrain.runner.interface import Runner


@HOOKS.register_module()
class LoggerHook(Hook):
    """Writes a line every ``interval`` iterations, at the end of the run, and after each validation and test.

    A train line has the means since this hook's previous line, over ranks; its ``step`` is the number of iterations
    done. Nothing is read from the device between two lines. A run that is stopped early saves the unfinished interval
    in its checkpoint, so that the resumed run writes that line. Intervals are counted over the whole run and do not end
    with an epoch; ``ignore_last=False`` writes one more line at the end of each epoch for the rest of it.

    A run may have several LoggerHooks: each writes train lines at its own interval; the first one also writes the
    metrics, the experiment's name and what saves cost.

    * ``interval_exp_name``: repeats the experiment's name in the log every this many iterations;
    * ``out_dir``: after the run, the files of the log directory that end with one of ``out_suffix`` are copied to
      ``<out_dir>/<name of work_dir>/<timestamp>``; without ``keep_local`` they are moved;
    * ``by_epoch``: lines read ``Epoch(train) [1][50/312]`` or ``Iter(train) [50/1000]``; by default as
      ``log_processor.by_epoch`` says, else in the unit of the run;
    * ``log_metric_by_epoch``: accepted for MMEngine's configs; metrics are always logged at the iteration, like losses.
    """

    priority = "BELOW_NORMAL"
    shows_grad_norm = True  # the train loop measures it for the iterations at multiples of ``interval``

    def __init__(
        self,
        interval: int = 10,
        ignore_last: bool = True,
        *,
        interval_exp_name: int = 1000,
        out_dir: str | Path | None = None,
        out_suffix: str | Sequence[str] = (".json", ".log", ".py", "yaml"),
        keep_local: bool = True,
        log_metric_by_epoch: bool = True,
        by_epoch: bool | None = None,
    ) -> None:
        for name, value in (("interval", interval), ("interval_exp_name", interval_exp_name)):
            if not isinstance(value, int) or value <= 0:
                raise ConfigError(f"LoggerHook: {name} is {value!r}; expected a positive number of iterations")
        if out_dir is not None and "://" in str(out_dir):
            raise ConfigError(f"LoggerHook: out_dir is {str(out_dir)!r}; expected a local directory")
        self.interval = interval
        self.ignore_last = ignore_last
        self.interval_exp_name = interval_exp_name
        self.out_dir = None if out_dir is None else Path(out_dir).absolute()
        self.out_suffix = (out_suffix,) if isinstance(out_suffix, str) else tuple(out_suffix)
        self.keep_local = keep_local
        self.by_epoch = by_epoch
        self.clock: Callable[[], float] = perf_counter
        self._digits = 4
        self._began_at, self._began_done, self._written = 0.0, 0, 0
        self._end: int | None = None
        self._rates: dict[str, float] | None = None
        self._reader: ScalarReader | None = None
        self._is_first = True

    # ---- training -----------------------------------------------------------------------------------------------
    def before_run(self, runner: Runner) -> None:
        processor = (runner.cfg or {}).get("log_processor") or {}
        self._digits = processor.get("num_digits", 4)
        if self.by_epoch is None:
            self.by_epoch = processor.get("by_epoch")
        if self.by_epoch is None:
            self.by_epoch = runner.train_loop is None or runner.train_loop.by_epoch
        loggers = {name: hook for name, hook in runner.hooks.named.items() if isinstance(hook, LoggerHook)}
        self._is_first = next(iter(loggers.values())) is self
        if runner.train_loop is not None:
            name = next(name for name, hook in loggers.items() if hook is self)
            self._reader = runner.scalars.reader(name)

    def before_train(self, runner: Runner) -> None:
        """Start the clock."""
        self._began_at, self._began_done = self.clock(), runner.progress.iteration
        self._written = runner.progress.iteration
        self._end = runner.max_iters

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Note the learning rates of an iteration that gets a line; afterwards the next update's are set already."""
        done = runner.progress.iteration + 1
        if done % self.interval == 0 or done == self._end or not self.ignore_last:
            self._rates = learning_rates(runner.optim_wrapper)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        done = runner.progress.iteration
        if done % self.interval == 0 or done == self._end:
            self._write_train_line(runner, batch_idx + 1)
        if self._is_first and done % self.interval_exp_name == 0:
            runner.logger.info("Exp name: %s", runner.experiment_name)

    def after_train_epoch(self, runner: Runner) -> None:
        """Write what is left of the epoch, if asked to."""
        if not self.ignore_last and runner.progress.iteration > self._written:
            self._write_train_line(runner, runner.iterations_per_epoch or 0)

    def _write_train_line(self, runner: Runner, batches_done: int) -> None:
        progress: Progress = runner.progress
        done = self._written = progress.iteration
        runner.scalars.record("memory", memory_megabytes(runner.device))
        assert self._reader is not None
        means = self._reader.read()
        rates, self._rates = self._rates, None
        if runner.rank != 0:
            return
        epoch = epoch_of(progress)
        scalars = {"epoch": epoch, "iter": done, **(rates or learning_rates(runner.optim_wrapper)), **_whole(means)}
        position = LinePosition("train", by_epoch=False, done=done, total=runner.max_iters)
        if self.by_epoch:
            position = LinePosition("train", True, batches_done, runner.iterations_per_epoch, epoch, runner.max_epochs)
        text = format_train_line(scalars, position, eta=self._eta(runner), digits=self._digits)
        self._write(runner, scalars, "train", text)
        if runner.checkpointer.failure and self._is_first:
            runner.logger.warning("%s", runner.checkpointer.failure)

    def _eta(self, runner: Runner) -> float | None:
        """Seconds to the end at the mean pace since this process began to train."""
        done_here = runner.progress.iteration - self._began_done
        if runner.max_iters is None or done_here <= 0:
            return None
        return (self.clock() - self._began_at) / done_here * max(runner.max_iters - runner.progress.iteration, 0)

    # ---- validation and test ------------------------------------------------------------------------------------
    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        self._write_metrics(runner, "val", metrics or {}, runner.val_dataloader)

    def after_test_epoch(self, runner: Runner, metrics: Mapping[str, Any] | None = None) -> None:
        self._write_metrics(runner, "test", metrics or {}, runner.test_dataloader)

    def _write_metrics(self, runner: Runner, kind: str, metrics: Mapping[str, Any], loader: Any) -> None:
        if runner.rank != 0 or not self._is_first:
            return
        epoch = epoch_of(runner.progress)
        batches = _batches_of(loader)
        position = LinePosition(kind, bool(self.by_epoch), batches or 0, batches, epoch if kind == "val" else 0)
        scalars = {"epoch": epoch, "iter": runner.progress.iteration, **metrics}
        self._write(runner, scalars, kind, format_val_line(metrics, position, digits=self._digits))

    # ---- checkpoints and the end --------------------------------------------------------------------------------
    def before_save_checkpoint(self, runner: Runner, checkpoint: Any) -> None:
        """Write out the log up to the checkpoint: it is complete whatever stops the process afterwards."""
        for writer in runner.writers:
            writer.flush()

    def after_run(self, runner: Runner) -> None:
        """Write what the last save cost, as no train line follows it, and copy the logs to ``out_dir``."""
        if self._reader is not None and self._is_first:
            means = _whole(self._reader.read())
            costs = {name: value for name, value in means.items() if name.startswith("save_")}
            if costs and runner.rank == 0:
                self._write(runner, {"iter": runner.progress.iteration, **costs}, "save", None)
        if self.out_dir is not None and runner.rank == 0:
            for writer in runner.writers:
                writer.flush()
            self._copy_logs(runner)

    def _copy_logs(self, runner: Runner) -> None:
        source = Path(runner.log_dir)
        target = Path(str(self.out_dir)) / Path(runner.work_dir).resolve().name / source.name
        for path in sorted(source.rglob("*")):
            if path.is_file() and path.name.endswith(self.out_suffix):
                copy = target / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy)
                if not self.keep_local:
                    path.unlink()
        runner.logger.info("Logs are in %s", target)

    def _write(self, runner: Runner, scalars: Mapping[str, Any], kind: str, text: str | None) -> None:
        for writer in runner.writers:
            writer.write(scalars, runner.progress.iteration, kind=kind, text=text)


def _batches_of(loader: Any) -> int | None:
    """The number of batches of a loader; None for one over a stream, whose length may be unknown."""
    try:
        return len(loader)
    except TypeError:
        return None


def epoch_of(progress: Progress) -> int:
    """The epoch, from 1, that the last iteration done belonged to; 0 before the first."""
    return progress.epoch + (1 if progress.epoch_iteration else 0)


def learning_rates(optim: Any) -> dict[str, float]:
    """``lr`` of the first parameter group; where groups differ from the start, ``lr/group_<k>`` of each kind too.

    Of several optimizers each has its name in front (``gen.lr``), as in MMEngine.
    """
    groups = getattr(optim, "param_groups", None) or []
    if isinstance(groups, Mapping):
        return {f"{owner}.{name}": rate for owner, own in groups.items() for name, rate in _rates_of(own).items()}
    return _rates_of(groups)


def _rates_of(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    groups = [group for group in groups if "lr" in group]  # some optimizers choose their steps without one
    if not groups:
        return {}
    rates = {"lr": float(groups[0]["lr"])}
    first_of: dict[float, int] = {}
    for number, group in enumerate(groups):
        first_of.setdefault(float(group.get("initial_lr", group["lr"])), number)
    if len(first_of) > 1:
        rates.update({f"lr/group_{number}": float(groups[number]["lr"]) for number in first_of.values()})
    return rates


def memory_megabytes(device: torch.device) -> int:
    """The most memory so far, in MiB: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 2**20 if sys.platform == "darwin" else peak // 2**10


def _whole(means: Mapping[str, float]) -> dict[str, float | int]:
    """Sizes as integers."""
    return {name: int(value) if name in ("memory", "save_bytes") else value for name, value in means.items()}
