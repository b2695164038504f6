"""Which ranks see which disk, and what follows for the files of a checkpoint."""
