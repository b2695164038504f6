"""A hook for tests/e2e/test_disk.py that runs a shell command."""

import subprocess

from mmtrain.registry import HOOKS


@HOOKS.register_module()
class ShellAt:
    """Runs a shell command at the end of an iteration; the command must succeed.

    It waits for a save in the background first, so that the command does not affect that save, however slow it is.
    """

    priority = "HIGHEST"

    def __init__(self, iteration, command):
        self.iteration, self.command = iteration, command

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.iteration:
            runner.checkpointer.finish(runner)
            subprocess.run(self.command, shell=True, check=True)
