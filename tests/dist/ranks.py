"""Starts real processes: a persistent group that runs jobs, or one command on each rank."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATHS = [str(ROOT), *(str(ROOT / "tests" / name) for name in (".", "dist", "contract", "strategies"))]


SECONDS = 240  # for one job: ranks that wait for one another would do so for days


class RankError(Exception):
    """A job failed on some rank."""


_marks: list[socket.socket] = []


def free_port() -> int:
    """A port that the system does not give to others and that no other test process chooses.

    The port after it is kept open until this process ends, which marks this one as taken.
    """
    draw = random.SystemRandom()  # tests seed the other one
    while True:
        port = 2 * draw.randrange(61000 // 2, 65534 // 2)
        mark = socket.socket()
        try:
            mark.bind(("127.0.0.1", port + 1))
            with socket.socket() as probe:
                probe.bind(("", port))
        except OSError:
            mark.close()
            continue
        _marks.append(mark)
        return port


def environment(rank, size, port):
    cleared = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "OMPI_", "PMI_"))}
    return {
        **cleared, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(PATHS),
    }  # fmt: skip


class Group:
    """``size`` processes in one process group, which run jobs together."""

    def __init__(self, size):
        port = free_port()
        command = [sys.executable, str(ROOT / "tests" / "dist" / "rank_worker.py")]
        self.processes = [
            subprocess.Popen(
                command, env=environment(rank, size, port), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for rank in range(size)
        ]

    def run(self, module, function, **kwargs):
        """Run a job on all ranks; the results in the order of ranks. A job that hangs fails, and ends the group."""
        for process in self.processes:
            process.stdin.write(json.dumps({"module": module, "function": function, "kwargs": kwargs}) + "\n")
            process.stdin.flush()
        deadline = threading.Timer(SECONDS, self._give_up)
        deadline.start()
        answers = [
            json.loads(process.stdout.readline() or '{"error": "the process ended"}') for process in self.processes
        ]
        deadline.cancel()
        failed = [answer for answer in answers if "error" in answer]
        if failed:
            raise RankError("\n".join(answer["error"] + "\n" + answer.get("trace", "") for answer in failed))
        return [answer["result"] for answer in answers]

    def _give_up(self):
        """Let every process write its stacks, then end it, because the ranks wait for one another."""
        for process in self.processes:
            process.send_signal(signal.SIGABRT)

    def close(self):
        for process in self.processes:
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def start_all(command, size, **variables):
    """Start ``command`` once for each rank, as a launcher would."""
    port = free_port()
    return [
        subprocess.Popen(
            command, env={**environment(rank, size, port), **variables}, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )
        for rank in range(size)
    ]  # fmt: skip


def outcomes(processes, timeout=180):
    """(exit status, what was written to stderr) of each process; kills what is left at the timeout."""
    found = []
    try:
        for process in processes:
            errors = process.communicate(timeout=timeout)[1]
            found.append((process.returncode, errors))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return found
