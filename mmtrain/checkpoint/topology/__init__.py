"""Which ranks share a disk: `SharedDisk` and `DividedDisks` are the two kinds of `Topology`."""
