"""The saves that the sweeps disturb, each on top of two good checkpoints, 10 and 20."""

from pathlib import Path

from checkpoint_helpers import save

from mmtrain.checkpoint import CheckpointStore, Retention


def native(directory: Path) -> None:
    (directory / "global_step").mkdir()
    (directory / "global_step" / "states.pt").write_bytes(b"x" * 100)


# name -> (iteration saved, name saved under, options of the store, of the save)
SCENES = {
    "new": (30, "iter_30.pth", {"keep": Retention(max_keep_ckpts=1)}, {"extra_writers": [native]}),
    "replace": (21, "iter_20.pth", {}, {}),
}


def play(scene: str, root: Path, files, *, blocking: bool = True):
    """Do the scene's save; the store's single thread makes the order of calls always the same."""
    iteration, name, options, save_options = SCENES[scene]
    store = CheckpointStore(root, fs=files, threads=1, **options)
    try:
        save(store, iteration, name=name, blocking=blocking, **save_options).wait()
    finally:
        store._pool.shutdown()
        store._stager.close()
