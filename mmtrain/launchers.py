"""The names of the launchers, which config, command line and launch/ share."""

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")
