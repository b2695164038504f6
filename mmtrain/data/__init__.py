"""The data of a run: an endless training stream with a position, and the loaders of validation and test."""

from mmtrain.data.build import build_eval_loader, build_train_stream
from mmtrain.data.collate import default_collate, pad_collate, pseudo_collate, resolve_collate
from mmtrain.data.eval_loader import EvalLoader, IterableEvalLoader
from mmtrain.data.iterable.stream import ForeignStream, IterableStream
from mmtrain.data.ledger import Ledger, build_ledger
from mmtrain.data.permutation import epoch_order
from mmtrain.data.sampler import BatchIndices, DefaultSampler, InfiniteSampler, PositionSampler
from mmtrain.data.stream import Stream, TrainStream

__all__ = [
    "BatchIndices",
    "DefaultSampler",
    "EvalLoader",
    "ForeignStream",
    "InfiniteSampler",
    "IterableEvalLoader",
    "IterableStream",
    "Ledger",
    "PositionSampler",
    "Stream",
    "TrainStream",
    "build_eval_loader",
    "build_ledger",
    "build_train_stream",
    "default_collate",
    "epoch_order",
    "pad_collate",
    "pseudo_collate",
    "resolve_collate",
]
