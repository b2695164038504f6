"""The variables of each launcher."""

import pytest

from mmtrain.errors import ConfigError
from mmtrain.launch import recognise
from mmtrain.launch.environment import first_host, port_of, rank_before_joining

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29999"}
SRUN = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "777", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[003-006]",
}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


def test_a_single_process():
    assert recognise("none", {}) is None


@pytest.mark.parametrize("launcher", ["none", "pytorch"])
def test_torchrun_is_recognised_with_and_without_the_flag(launcher):
    world = recognise(launcher, TORCHRUN)
    assert (world.rank, world.size, world.local_rank, world.address, world.port) == (3, 4, 1, "node0", 29999)
    assert world.variables() == TORCHRUN


def test_slurm():
    world = recognise("slurm", SRUN, hostnames=lambda nodes: f"first of {nodes}")
    assert (world.rank, world.size, world.local_rank, world.address) == (5, 8, 1, "first of gpu[003-006]")
    assert 10000 <= world.port < 32000
    again = recognise("slurm", {**SRUN, "SLURM_PROCID": "6"}, hostnames=lambda nodes: "x")
    other = recognise("slurm", {**SRUN, "SLURM_JOB_ID": "778"}, hostnames=lambda nodes: "x")
    assert again.port == world.port != other.port


def test_only_slurm_variables_mean_an_interactive_allocation():
    assert recognise("none", SRUN) is None


def test_mpi():
    world = recognise("mpi", OPEN_MPI)
    assert (world.rank, world.size, world.local_rank, world.address) == (1, 2, 1, "127.0.0.1")
    assert recognise("mpi", {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "2"}).rank == 2


@pytest.mark.parametrize(
    ("launcher", "env", "words"),
    [
        ("slurm", {}, ["--launcher slurm", "srun"]),
        ("pytorch", {}, ["--launcher pytorch", "torchrun"]),
        ("mpi", {}, ["--launcher mpi", "mpirun"]),
        ("mpi", {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, ["MASTER_ADDR"]),
        ("none", {**TORCHRUN, "RANK": "x"}, ["RANK", "'x'"]),
        ("none", {"RANK": "0", "WORLD_SIZE": "2"}, ["MASTER_PORT"]),
        ("horovod", {}, ["'horovod'", "slurm"]),
    ],
)
def test_refused(launcher, env, words):
    with pytest.raises(ConfigError) as caught:
        recognise(launcher, env)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_master_port_is_honoured():
    assert port_of("1.0", {"MASTER_PORT": "4321"}) == 4321
    assert recognise("slurm", {**SRUN, "MASTER_PORT": "4321"}, hostnames=str).port == 4321


def test_the_first_host_of_a_list():
    assert first_host("gpu[003-007,012],login1") == "gpu003"
    assert first_host("alpha,beta") == "alpha"
    assert first_host("alpha") == "alpha"


def test_the_rank_is_known_before_joining():
    assert [rank_before_joining(env) for env in ({}, TORCHRUN, SRUN, OPEN_MPI)] == [0, 3, 5, 1]
