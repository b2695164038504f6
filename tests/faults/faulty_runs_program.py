"""Reads ``work_dir mode k`` lines; for each, a child process trains there and a fault occurs in call k of its saves.

A call is any by which a save changes the disk: Python's own functions are wrapped, below everything that mmtrain wraps
itself. Logs do not count. ``mode``: ``none`` counts, ``kill`` is SIGKILL in that call, anything else an error's name.
"""

import errno
import os
import sys
from pathlib import Path

import torch
import torch._dynamo  # the first optimizer would import it, again in every child
from parts import Counter, make_runner

CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


class Faults:
    """Wraps the functions of `os` that change the disk under ``root``."""

    def __init__(self, root: Path, mode: str, at: int) -> None:
        self.root, self.mode, self.at = str(root.absolute()) + os.sep, mode, at
        self.count = 0
        for name in CALLS:
            setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name, real):
        def call(target, *args, **kwargs):
            if self._is_save(name, target, args):
                self.count += 1
                if self.count == self.at:
                    self._fail(name, target, args, real)
            return real(target, *args, **kwargs)

        return call

    def _is_save(self, name, target, args) -> bool:
        if name == "open" and not (args and args[0] & (os.O_WRONLY | os.O_RDWR)):
            return False
        path = str(Path(f"/proc/self/fd/{target}").readlink() if isinstance(target, int) else Path(target).absolute())
        inside = path[len(self.root) :] if path.startswith(self.root) else ""
        return bool(inside) and inside[:2] != "20" and "lock" not in inside  # logs are in directories named by date

    def _fail(self, name, target, args, real) -> None:
        if name == "write":
            real(target, args[0][: len(args[0]) // 2])
        if self.mode == "kill":
            os.kill(os.getpid(), 9)
        code = getattr(errno, self.mode)
        raise OSError(code, os.strerror(code), str(target))


def train(work_dir: Path) -> None:
    """Two and a half epochs with everything that writes: checkpoints, retention, the best, exported weights."""
    checkpoint = {
        "type": "CheckpointHook", "interval": 3, "max_keep_ckpts": 2, "keep_every": 6, "weights_interval": 6,
        "save_best": "accuracy", "async_save": os.environ["FAULT_ASYNC"] == "1",
    }  # fmt: skip
    make_runner(
        work_dir,
        resume=True,
        train_cfg={"max_iters": 14, "val_interval": 4},
        custom_hooks=[Counter(0.9), Counter(0.5)],
        default_hooks={"logger": {"type": "LoggerHook", "interval": 1}, "progress": None, "checkpoint": checkpoint},
    ).train()


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        work_dir, mode, k = line.rsplit(maxsplit=2)
        child = os.fork()
        if child == 0:
            status = 0
            faults = Faults(Path(work_dir), mode, int(k))
            try:
                train(Path(work_dir))
            except Exception as error:  # the parent gets the status and continues with the next line
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                status = 1
            if mode == "none":
                Path(work_dir).with_suffix(".calls").write_text(str(faults.count))
            os._exit(status)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
