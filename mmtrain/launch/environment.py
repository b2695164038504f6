"""Which launcher started this process, and its rank among the others, from environment variables alone."""

import os
import re
import subprocess
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mmtrain.errors import ConfigError
from mmtrain.launchers import LAUNCHERS

# (rank, size, rank on this machine), as Open MPI, then MPICH and Intel MPI, name them.
_MPI_NAMES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
_MPI_JOBS = ("OMPI_MCA_ess_base_jobid", "PMIX_NAMESPACE", "PMI_JOBID")


@dataclass(frozen=True, slots=True)
class World:
    """This process among those of a run, and where they meet: what ``torch.distributed`` reads from the environment."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    address: str
    port: int

    def variables(self) -> dict[str, str]:
        """The same as environment variables."""
        return {
            "RANK": str(self.rank), "WORLD_SIZE": str(self.size), "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address, "MASTER_PORT": str(self.port),
        }  # fmt: skip


def recognise(
    launcher: str = "none",
    environment: Mapping[str, str] | None = None,
    *,
    hostnames: Callable[[str], str] | None = None,
) -> World | None:
    """The world that a launcher has made, or None for a single process.

    ``torchrun`` is recognised whatever ``launcher`` says, because it sets variables that nothing else sets; ``slurm``
    and ``mpi`` must be named, because their variables are also set in an interactive allocation. ``hostnames`` returns
    the first machine of a SLURM node list.

    Raises ConfigError when the named launcher did not start this process, or did not say where the ranks meet.
    """
    env = os.environ if environment is None else environment
    if launcher not in LAUNCHERS:
        raise ConfigError(f"launcher is {launcher!r}; expected one of {', '.join(LAUNCHERS)}")
    if launcher == "slurm":
        return _slurm(env, hostnames or first_host)
    if launcher == "mpi":
        return _mpi(env)
    if "RANK" in env and "WORLD_SIZE" in env:
        return _pytorch(env)
    if launcher == "pytorch":
        raise ConfigError(
            "--launcher pytorch: RANK and WORLD_SIZE are not set, so torchrun did not start this process; "
            "use: torchrun --nproc-per-node=N tools/train.py CONFIG"
        )
    return None


def rank_before_joining(environment: Mapping[str, str] | None = None) -> int:
    """The rank that this process will have, according to the variables of any launcher; 0 without one."""
    env = os.environ if environment is None else environment
    for name in ("RANK", *(names[0] for names in _MPI_NAMES), "SLURM_PROCID"):
        if env.get(name, "").isdigit():
            return int(env[name])
    return 0


def _pytorch(env: Mapping[str, str]) -> World:
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    if size > 1 and "MASTER_PORT" not in env:
        raise ConfigError(
            "WORLD_SIZE is set but MASTER_PORT is not; start the processes with torchrun, which sets both"
        )
    port = _number(env, "MASTER_PORT") if "MASTER_PORT" in env else 0
    local = _number(env, "LOCAL_RANK") if "LOCAL_RANK" in env else 0
    return World("pytorch", rank, size, local, env.get("MASTER_ADDR", "127.0.0.1"), port)


def _slurm(env: Mapping[str, str], hostnames: Callable[[str], str]) -> World:
    if "SLURM_PROCID" not in env or "SLURM_NTASKS" not in env:
        raise ConfigError(
            "--launcher slurm: the variables SLURM_PROCID and SLURM_NTASKS are not set, so srun did not start this "
            "process; start it with srun, or with torchrun and no --launcher"
        )
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or "127.0.0.1"
    address = env.get("MASTER_ADDR") or hostnames(nodes)
    job = f"{env.get('SLURM_JOB_ID', '')}.{env.get('SLURM_STEP_ID', '')}"
    return World(
        "slurm", _number(env, "SLURM_PROCID"), _number(env, "SLURM_NTASKS"),
        _number(env, "SLURM_LOCALID") if "SLURM_LOCALID" in env else 0, address, port_of(job, env),
    )  # fmt: skip


def _mpi(env: Mapping[str, str]) -> World:
    names = next((names for names in _MPI_NAMES if names[0] in env and names[1] in env), None)
    if names is None:
        raise ConfigError(
            "--launcher mpi: neither Open MPI's nor MPICH's variables (OMPI_COMM_WORLD_RANK, PMI_RANK) are set, so "
            "mpirun did not start this process; start it with: mpirun -n N python tools/train.py CONFIG --launcher mpi"
        )
    rank, size = _number(env, names[0]), _number(env, names[1])
    if "MASTER_ADDR" not in env and _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", size) != size:
        raise ConfigError(
            "--launcher mpi over several machines needs MASTER_ADDR, the name of rank 0's: mpirun -x MASTER_ADDR=..."
        )
    job = next((env[name] for name in _MPI_JOBS if name in env), str(os.getppid()))
    address = env.get("MASTER_ADDR", "127.0.0.1")
    return World("mpi", rank, size, _number(env, names[2], 0), address, port_of(job, env))


def port_of(job: str, env: Mapping[str, str]) -> int:
    """``MASTER_PORT``, else a port that is the same in every process of a job and unlikely to be used by another job.

    It is in 10000-31999, below the ports that systems hand out to outgoing connections.
    """
    if "MASTER_PORT" in env:
        return _number(env, "MASTER_PORT")
    return 10000 + zlib.crc32(job.encode()) % 22000


def first_host(nodes: str) -> str:
    """The first machine of a SLURM node list such as ``gpu[003-007,012],login1``."""
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        match = re.match(r"([^,\[]+)(?:\[([^,\]-]+))?", nodes)
        return "".join(part or "" for part in match.groups()) if match else nodes


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and name not in env:
        return default
    try:
        return int(env[name])
    except ValueError:
        raise ConfigError(f"the environment variable {name} is {env[name]!r}; expected an integer") from None
