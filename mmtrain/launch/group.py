"""Joining the process group, leaving it, and reporting a failure to it.

torch is imported by the functions that need it: commands that never join anything start without it.
"""

import atexit
import logging
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from mmtrain.errors import ConfigError
from mmtrain.launch.alarm import Alarm, Failure
from mmtrain.launch.environment import World, rank_before_joining, recognise


class _Group:
    """What this process has entered."""

    alarm: Alarm | None = None
    joined = False
    entered = False  # stays set after leaving


def join(launcher: str = "none", *, backend: str | None = None, timeout: Any = None) -> World | None:
    """Join the processes that the launcher started; return None for a process that is alone.

    A process group that is up already is used as it is. ``backend`` defaults to nccl with CUDA, gloo elsewhere;
    ``timeout`` is a number of seconds or a timedelta. Raises ConfigError for a set-up that cannot be right.
    """
    from mmtrain import dist

    if dist.is_distributed():
        return None
    world = recognise(launcher)
    if world is None or world.size == 1:
        return world
    os.environ.update(world.variables())
    dist.init(_checked(backend), _seconds(timeout))
    _Group.joined = _Group.entered = True
    _Group.alarm = Alarm(_own_store(), world.rank, world.size)
    return world


def leave() -> None:
    """Leave what `join` entered, when every rank has come this far."""
    if not _Group.joined:
        return
    from mmtrain import dist

    dist.barrier()  # the store may end with rank 0: nobody may still need it
    _Group.joined = False
    if _Group.alarm is not None:
        _Group.alarm.close()
        _Group.alarm = None
    dist.shutdown()


def end_process(status: int) -> None:
    """End a process that had joined others, at once; return where it was alone.

    Threads of gloo now and then abort the interpreter's own way out, and those of a broken group may never end.
    """
    if not _Group.entered:
        return
    logging.shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def write_errors_to(directory: Path) -> None:
    """Say where tracebacks of ranks go from here on."""
    if _Group.alarm is not None:
        _Group.alarm.errors = directory


def report(sentence: str, status: int, trace: str) -> int | None:
    """Report this process's failure to all ranks, and have rank 0 tell it; return the status to exit with.

    None says that there is nobody to report to: the process is alone, or has not joined yet.
    """
    alarm = _Group.alarm
    return None if alarm is None else alarm.report(Failure(alarm.rank, sentence, status, trace))


def speaks() -> bool:
    """Whether this process tells errors that all ranks meet alike: rank 0, or a process alone."""
    return (_Group.alarm.rank if _Group.alarm is not None else rank_before_joining()) == 0


def _checked(backend: str | None) -> str | None:
    import torch

    if backend == "nccl" and not torch.cuda.is_available():
        return None  # MMEngine's configs name nccl by habit; what runs here is chosen by what is there
    if backend not in (None, "nccl", "gloo", "mpi", "cpu:gloo,cuda:nccl"):
        raise ConfigError(f"env_cfg.dist_cfg.backend is {backend!r}; expected 'nccl', 'gloo' or 'mpi'")
    return "cpu:gloo,cuda:nccl" if backend == "nccl" else backend


def _seconds(timeout: Any) -> timedelta | None:
    if timeout is None or isinstance(timeout, timedelta):
        return timeout
    if isinstance(timeout, int | float) and not isinstance(timeout, bool) and timeout > 0:
        return timedelta(seconds=timeout)
    raise ConfigError(f"env_cfg.timeout is {timeout!r}; expected a positive number of seconds")


def _own_store() -> Any:
    """The group's store over a connection of its own: a thread that reads it never waits for the main thread."""
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    return store.clone() if hasattr(store, "clone") else store
