"""Joining the process group, leaving it, and reporting a failure to it.

torch is imported by the functions that need it: commands that never join anything start without it.
"""

import atexit
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from mmtrain.errors import ConfigError
from mmtrain.launch.alarm import Alarm, RankFailure
from mmtrain.launch.environment import World, rank_before_joining, recognise
from mmtrain.launch.meeting import SECONDS, announce_as_rank_0, open_store, report_to_rank_0, wait_for_all
from mmtrain.launch.watchdog import Watchdog

TIMEOUT = 1800.0  # seconds
_FOR_EVER = timedelta(days=7)  # the watchdog ends a run that is stuck, and knows a rank that works from one that hangs


class _Group:
    """What this process has entered."""

    met = False  # stays set: this process has looked for the others
    store: Any = None
    alarm: Alarm | None = None
    watchdog: Watchdog | None = None
    errors: Path | None = None
    joined = False
    entered = False  # stays set after leaving


def join(launcher: str = "none", *, backend: str | None = None) -> World | None:
    """Join the processes that the launcher started; return None for a process that is alone.

    A process group that is up already is used as it is. ``backend`` defaults to nccl with CUDA, gloo elsewhere.
    Raises ConfigError for a set-up that cannot be right, RunError where ranks do not come.
    """
    from mmtrain import dist

    if dist.is_distributed():
        return None
    world = recognise(launcher)
    if world is None or world.size == 1:
        return world
    os.environ.update(world.variables())
    _Group.met = _Group.entered = True
    _Group.store = store = open_store(world)
    _Group.alarm = Alarm(store.clone(), world.rank, world.size)
    wait_for_all(store, world)
    dist.init(_checked(backend), timedelta(seconds=SECONDS), store=store)
    _Group.joined = True
    store.set_timeout(_FOR_EVER)
    dist.set_timeout(_FOR_EVER)
    return world


def watch(timeout: Any, position: Callable[[], int] | None = None) -> None:
    """Have a `Watchdog` end the run when nothing moves for ``timeout`` seconds; 0 and None have none.

    ``position`` gives the iterations done, once there is a loop. A group that somebody else has made has its own
    limits and is not watched.
    """
    from mmtrain import dist

    seconds = _seconds(timeout)
    if _Group.joined and position is not None:
        dist.set_timeout(_FOR_EVER)  # also of the groups that strategy and store have made
    if seconds and _Group.watchdog is None and (dist.world_size() == 1 or _Group.joined):
        store = _Group.store.clone() if _Group.joined else None
        _Group.watchdog = Watchdog(seconds, rank=dist.rank(), size=dist.world_size(), store=store, alarm=_Group.alarm)
        _Group.watchdog.errors = _Group.errors
    if _Group.watchdog is not None and position is not None:
        _Group.watchdog.position = position


def end_watch() -> None:
    """Stop what `watch` began."""
    watchdog, _Group.watchdog = _Group.watchdog, None
    if watchdog is not None:
        watchdog.close()


def leave() -> None:
    """Leave what `join` entered, when every rank has come this far."""
    if not _Group.joined:
        return
    from mmtrain import dist

    dist.barrier()  # the store may end with rank 0: nobody may still need it
    _Group.joined = False
    if _Group.alarm is not None:
        _Group.alarm.close()
        _Group.alarm = _Group.store = None
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
    """Say where tracebacks and stacks of ranks go from here on."""
    _Group.errors = directory
    for listener in (_Group.alarm, _Group.watchdog):
        if listener is not None:
            listener.errors = directory


def report(sentence: str, status: int, trace: str) -> int | None:
    """Report this process's failure to all ranks, and have rank 0 tell it; return the status to exit with.

    None says that there is nobody to report to: the process is alone, or has not joined yet.
    """
    alarm = _Group.alarm
    return None if alarm is None else alarm.report(RankFailure(alarm.rank, sentence, status, trace))


def report_before_joining(launcher: str, own: RankFailure, say: Callable[[str], object]) -> None:
    """Tell of a failure before the group is up, so that nobody waits; ``say`` prints it, after the words it is given.

    Rank 0 says what it met; another rank's failure rank 0 tells, where it can be found, else that rank itself.
    """
    try:
        world = recognise(launcher)
    except ConfigError:  # the command line is the same everywhere
        if rank_before_joining() == 0:
            say("")
        return
    if world is None or world.size == 1:
        say("")
        return
    own = replace(own, rank=world.rank)
    if world.rank == 0:
        say("")
        if not _Group.met:
            announce_as_rank_0(world, own)
    elif _Group.met or not report_to_rank_0(world, own):
        say(f"rank {world.rank}: ")


def is_reporting_rank() -> bool:
    """Whether this process tells errors that all ranks meet alike: rank 0, or a process alone."""
    return (_Group.alarm.rank if _Group.alarm is not None else rank_before_joining()) == 0


def _checked(backend: str | None) -> str | None:
    import torch

    if backend == "nccl" and not torch.cuda.is_available():
        return None  # MMEngine's configs name nccl by habit; what runs here is chosen by what is there
    if backend not in (None, "nccl", "gloo", "mpi", "cpu:gloo,cuda:nccl"):
        raise ConfigError(f"env_cfg.dist_cfg.backend is {backend!r}; expected 'nccl', 'gloo' or 'mpi'")
    return "cpu:gloo,cuda:nccl" if backend == "nccl" else backend


def _seconds(timeout: Any) -> float:
    """A limit of ``env_cfg.timeout`` in seconds; 0 for None."""
    return timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout or 0)
