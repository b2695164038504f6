"""Joins the process group, leaves it, and reports a failure to it.

torch is imported by the functions that need it: commands that never join a group start without it.
"""

import atexit
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from mmtrain.errors import ConfigError
from mmtrain.launch.alarm import Alarm
from mmtrain.launch.environment import World, rank_before_joining, recognise
from mmtrain.launch.failure import RankFailure, describe
from mmtrain.launch.meeting import (
    SECONDS,
    announce_as_rank_0,
    open_store,
    report_to_rank_0,
    store_host,
    wait_for_all,
)
from mmtrain.launch.watchdog import Watchdog

TIMEOUT = 1800.0  # seconds
_NO_LIMIT = timedelta(days=7)  # the watchdog ends a stuck run; it can tell a slow rank from one that hangs


class _Group:
    """What this process has joined."""

    met = False  # stays set: this process has contacted the other ranks
    store: Any = None
    alarm: Alarm | None = None
    watchdog: Watchdog | None = None
    errors: Path | None = None
    joined = False
    entered = False  # stays set after leaving
    shares_failures = False


def join(launcher: str = "none", *, backend: str | None = None) -> World | None:
    """Join the processes that the launcher started; return None for a single process.

    A process group that is up already is used as it is. ``backend`` defaults to nccl with CUDA, gloo elsewhere.
    Raises ConfigError for an invalid set-up, RunError when ranks do not come.
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
    _Group.alarm = Alarm(store.clone(), world.rank, world.size, host=store_host())
    wait_for_all(store, world)
    dist.init(_checked(backend), timedelta(seconds=SECONDS), store=store)
    _Group.joined = True
    store.set_timeout(_NO_LIMIT)
    dist.set_timeout(_NO_LIMIT)
    return world


def watch(timeout: Any, position: Callable[[], int] | None = None) -> None:
    """Let a `Watchdog` end the run after ``timeout`` seconds without progress; 0 and None mean no limit.

    ``position`` returns the iterations done, once there is a loop. A group that was made elsewhere has limits of its
    own and is not watched.
    """
    from mmtrain import dist

    seconds = _seconds(timeout)
    if _Group.joined and position is not None:
        dist.set_timeout(_NO_LIMIT)  # also for the groups that strategy and checkpoint store have made
    if seconds and _Group.watchdog is None and (dist.world_size() == 1 or _Group.joined):
        store = _Group.store.clone() if _Group.joined else None
        _Group.watchdog = Watchdog(seconds, rank=dist.rank(), size=dist.world_size(), store=store, alarm=_Group.alarm)
        _Group.watchdog.errors = _Group.errors
    if _Group.watchdog is not None and position is not None:
        _Group.watchdog.position = position


def end_watch() -> None:
    """Stop what `watch` started."""
    watchdog, _Group.watchdog = _Group.watchdog, None
    if watchdog is not None:
        watchdog.close()


def leave() -> None:
    """Leave the group that `join` joined, once every rank has finished."""
    if not _Group.joined:
        return
    from mmtrain import dist

    dist.barrier()  # the store may end with rank 0, so no rank may still need it
    _Group.joined = False
    if _Group.alarm is not None:
        _Group.alarm.close()
        _Group.alarm = _Group.store = None
    dist.shutdown()


def end_process(status: int) -> None:
    """End a process that had joined a group, at once; return in a single process.

    Threads of gloo sometimes abort the interpreter while it exits, and those of a broken group may never end.
    """
    if not _Group.entered:
        return
    logging.shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def write_errors_to(directory: Path) -> None:
    """Set the directory for tracebacks and stacks of ranks."""
    _Group.errors = directory
    for listener in (_Group.alarm, _Group.watchdog):
        if listener is not None:
            listener.errors = directory


def share_failures() -> None:
    """From here on a failed run ends this process, so that `note` tells the other ranks; a command says so."""
    _Group.shares_failures = True


def note(error: BaseException) -> None:
    """Tell the other ranks what ends this one, before it closes anything that they may wait for."""
    if _Group.alarm is not None and _Group.shares_failures:
        _Group.alarm.note(describe(error, _Group.alarm.rank))


def report(failure: RankFailure) -> int | None:
    """Report this process's failure to all ranks, for one to print; return the status to exit with.

    Returns None if there is no other rank to report to: a single process, or one that has not joined yet.
    """
    alarm = _Group.alarm
    if alarm is None:
        return None
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it as soon as any rank is gone
    return alarm.report(replace(failure, rank=alarm.rank))


def report_before_joining(launcher: str, own: RankFailure, say: Callable[[str], object]) -> None:
    """Report a failure before the group is up, so that no rank waits; ``say`` prints it after the prefix it is given.

    Rank 0 prints its own failure, and that of another rank if it can be reached; otherwise that rank prints it.
    """
    try:
        world = recognise(launcher)
    except ConfigError:  # the command line is the same on every rank
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
    """Whether this process prints errors that all ranks meet: rank 0, or a single process."""
    return (_Group.alarm.rank if _Group.alarm is not None else rank_before_joining()) == 0


def _checked(backend: str | None) -> str | None:
    import torch

    if backend == "nccl" and not torch.cuda.is_available():
        return None  # MMEngine's configs usually name nccl, also for machines without CUDA
    if backend not in (None, "nccl", "gloo", "mpi", "cpu:gloo,cuda:nccl"):
        raise ConfigError(f"env_cfg.dist_cfg.backend is {backend!r}; expected 'nccl', 'gloo' or 'mpi'")
    return "cpu:gloo,cuda:nccl" if backend == "nccl" else backend


def _seconds(timeout: Any) -> float:
    """A limit of ``env_cfg.timeout`` in seconds; 0 for None."""
    return timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout or 0)
