"""Checkpoints that exist only when they are proven: written aside, hashed, renamed into place, verified when read."""

from mmtrain.checkpoint.disks import Disks, find_disks
from mmtrain.checkpoint.foreign import Weights, load_weights
from mmtrain.checkpoint.lock import WorkDirLock
from mmtrain.checkpoint.manifest import FileRecord, Manifest
from mmtrain.checkpoint.matching import copy_matched, describe, match
from mmtrain.checkpoint.reader import Checkpoint, LoadReport
from mmtrain.checkpoint.retention import Entry, Retention, to_delete
from mmtrain.checkpoint.saving import PendingSave
from mmtrain.checkpoint.storage import Files, LocalFiles
from mmtrain.checkpoint.store import CheckpointStore, open_checkpoint
from mmtrain.checkpoint.verify import Problem, find_problems

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
