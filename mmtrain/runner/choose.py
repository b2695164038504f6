"""Where a run starts: the choice made from ``resume`` and ``load_from``, by the table in docs/resume.md.

It is made before anything that draws random numbers is built, because the seed may be the checkpoint's.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtrain import dist
from mmtrain.checkpoint import Checkpoint, CheckpointStore
from mmtrain.checkpoint.discover import newest_good
from mmtrain.checkpoint.format.manifest import MANIFEST
from mmtrain.checkpoint.format.verify import Problem, Verify
from mmtrain.errors import CheckpointError, ConfigError


@dataclass
class StartPoint:
    """``checkpoint`` is the one to continue from, or None; ``weights_from`` the path of weights to load.

    ``is_named``: the config names the checkpoint; ``starts_over``: the run was asked to continue, but no earlier start
    reached a checkpoint. ``notices`` are lines for the log.
    """

    checkpoint: Checkpoint | None = None
    weights_from: str | None = None
    is_named: bool = False
    starts_over: bool = False
    verify: Verify = "full"
    notices: list[str] = field(default_factory=list)

    @property
    def seed(self) -> int | None:
        """The seed of the run that is continued."""
        return self.checkpoint.manifest.seed if self.checkpoint is not None else None

    def is_in(self, root: Path) -> bool:
        """Whether the checkpoint is one of those in ``root``."""
        return self.checkpoint is not None and self.checkpoint.path.parent.resolve() == root.resolve()


def choose_start(cfg: Any, store: CheckpointStore, *, task: str, logger: logging.Logger) -> StartPoint:
    """Choose by ``resume`` and ``load_from``; a collective.

    Raises ConfigError or CheckpointError that names the fault.
    """
    verify = (cfg.get("load_options") or {}).get("verify", "full")
    start = StartPoint(verify=verify)
    if store.topology.is_divided:
        start.notices.append(
            f"Ranks do not share {store.root}: {store.topology}; each disk has a part of a checkpoint."
        )
    resume = cfg.get("resume", False)
    load_from = cfg.get("load_from")
    if task != "train":
        if load_from is None:
            raise ConfigError(f"{task} needs weights: set load_from, or name a checkpoint on the command line")
        start.weights_from = str(load_from)
    elif resume is not False:
        _Choice(store, start, logger).choose(resume, load_from)
    elif load_from is not None:
        start.weights_from = str(load_from)
    return start


class _Choice:
    """Fills a `StartPoint` for a run that is asked to resume."""

    def __init__(self, store: CheckpointStore, start: StartPoint, logger: logging.Logger) -> None:
        self._store = store
        self._start = start
        self._logger = logger

    def choose(self, resume: Any, load_from: Any) -> None:
        if resume == "auto" or (resume is True and load_from is None):
            self._newest_in_store(load_from if resume == "auto" else None)
        elif resume is True:
            self._at(Path(load_from).expanduser())
        elif isinstance(resume, str):
            self._by_name(resume, Path(load_from).expanduser() if load_from is not None else self._store.root)
        elif load_from is not None:
            self._start.weights_from = str(load_from)

    def _newest_in_store(self, weights: str | None) -> None:
        checkpoint, problems = self._store.newest_good(self._start.verify)
        root = self._store.root
        if self._take_newest(checkpoint, problems, root):
            return
        self._start.starts_over = True
        if weights is not None:
            self._start.weights_from = weights
            self._start.notices.append(f"No checkpoint in {root}: starting from the weights of {weights}.")
        else:
            self._start.notices.append(f"No checkpoint in {root}: starting from scratch.")

    def _take_newest(self, checkpoint: Checkpoint | None, problems: list[Problem], root: Path) -> bool:
        """Take the newest good checkpoint of a directory and report the skipped ones; False if there is none."""
        for problem in problems if dist.is_main() else ():
            self._logger.warning("Skipped a damaged checkpoint: %s", problem)
        if checkpoint is not None:
            self._start.checkpoint = checkpoint
            self._start.notices.append(f"Auto resumed from the latest checkpoint {checkpoint.path}.")
        elif problems:
            raise CheckpointError(f"all checkpoints in {root} are damaged: " + "; ".join(map(str, problems)))
        return checkpoint is not None

    def _at(self, path: Path) -> None:
        """A checkpoint, or a directory of checkpoints: the newest good one in it."""

        def is_checkpoint() -> bool:
            in_root = not path.is_absolute() and (self._store.root / path).exists()
            return in_root or not path.is_dir() or (path / MANIFEST).exists() or path.suffix == ".pth"

        if dist.on_main(is_checkpoint):
            self._exactly(path)
            return
        entry, problems = dist.on_main(lambda: newest_good(path, verify=self._start.verify))
        checkpoint = None if entry is None else self._store.open_on_all(path / entry.name, "size")
        if not self._take_newest(checkpoint, problems, path):
            raise CheckpointError(f"{path} is not a checkpoint and contains none, so there is nothing to resume")

    def _by_name(self, name: str, folder: Path) -> None:
        """The checkpoint of that name in ``folder``; a ``load_from`` that is a checkpoint itself decides alone."""
        if dist.on_main(lambda: folder.is_file() or (folder / MANIFEST).exists()):
            self._logger.warning("resume=%r is ignored, because load_from names a checkpoint: %s", name, folder)
            self._exactly(folder)
        else:
            self._exactly(folder / name)

    def _exactly(self, path: Path) -> None:
        if path.is_file():
            raise ConfigError(
                f"resume=True needs a checkpoint directory, but {str(path)!r} is a weights file, which has no position "
                "in a run. To start from its weights, set resume=False, load_from=..."
            )
        self._start.checkpoint = self._store.open_on_all(path, self._start.verify)
        self._start.is_named = True
        self._start.notices.append(f"Resumed from the checkpoint {self._start.checkpoint.path}.")
