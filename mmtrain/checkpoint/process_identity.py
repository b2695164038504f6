"""An identity of a process by which another process can tell whether it is still alive.

Process numbers are reused. Together with the process's start time (field 22 of ``/proc/<pid>/stat``, in clock
ticks since boot, see proc(5)) and the boot's id it is unique on one machine.
"""

import contextlib
import os
import re
import secrets
import socket
from functools import lru_cache
from pathlib import Path

import xxhash


def host() -> str:
    """The name of this machine."""
    return socket.gethostname()


def start_time(pid: int) -> int | None:
    """The start time of a process in clock ticks since boot; 0 if the system has no /proc, None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None if Path("/proc/self/stat").exists() or not _signalable(pid) else 0
    after_name = text.rpartition(")")[2].split()  # the name, in brackets, may contain spaces and brackets itself
    return None if after_name[0] in ("Z", "X") else int(after_name[19])


def new_token() -> str:
    """A name for this process that fits into a file name, with a random end: ``host-boot-pid-start-random``."""
    pid = os.getpid()
    return f"{_short(host())}-{_short(_boot_id())}-{pid}-{start_time(pid) or 0}-{secrets.token_hex(4)}"


def is_other_alive(token: str, *, unknown: bool) -> bool:
    """Whether ``token`` belongs to a living process other than this one.

    ``unknown`` is the answer for a process of another machine.
    """
    fields = re.fullmatch(r"([0-9a-f]+)-([0-9a-f]+)-(\d+)-(\d+)-[0-9a-f]+", token)
    if fields is None:
        return False
    pid = int(fields[3])
    if fields[1] != _short(host()):
        return unknown
    if fields[2] != _short(_boot_id()):
        return False
    return pid != os.getpid() and start_time(pid) == int(fields[4])


@lru_cache(maxsize=1)
def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _short(text: str) -> str:
    return xxhash.xxh32_hexdigest(text.encode())


def _signalable(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
