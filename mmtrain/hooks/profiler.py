"""torch's profiler over the first iterations of a run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mmtrain.errors import ConfigError
from mmtrain.hooks.base import Hook
from mmtrain.registry import HOOKS
from mmtrain.runner.interface import Runner

Handler = Callable[[Any], Any]


@HOOKS.register_module()
class ProfilerHook(Hook):
    """Profiles the first epoch of this process, or its first ``profile_times`` iterations with ``by_epoch=False``.

    MMEngine's arguments. ``schedule`` are those of ``torch.profiler.schedule``; ``on_trace_ready`` is a function, or
    ``dict(type='log_trace', ...)`` (a table in the log; the rest goes to ``key_averages().table``), or
    ``dict(type='tb_trace', dir_name=...)`` (files for TensorBoard). ``json_trace_path`` gets Chrome's format. Relative
    paths are relative to the run's log directory. Raises ConfigError for invalid arguments.
    """

    priority = "VERY_LOW"

    def __init__(  # noqa: PLR0913 - MMEngine's arguments
        self,
        *,
        by_epoch: bool = True,
        profile_times: int = 1,
        activity_with_cpu: bool = True,
        activity_with_cuda: bool = False,
        schedule: Mapping[str, int] | None = None,
        on_trace_ready: Handler | Mapping[str, Any] | None = None,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        with_flops: bool = False,
        json_trace_path: str | None = None,
    ) -> None:
        if profile_times < 1 or (by_epoch and profile_times > 1):
            expected = "1: one epoch is a lot of trace" if by_epoch else "1 or more iterations"
            raise ConfigError(f"ProfilerHook: profile_times is {profile_times}; expected {expected}")
        if not (activity_with_cpu or activity_with_cuda):
            raise ConfigError("ProfilerHook: activity_with_cpu and activity_with_cuda are both off; switch one on")
        if isinstance(on_trace_ready, Mapping):
            known = on_trace_ready.get("type") in ("log_trace", "tb_trace")
        else:
            known = callable(on_trace_ready) or on_trace_ready is None
        if not known:
            raise ConfigError(
                f"ProfilerHook: on_trace_ready is {on_trace_ready!r}; expected a function, "
                "dict(type='log_trace') or dict(type='tb_trace')"
            )
        self.by_epoch = by_epoch
        self.profile_times = profile_times
        self.json_trace_path = json_trace_path
        self.on_trace_ready = on_trace_ready
        self.schedule = None if schedule is None else dict(schedule)
        self._cpu, self._cuda = activity_with_cpu, activity_with_cuda
        self._options: dict[str, Any] = {
            "record_shapes": record_shapes, "profile_memory": profile_memory,
            "with_stack": with_stack, "with_flops": with_flops,
        }  # fmt: skip
        self._profiler: torch.profiler.profile | None = None
        self._done = 0

    def before_train(self, runner: Runner) -> None:
        activities = []
        if self._cpu:
            activities.append(torch.profiler.ProfilerActivity.CPU)
        if self._cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._done = 0
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(**self.schedule) if self.schedule is not None else None,
            on_trace_ready=self._handler(runner),
            **self._options,
        )
        self._profiler.start()
        runner.logger.info("The profiler is recording; training is slower until it ends")

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self._profiler is None:
            return
        self._profiler.step()
        self._done += 1
        if not self.by_epoch and self._done == self.profile_times:
            self._end(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        """One epoch at most is recorded, in iteration-based runs too."""
        self._end(runner)

    def after_train(self, runner: Runner) -> None:
        self._end(runner)

    def on_exception(self, runner: Runner, error: BaseException) -> None:
        """Stop recording; the trace of a run that failed is not worth the minutes it may take to write."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.on_trace_ready = None
            profiler.stop()

    def _end(self, runner: Runner) -> None:
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        runner.logger.info("The profiler is writing what it recorded; this may take a while")
        profiler.stop()
        if self.json_trace_path is not None:
            path = Path(runner.log_dir) / _of_rank(self.json_trace_path, runner.rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))

    def _handler(self, runner: Runner) -> Handler | None:
        if not isinstance(self.on_trace_ready, Mapping):
            return self.on_trace_ready
        options = dict(self.on_trace_ready)
        if options.pop("type") == "tb_trace":
            folder = Path(runner.log_dir) / options.pop("dir_name", "tf_tracing_logs")
            return torch.profiler.tensorboard_trace_handler(str(folder), **options)
        return lambda profiler: runner.logger.info("%s", profiler.key_averages().table(**options))


def _of_rank(path: str, rank: int) -> str:
    """The path itself on rank 0; with the rank in its name elsewhere, so that ranks do not overwrite one another."""
    return path if rank == 0 else str(Path(path).with_stem(f"{Path(path).stem}_rank{rank}"))
