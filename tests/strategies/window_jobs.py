"""Runs whose windows hold micro-batches of unequal sizes, and what they should be equal to."""

import parts
import torch
from torch import nn

from mmtrain import dist
from mmtrain.dtensor import full_tensor
from mmtrain.optim import OptimWrapper
from mmtrain.registry import DATA_SAMPLERS, DATASETS, MODELS, OPTIM_WRAPPERS


@DATASETS.register_module(force=True)
class Sentences(torch.utils.data.Dataset):
    """Points of which a varying number of targets count: the sample's "tokens"."""

    def __init__(self, size=12, equal=False):
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(size, 5, 4, generator=generator)
        self.y = self.x.sum(-1) + torch.randn(size, 5, generator=generator)
        lengths = torch.full((size,), 5) if equal else torch.randint(1, 6, (size,), generator=generator)
        self.mask = torch.arange(5) < lengths[:, None]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.y[index], "mask": self.mask[index]}


class StreamedSentences(torch.utils.data.IterableDataset):
    def __init__(self, size=12):
        self.inner = Sentences(size)

    def __iter__(self):
        rank, world = dist.data_rank(), dist.data_size()
        return iter([self.inner[index] for index in range(rank, len(self.inner), world)])

    def __len__(self):
        return len(range(dist.data_rank(), len(self.inner), dist.data_size()))


@DATA_SAMPLERS.register_module(force=True)
class InOrder:
    """A sampler of one's own."""

    def __init__(self, dataset, seed):
        self.size = len(dataset)

    def __iter__(self):
        return iter(range(dist.data_rank(), self.size, dist.data_size()))

    def __len__(self):
        return len(range(dist.data_rank(), self.size, dist.data_size()))


DATASETS.register_module(module=StreamedSentences, force=True)


@MODELS.register_module(force=True)
class Regressor(nn.Module):
    """Returns the mean over samples, or over tokens with their number (as ``kind``: a tensor or an int)."""

    def __init__(self, tokens=None):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        self.tokens = tokens

    def forward(self, x, y, mask):
        squares = (self.layer(x).squeeze(-1) - y) ** 2
        if self.tokens is None:
            return {"loss": squares.mean()}
        count = mask.sum()
        return {"loss": squares[mask].mean(), "num_tokens": int(count) if self.tokens == "int" else count}


@MODELS.register_module(force=True)
class OwnStepRegressor(Regressor):
    def train_step(self, data, optim_wrapper):
        with optim_wrapper.optim_context(self):
            loss = self(**data)["loss"]
        optim_wrapper.update_params(loss)
        return {"loss": loss}


@OPTIM_WRAPPERS.register_module(force=True)
class OwnStepWrapper(OptimWrapper):
    """Overrides ``step()``, as MMEngine's documentation teaches."""

    def step(self, **kwargs):
        self.optimizer.step(**kwargs)


def train(
    work_dir,
    batch_size,
    accumulation,
    *,
    data=None,
    epochs=3,
    model=None,
    wrapper="OptimWrapper",
    validation=None,
    ready_made=None,
    **changes,
):
    """The weights, as lists, that a run with plain SGD ends with."""
    loader = {"dataset": data or {"type": "Sentences"}, "batch_size": batch_size, "sampler": {
        "type": "DefaultSampler", "shuffle": False}, **changes.pop("loader", {})}  # fmt: skip
    cfg = parts.config(work_dir, **changes)
    cfg |= {
        "model": {"type": "Regressor", **(model or {})},
        "train_dataloader": ready_made or {key: value for key, value in loader.items() if value is not None},
        "train_cfg": {"by_epoch": True, "max_epochs": epochs},
        "optim_wrapper": {
            "type": wrapper, "optimizer": {"type": "SGD", "lr": 0.1}, "accumulative_counts": accumulation,
            **changes.get("optim_wrapper", {}),
        },
        "param_scheduler": None,
        "val_dataloader": validation,
    }  # fmt: skip
    from mmengine.config import Config

    from mmtrain.runner import FlexibleRunner

    runner = FlexibleRunner.from_cfg(Config(cfg))
    runner.train()
    return {name: full_tensor(value).tolist() for name, value in runner.strategy.model_state().items()}


def refused(*args, **kwargs):
    try:
        train(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"
