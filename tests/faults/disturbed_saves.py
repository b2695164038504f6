"""The saves that the sweeps disturb, each on top of two good checkpoints, 10 and 20."""

from pathlib import Path

from saved_state import save

from mmtrain.checkpoint import CheckpointStore, Retention, RetirePolicy


def native(directory: Path) -> None:
    (directory / "global_step").mkdir()
    (directory / "global_step" / "states.pt").write_bytes(b"x" * 100)


RETIRE = RetirePolicy(Retention(max_keep_ckpts=1))
# name -> (iteration saved, name saved under, options of the save)
SCENES = {
    "new": (30, "iter_30.pth", {"extra_writers": [native], "retire": RETIRE}),
    "replace": (21, "iter_20.pth", {}),
}


def play(scene: str, root: Path, files, *, blocking: bool = True):
    """Do the scene's save; the store's single thread makes the order of calls always the same."""
    iteration, name, options = SCENES[scene]
    store = CheckpointStore(root, fs=files, threads=1)
    try:
        save(store, iteration, name=name, blocking=blocking, **options).wait()
    finally:
        store.close()
