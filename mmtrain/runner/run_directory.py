"""The directories that a run writes to, the lock on them, and what ``env_cfg`` sets up in the process."""

import logging
import multiprocessing
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmtrain import dist, launch
from mmtrain.checkpoint import Topology, WorkDirLock, find_topology
from mmtrain.config import dump_config
from mmtrain.errors import ConfigError
from mmtrain.logging import make_logger


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Where a run writes: its work directory, the log directory of this start, and the logger in it."""

    work_dir: Path
    log_dir: Path
    timestamp: str
    experiment_name: str
    logger: logging.Logger
    config_text: str


def _name_and_work_dir(cfg: Any) -> tuple[str, Path]:
    name = Path(cfg.filename).stem if getattr(cfg, "filename", None) else "run"
    # absolute, as MMEngine's: a hook or the user's code may change the current directory
    return name, Path(cfg.get("work_dir") or Path("work_dirs") / name).absolute()


def work_dir_of(cfg: Any) -> Path:
    """Where the config's run writes."""
    return _name_and_work_dir(cfg)[1]


class Place(NamedTuple):
    """A directory that a run writes to: which ranks see it, and the lock on it where this rank holds it."""

    topology: Topology
    lock: WorkDirLock | None = None


def occupy(directory: Path, locks: ExitStack, *, named: str = "work_dir") -> Place:
    """Find out which ranks see the same ``directory`` and lock it until ``locks`` is closed; a collective.

    The leader of each disk takes the lock. ``named`` is what the config calls the directory.
    Raises ConfigError if the directory is not writable, and RunError that names the process holding the lock.
    """
    try:
        topology = find_topology(directory)
    except OSError as error:
        raise _unwritable(directory, error, named) from error

    lock = WorkDirLock(directory)

    def acquire() -> None:
        try:
            locks.enter_context(lock.acquire())
        except OSError as error:
            raise _unwritable(directory, error, named) from error

    topology.on_leaders(acquire)
    return Place(topology, lock if lock.held else None)


def _unwritable(directory: Path, error: OSError, named: str = "work_dir") -> ConfigError:
    remedy = "Choose another with work_dir=... or --work-dir." if named == "work_dir" else "Choose another."
    return ConfigError(f"{named} {str(directory)!r} is not writable: {error.strerror or error}. {remedy}")


def make_run_directory(cfg: Any) -> RunDirectory:
    """Create ``<work_dir>/<timestamp>``, the logger in it, and the resolved config beside the log.

    Raises ConfigError when the directory is not writable.
    """
    name, work_dir = _name_and_work_dir(cfg)
    timestamp = dist.broadcast_object(time.strftime("%Y%m%d_%H%M%S"))
    experiment = cfg.get("experiment_name") or f"{name}_{timestamp}"
    log_dir = dist.on_main(lambda: _new_directory(work_dir, timestamp))
    logger = make_logger("mmtrain", level=cfg.get("log_level") or "INFO", file=log_dir / "run.log")
    if dist.is_main():
        _write_record(cfg, log_dir / "config.py")
    text = dist.on_main(lambda: (log_dir / "config.py").read_text(encoding="utf-8"))
    return RunDirectory(work_dir, log_dir, log_dir.name, experiment, logger, text)


def _write_record(cfg: Any, path: Path) -> None:
    """Write the resolved config. One that was made in Python may hold objects, which no file can."""
    try:
        dump_config(cfg, path)
    except ConfigError as error:
        if getattr(cfg, "filename", None):
            raise
        path.write_text(f"# This run was set up in Python and cannot be reproduced from a file.\n# {error}\n", "utf-8")


def _new_directory(work_dir: Path, timestamp: str) -> Path:
    try:
        for number in range(1000):
            directory = work_dir / (f"{timestamp}_{number}" if number else timestamp)
            try:
                directory.mkdir(parents=True)
            except FileExistsError:
                if not work_dir.is_dir():
                    raise
                continue
            (directory / "vis_data").mkdir()
            return directory
    except OSError as error:
        raise _unwritable(work_dir, error) from error
    raise ConfigError(f"work_dir {str(work_dir)!r} already has a thousand log directories named {timestamp}")


def watch_seconds(cfg: Any) -> Any:
    """Seconds without progress before a run is ended: ``env_cfg.timeout`` (MMEngine: ``env_cfg.dist_cfg.timeout``)."""
    env = cfg.get("env_cfg") or {}
    options = env.get("dist_cfg") or {}
    return env.get("timeout", options.get("timeout", launch.TIMEOUT))


def apply_env(env: Mapping[str, Any], *, deterministic: bool) -> None:
    """Apply ``env_cfg``: ``cudnn_benchmark``, ``mp_cfg`` and ``resource_limit`` (open files, as in MMEngine).

    Raises ConfigError for a start method that does not exist.
    """
    torch.backends.cudnn.benchmark = bool(env.get("cudnn_benchmark")) and not deterministic
    processes = env.get("mp_cfg") or {}
    method = processes.get("mp_start_method")
    if method is not None:
        if method not in multiprocessing.get_all_start_methods():
            known = ", ".join(multiprocessing.get_all_start_methods())
            raise ConfigError(f"env_cfg.mp_cfg.mp_start_method is {method!r}; expected one of {known}")
        multiprocessing.set_start_method(method, force=True)
    if processes.get("opencv_num_threads") is not None:
        import cv2

        cv2.setNumThreads(processes["opencv_num_threads"])
    if env.get("resource_limit") is not None:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, env["resource_limit"]), hard), hard))
