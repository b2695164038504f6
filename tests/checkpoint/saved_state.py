"""What the tests of stores share: a state with values of all kinds, and the check that a checkpoint has exactly it."""

from pathlib import Path

import torch

from mmtrain.checkpoint import Checkpoint, CheckpointStore


def tensors_of(iteration: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(iteration)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    model = {"w": randn(16, 8), "b": randn(8).bfloat16(), "count": torch.tensor(iteration), "none": torch.empty(0, 2)}
    model["tied"] = model["w"]
    return {"model": model, "optimizer": {"w/exp_avg": randn(16, 8), "w/step": torch.tensor(float(iteration))}}


def state_of(iteration: int) -> dict:
    return {"hooks": {"ema": {"steps": iteration, "table": torch.full((3,), iteration)}}, "progress": (iteration, 0.1)}


def save(store: CheckpointStore, iteration: int, *, name: str | None = None, blocking: bool = True, **options):
    fields = {"position": {"iteration": iteration, "epoch": iteration // 10}, "seed": 1, **options.pop("fields", {})}
    return store.save(
        name or f"iter_{iteration}.pth",
        tensors_of(iteration),
        state=state_of(iteration),
        rng={"torch": torch.arange(iteration, iteration + 5, dtype=torch.uint8)},
        manifest_fields=fields,
        blocking=blocking,
        **options,
    )


def assert_holds(checkpoint: Checkpoint, iteration: int) -> None:
    assert checkpoint.manifest.iteration == iteration
    for section, expected in tensors_of(iteration).items():
        into = {name: torch.full_like(tensor, 77) for name, tensor in expected.items()}
        report = checkpoint.load(section, into)
        assert not report.cast
        assert all(torch.equal(into[name], expected[name]) for name in expected)
    state, wanted = checkpoint.state(), state_of(iteration)
    assert torch.equal(state["hooks"]["ema"].pop("table"), wanted["hooks"]["ema"].pop("table"))
    assert state == wanted
    assert checkpoint.rng(0)["torch"].tolist() == list(range(iteration, iteration + 5))


def hidden(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name.startswith("."))
