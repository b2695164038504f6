"""Checkpoints that are complete or do not exist: written aside, hashed, renamed into place, verified when read."""

from mmtrain.checkpoint.foreign.load import Weights, load_weights
from mmtrain.checkpoint.foreign.matching import copy_matched, describe, match
from mmtrain.checkpoint.format.manifest import FileRecord, Manifest
from mmtrain.checkpoint.format.verify import Problem, find_problems
from mmtrain.checkpoint.lock import WorkDirLock
from mmtrain.checkpoint.reader import Checkpoint, LoadReport, open_checkpoint
from mmtrain.checkpoint.retention import Entry, Retention, RetirePolicy, to_delete
from mmtrain.checkpoint.store import CheckpointStore
from mmtrain.checkpoint.topology.base import Topology
from mmtrain.checkpoint.topology.find import find_topology
from mmtrain.checkpoint.topology.shared import SharedDisk
from mmtrain.checkpoint.write.pending import PendingSave
from mmtrain.files import Files, LocalFiles

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "Entry",
    "FileRecord",
    "Files",
    "LoadReport",
    "LocalFiles",
    "Manifest",
    "PendingSave",
    "Problem",
    "Retention",
    "RetirePolicy",
    "SharedDisk",
    "Topology",
    "Weights",
    "WorkDirLock",
    "copy_matched",
    "describe",
    "find_problems",
    "find_topology",
    "load_weights",
    "match",
    "open_checkpoint",
    "to_delete",
]
