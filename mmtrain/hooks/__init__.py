"""The hooks that come with mmtrain. Importing this folder registers them."""

from mmtrain.hooks.base import Hook
from mmtrain.hooks.checkpoint import CheckpointHook
from mmtrain.hooks.early_stopping import EarlyStoppingHook
from mmtrain.hooks.ema import EMAHook
from mmtrain.hooks.ledger import LedgerHook
from mmtrain.hooks.logger import LoggerHook
from mmtrain.hooks.memory import EmptyCacheHook, SyncBuffersHook
from mmtrain.hooks.named import DistSamplerSeedHook, IterTimerHook, ParamSchedulerHook, RuntimeInfoHook
from mmtrain.hooks.profiler import ProfilerHook
from mmtrain.hooks.progress_bar import ProgressBarHook
from mmtrain.hooks.text_sample import TextSampleHook

__all__ = [
    "CheckpointHook",
    "DistSamplerSeedHook",
    "EMAHook",
    "EarlyStoppingHook",
    "EmptyCacheHook",
    "Hook",
    "IterTimerHook",
    "LedgerHook",
    "LoggerHook",
    "ParamSchedulerHook",
    "ProfilerHook",
    "ProgressBarHook",
    "RuntimeInfoHook",
    "SyncBuffersHook",
    "TextSampleHook",
]
