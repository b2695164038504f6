"""Where the processes of a run find one another, and how a rank that fails before that is reported.

Rank 0 opens a store at the world's address, unless torchrun's agent provides one. Every rank signs it; a rank that
fails first, for example while it reads its config, writes its failure instead, so that rank 0 does not wait for it and
can report why.

torch's rendezvous expects all ranks to arrive. When some do not, it waits for its timeout and does not say which;
when one fails before it joins, the others wait as long. That is what this module adds.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from mmtrain.errors import ConfigError, RunError
from mmtrain.launch.alarm import ACKNOWLEDGED_KEY, FAILURE_KEY, REPORTED_KEY
from mmtrain.launch.environment import World
from mmtrain.launch.failure import RankFailure

SECONDS = 300.0  # how long ranks wait for one another at the start
HEARING = 15.0  # how long a rank that failed waits for another to report it
_ANSWER = 20.0  # something is listening by now; what does not answer within this time is another program
_HERE = "mmtrain/here"
_PREFIX = "mmtrain"


def wait_for_all(store: Any, world: World, seconds: float = SECONDS) -> None:
    """Sign the store; rank 0 returns when all ranks have. Raises RunError for ranks that did not come, or failed."""
    store.set(f"{_HERE}/{world.rank}", "")
    missing = set(range(world.size)) if world.rank == 0 else set()
    deadline = time.monotonic() + seconds
    while missing:
        missing -= {rank for rank in missing if store.check([f"{_HERE}/{rank}"])}
        if missing and store.check([FAILURE_KEY]):
            raise RunError("another rank failed at the start")  # the alarm reports which one, and why
        if missing and time.monotonic() > deadline:
            names = ", ".join(map(str, sorted(missing)[:8])) + (" ..." if len(missing) > 8 else "")
            raise RunError(
                f"{len(missing)} of {world.size} processes (rank {names}) did not come to {world.address}:{world.port} "
                f"within {seconds:g} seconds; look at what they print, and whether all of them were started"
            )
        time.sleep(0.05)


def report_to_rank_0(world: World, own: RankFailure) -> bool:
    """Write a failure for rank 0 before the group is up; return whether rank 0 reported it, or an earlier one."""
    if world.rank == 0:
        return False
    try:
        store = open_store(world, HEARING)
        store.compare_set(FAILURE_KEY, "", json.dumps(asdict(own)))
        reported = _wait(lambda: store.check([REPORTED_KEY]))
        store.add(ACKNOWLEDGED_KEY, 1)
    except Exception:
        return False
    return reported


def announce_as_rank_0(world: World, own: RankFailure) -> None:
    """Show the other ranks the failure that rank 0 printed, before the store ends with this process."""
    try:
        store = open_store(world, HEARING)
        store.compare_set(FAILURE_KEY, "", json.dumps(asdict(own)))
        store.set(REPORTED_KEY, "")
        _wait(lambda: store.add(ACKNOWLEDGED_KEY, 0) >= world.size - 1)
    except Exception:  # the port is taken, or they have given up
        return


def _wait(happened: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + HEARING
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def open_store(world: World, seconds: float = SECONDS) -> Any:
    """The store at the world's address, which rank 0 opens; with torchrun's agent, a part of it for each attempt.

    The agent's store lives on when it starts the processes again (``--max-restarts`` with a given ``--master-port``);
    torch would then read the addresses of the processes that are gone.
    Raises ConfigError for a port that is taken, RunError where rank 0 is not found.
    """
    from torch.distributed import PrefixStore

    agent = _is_in_agent()
    prefix = f"{_PREFIX}/attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if agent else _PREFIX
    hosts = world.rank == 0 and not agent
    if not hosts:
        _wait_for_port(world, seconds)
    store = _answering(world, hosts=hosts, seconds=min(seconds, _ANSWER))
    store.set_timeout(timedelta(seconds=seconds))
    return PrefixStore(prefix, store)


def store_host() -> str:
    """The process that the store is in, as a message calls it."""
    return "torchrun's agent, which the ranks communicate through" if _is_in_agent() else "rank 0"


def _is_in_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _answering(world: World, *, hosts: bool, seconds: float) -> Any:
    """The store itself. torch waits forever if another program listens there: hence the thread."""
    from torch.distributed import TCPStore

    limit = timedelta(seconds=seconds)
    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(TCPStore(world.address, world.port, is_master=hosts, timeout=limit, wait_for_workers=False))
        except RuntimeError as error:  # DistNetworkError
            answer.append(error)

    thread = threading.Thread(target=ask, name="mmtrain-meeting", daemon=True)
    thread.start()
    thread.join(seconds + 5.0)
    if answer and not isinstance(answer[0], RuntimeError):
        return answer[0]
    if hosts and answer and ("EADDRINUSE" in str(answer[0]) or "in use" in str(answer[0])):
        raise ConfigError(
            f"port {world.port} of {world.address}, where the ranks are to meet, is taken by another program; set the "
            "environment variable MASTER_PORT to a free port, the same on all ranks"
        )
    raise _unreachable(world, seconds)


def _wait_for_port(world: World, seconds: float) -> None:
    """Wait until something listens at the address; torch would write pages of warnings while it waits."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((world.address, world.port), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise _unreachable(world, seconds) from None
            time.sleep(0.2)


def _unreachable(world: World, seconds: float) -> RunError:
    return RunError(
        f"rank 0 could not be reached at {world.address}:{world.port} within {seconds:g} seconds; it "
        "did not start, ended at once, or a firewall is between them (MASTER_ADDR and MASTER_PORT say where to meet)"
    )
