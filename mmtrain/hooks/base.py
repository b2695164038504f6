"""The base class of hooks: MMEngine's, with two points more. Nothing else in mmtrain imports ``mmengine.hooks``."""

from typing import Any

from mmengine.hooks import Hook as MMEngineHook


class Hook(MMEngineHook):
    """Something that happens at fixed points of a run; override the methods of the points you want.

    The points and their arguments are MMEngine's (drawn in ``mmtrain/runner/hook_points.py``). ``priority`` orders the
    hooks of one point. A hook that has ``state_dict`` and ``load_state_dict`` is saved with every checkpoint and
    restored at a resume, without doing anything else for it.
    """

    stages = (*MMEngineHook.stages, "after_save_checkpoint", "on_exception")

    def after_save_checkpoint(self, runner: Any, entry: Any) -> None:
        """Called when the checkpoint ``entry`` is complete on disk."""

    def on_exception(self, runner: Any, error: BaseException) -> None:
        """Called instead of everything that is left when ``error`` ends the run, Ctrl-C included."""
