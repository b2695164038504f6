"""Runs that record twice what they consume: in the ledger, and in a journal that shares no code with it."""

import json
from pathlib import Path

import exactness
import strategy_parts

from mmtrain import dist
from mmtrain.checkpoint import CheckpointStore
from mmtrain.data.ledger import order_of, read_span
from mmtrain.registry import DATASETS, HOOKS, MODELS


@DATASETS.register_module()
class NumberedTokens(strategy_parts.Tokens):
    """Samples that carry their own number through collate_fn to the model."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "number": index}


@MODELS.register_module()
class NumberedModel(strategy_parts.TinyLanguageModel):
    """Keeps the numbers of the batch that its forward was given."""

    def forward(self, number, **data):
        self.given = number.tolist()
        return super().forward(**data)


@HOOKS.register_module()
class SampleJournal:
    """A line for every iteration: the numbers that the model was given, in which update of which epoch."""

    priority = "LOWEST"

    def __init__(self, folder, start):
        self.folder, self.start = Path(folder), start

    def before_train(self, runner):
        self.path = self.folder / f"{self.start}_{runner.rank}.txt"

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.line = {"update": runner.progress.update, "iteration": runner.iter, "epoch": runner.epoch}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        with self.path.open("a") as file:
            file.write(json.dumps({**self.line, "given": runner.model.given}) + "\n")


def train(work_dir, *, start=0, batch=12, size=100, iterations=24, accumulation=2, crash=None, interval=4):
    """Continue to ``iterations``, or up to a crash, in all processes; a job of a group."""
    world = dist.world_size()
    cfg = strategy_parts.changes(world, iterations=iterations, accumulation=accumulation)
    cfg["model"]["type"] = "NumberedModel"
    cfg["train_dataloader"] = {"dataset": {"type": "NumberedTokens", "size": size}, "batch_size": batch // world}
    cfg["train_cfg"]["ledger"], cfg["val_dataloader"] = True, None
    cfg["default_hooks"]["checkpoint"]["interval"] = interval
    Path(work_dir).mkdir(exist_ok=True)
    crash = None if crash is None else ("iteration", crash)
    exactness.train(work_dir, crash=crash, hooks=[SampleJournal(work_dir, start)], **cfg)


def newest(work_dir):
    store = CheckpointStore(work_dir)
    checkpoint = store.newest_good()[0]
    store.close()
    return checkpoint


def by_ledger(record):
    """Update to the samples that a ledger says it consumed: the runs, expanded through the seed's order."""
    found = {}
    for values in record["runs"]:
        run = read_span(values)
        segment = record["segments"][run.segment]
        order = order_of(segment["order"], run.epoch)
        for k in range(run.count):
            start = run.start + k * run.stride
            update = run.update_at(start, segment["accumulative_counts"]) - 1
            found.setdefault(update, []).extend(order.take(start, start + run.length))
    return {update: sorted(samples) for update, samples in found.items()}


def by_journal(work_dir, *, updates):
    """Update to samples, and epoch to samples, of ``updates`` updates.

    What was done after the checkpoint that a later start resumed is left out. A rank without a sample gets
    another's, which is not counted.
    """
    lines = {}
    for path in Path(work_dir).glob("*_*.txt"):
        start = int(path.name.split("_")[0])
        lines.setdefault(start, []).extend(json.loads(line) for line in path.read_text().splitlines())
    begins = {start: min(line["update"] for line in found) for start, found in lines.items()}
    in_update, in_pass = {}, {}
    for start, found in sorted(lines.items()):
        end = min([updates, *(begin for later, begin in begins.items() if later > start)])
        together = {}
        for line in found:
            if line["update"] < end:
                together.setdefault((line["iteration"], line["update"], line["epoch"]), []).append(line["given"])
        for (_, update, epoch), given in together.items():
            samples = [number for numbers in given for number in numbers]
            if len(set(samples)) < len(given):  # fewer samples than ranks: the rest was given another's
                samples = sorted(set(samples))
            in_update.setdefault(update, []).extend(samples)
            in_pass.setdefault(epoch, []).extend(samples)
    return tuple({key: sorted(samples) for key, samples in found.items()} for found in (in_update, in_pass))
