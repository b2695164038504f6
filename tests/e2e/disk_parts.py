"""What tests/e2e/test_disk.py needs inside of a run."""

import subprocess

from mmtrain.registry import HOOKS


@HOOKS.register_module()
class ShellAt:
    """Does something to the disk at the end of an iteration; it must succeed.

    A save in the background is waited for first: it meets the disk as it was when it began, however slow it is.
    """

    priority = "HIGHEST"

    def __init__(self, iteration, command):
        self.iteration, self.command = iteration, command

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.iteration:
            runner.checkpointer.finish(runner)
            subprocess.run(self.command, shell=True, check=True)
