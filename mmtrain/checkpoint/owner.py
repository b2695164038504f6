"""Who a process is, told so that another one can say whether it still lives.

A process number alone is reused; with the time it was started (field 22 of ``/proc/<pid>/stat``, in clock ticks since
boot, see proc(5)) and the boot's id it is unique on one machine.
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
    """When process ``pid`` was started, in clock ticks since boot; 0 if the system does not say, None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None if Path("/proc/self/stat").exists() or not _signalable(pid) else 0
    after_name = text.rpartition(")")[2].split()  # the name, in brackets, may hold spaces and brackets itself
    return None if after_name[0] in ("Z", "X") else int(after_name[19])


def new_token() -> str:
    """A name for this process that fits into a file name, with a random end: ``host-boot-pid-start-random``."""
    pid = os.getpid()
    return f"{_short(host())}-{_short(_boot_id())}-{pid}-{start_time(pid) or 0}-{secrets.token_hex(4)}"


def is_other_alive(token: str, *, unknown: bool) -> bool:
    """Whether ``token`` is of a living process other than this one; ``unknown`` is the answer for other machines."""
    fields = re.fullmatch(r"([0-9a-f]+)-([0-9a-f]+)-(\d+)-(\d+)-[0-9a-f]+", token)
    if fields is None:
        return False
    host_hash, boot_hash, pid, started = fields[1], fields[2], int(fields[3]), int(fields[4])
    if host_hash != _short(host()):
        return unknown
    if boot_hash != _short(_boot_id()):
        return False
    return pid != os.getpid() and start_time(pid) == started


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
