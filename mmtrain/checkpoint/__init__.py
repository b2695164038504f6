"""Checkpoints that exist only when they are proven: written aside, hashed, renamed into place, verified when read."""

from mmtrain.checkpoint.foreign.load import Weights, load_weights
from mmtrain.checkpoint.foreign.matching import copy_matched, describe, match
from mmtrain.checkpoint.format.manifest import FileRecord, Manifest
from mmtrain.checkpoint.format.verify import Problem, find_problems
from mmtrain.checkpoint.lock import WorkDirLock
from mmtrain.checkpoint.reader import Checkpoint, LoadReport
from mmtrain.checkpoint.retention import Entry, Retention, RetirePolicy, to_delete
from mmtrain.checkpoint.store import CheckpointStore, open_checkpoint
from mmtrain.checkpoint.topology.disks import Disks, find_disks
from mmtrain.checkpoint.write.saver import PendingSave
from mmtrain.files import Files, LocalFiles

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "Disks",
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
    "Weights",
    "WorkDirLock",
    "copy_matched",
    "describe",
    "find_disks",
    "find_problems",
    "load_weights",
    "match",
    "open_checkpoint",
    "to_delete",
]
