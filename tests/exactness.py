"""Run a config uninterrupted and with a crash, and compare all that both leave behind, bit for bit."""

import itertools
from pathlib import Path

import torch
from parts import Counter, logged, make_runner

from mmtrain.checkpoint import CheckpointStore
from mmtrain.checkpoint.foreign import deepspeed_files

VALUES = ("loss", "lr", "grad_norm", "accuracy", "smooth")


class Crash(BaseException):
    """Ends a run like a kill, as far as possible inside one process: no handler catches it."""


class CrashAt:
    """Raises `Crash` once, in the iteration, validation or save that ``where`` names."""

    priority = "LOWEST"

    def __init__(self, where, iteration):
        self.where, self.iteration = where, iteration

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self.where == "iteration" and runner.iter + 1 == self.iteration:
            raise Crash

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self.where == "validation" and runner.progress.iteration >= self.iteration and batch_idx == 1:
            raise Crash

    def before_save_checkpoint(self, runner, checkpoint):
        if self.where == "save" and runner.progress.iteration >= self.iteration:
            raise Crash


def train(work_dir, *, crash=None, hooks=(), resume=True, **changes):
    """Train, up to ``crash`` (`CrashAt`'s arguments) if given. Returns the runner."""
    hooks = [*hooks] if crash is None else [*hooks, CrashAt(*crash)]
    runner = make_runner(work_dir, custom_hooks=hooks, resume=resume, **changes)
    try:
        runner.train()
    except Crash:
        assert crash is not None
    else:
        assert crash is None, "the crash did not happen"
    return runner


def run(work_dir, *, custom_hooks=(), **options):
    """`train` with two hooks that have a state."""
    return train(work_dir, hooks=[Counter(0.9), Counter(0.5), *custom_hooks], **options)


def left_behind(work_dir):
    """Everything a finished run leaves: logged values, validation metrics, and the last checkpoint's contents."""
    store = CheckpointStore(work_dir)
    checkpoint, problems = store.newest_good()
    assert not problems
    tensors = {
        f"{section}/{name}": checkpoint.read(section, name)
        for section in ("model", "optimizer")
        for name in checkpoint.tensor_names(section)
    }
    engine = dict(deepspeed_files.contents(checkpoint.path))  # DeepSpeed's files have these tensors instead
    assert tensors or engine
    state = checkpoint.state()
    state.pop("log")  # times of iterations are among them
    store.close()
    return {
        "name": checkpoint.name,
        "train": logged(work_dir, *VALUES),
        "val": logged(work_dir, "loss", "accuracy", mode="val"),
        "state": state,
        "tensors": tensors,
        "engine": engine,
        "position": checkpoint.manifest.position,
    }


def assert_same(a, b, path="run"):
    """Bit equality of nested values, with the path of the first difference."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), f"{path}: {sorted(map(str, a.keys() ^ b.keys()))}"
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.layout) == (b.dtype, b.layout), path
        assert torch.equal(a.to_dense(), b.to_dense()), path
    else:
        assert repr(a) == repr(b), path  # equal floats have equal texts, and NaN equals NaN


def assert_exact(folder, *, crashes, first=None, later=None, **changes):
    """Compare an uninterrupted run with one that crashes at each of ``crashes``.

    ``first`` changes the config of its first start, ``later`` that of the others.
    """
    uninterrupted, broken = Path(folder) / "uninterrupted", Path(folder) / "broken"
    run(uninterrupted, **changes)
    merged = {**changes, **(first or {})}
    for crash in crashes:
        run(broken, crash=crash, **merged)
        merged = {**changes, **(later or {})}
    run(broken, **merged)
    assert_same(left_behind(uninterrupted), left_behind(broken))


def pairwise(factors):
    """Cases that contain every pair of values of two factors at least once (greedy; always the same list)."""
    names = list(factors)
    missing = {
        (a, x, b, y) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]
    }  # fmt: skip
    cases = []
    while missing:
        a, x, b, y = min(missing, key=repr)
        case = {a: x, b: y}
        for name in names:
            if name not in case:
                case[name] = max(factors[name], key=lambda value: _gain(case, name, value, missing))
        missing -= {(p, case[p], q, case[q]) for p, q in itertools.combinations(names, 2)}
        cases.append(case)
    return cases


def _gain(case, name, value, missing):
    pairs = [(other, case[other], name, value) for other in case] + [
        (name, value, other, case[other]) for other in case
    ]
    return sum(pair in missing for pair in pairs)
