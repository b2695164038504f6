"""Whether two runs, on whatever engines, are the same mathematics."""

from contextlib import nullcontext

import pytest
from parts import logged

from mmtrain.checkpoint import CheckpointStore
from mmtrain.strategies.zero import universal

TOLERANCE = 1e-5


def by_name(checkpoint, folder):
    """The tensors of a checkpoint, even if DeepSpeed wrote them."""
    native = checkpoint.manifest.meta.get("native")
    return nullcontext(checkpoint) if native is None else universal.opened(checkpoint.path, native, room=folder)


def assert_close(found, expected, *, tolerance=TOLERANCE):
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=tolerance, abs=1e-7), f"step {step}"


def assert_same_run(folder, expected, *, tolerance=TOLERANCE):
    """Losses, norms and rates of every iteration, metrics of every validation, and the last weights and averages."""
    names = ("loss", "accuracy", "lr")
    assert_close(logged(folder, *names), logged(expected, *names), tolerance=tolerance)
    norms = [{k: v for k, v in logged(f, "grad_norm").items() if v[0] is not None} for f in (folder, expected)]
    assert_close(*norms, tolerance=10 * tolerance)
    assert_close(
        logged(folder, "loss", "accuracy", mode="val"), logged(expected, "loss", "accuracy", mode="val"),
        tolerance=tolerance,
    )  # fmt: skip
    last, other = (CheckpointStore(path).newest_good()[0] for path in (folder, expected))
    assert last.name == other.name
    with by_name(last, folder) as found:
        for section in ("model", "optimizer"):
            assert sorted(found.tensor_names(section)) == sorted(other.tensor_names(section))
            for name in other.tensor_names(section):
                a, b = found.read(section, name).double(), other.read(section, name).double()
                assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-9, f"{section}/{name}"
    averages = [checkpoint.state()["hooks.EMAHook"]["averages"] for checkpoint in (last, other)]
    assert averages[0].keys() == averages[1].keys()
    assert all((averages[0][name] - averages[1][name]).abs().max() < 1e-5 for name in averages[0])
