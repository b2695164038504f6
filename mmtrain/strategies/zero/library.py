"""DeepSpeed as a quiet library: imported late, no banners, no kernels compiled at run time, no pickles run."""

import contextlib
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mmtrain.errors import CheckpointError, ConfigError

_logger = logging.getLogger("mmtrain.deepspeed")
# What its files hold besides tensors and plain values; `torch.load` allows nothing else.
_SAFE = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}
_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# Warnings about what this strategy does on purpose.
_KNOWN = ("untested optimizer", "device_count", "Unable to find latest file")


def load() -> Any:
    """Import DeepSpeed, once and silently. Raises ConfigError if it is not installed."""
    if "deepspeed" in sys.modules:
        return sys.modules["deepspeed"]
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "strategy.type: DeepSpeedStrategy needs the package deepspeed, which is not installed; pip install "
            "deepspeed, or use FSDPStrategy, which shards as ZeRO-3 does"
        )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with quiet():
        import deepspeed
    _redirect_log()
    _leave_kernels_out(deepspeed)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # deprecated names that DeepSpeed still calls
        warnings.filterwarnings("ignore", f".*{name}.* is deprecated", FutureWarning)
    return deepspeed


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what Python code prints, and warnings of import, off the terminal."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield


def leave_group() -> None:
    """Leave the process group, and reset what DeepSpeed knows of it: a later run makes another."""
    from deepspeed import comm

    if comm.comm.cdb is not None:
        comm.destroy_process_group()
        comm.comm.cdb = None
    else:
        torch.distributed.destroy_process_group()


def _redirect_log() -> None:
    """Warnings of DeepSpeed go into the run's log; its handlers, which write to stdout, are removed."""
    from deepspeed.utils import logger

    logger.handlers[:] = [_ToRunLog()]
    logger.setLevel(logging.WARNING)


class _ToRunLog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        message = " ".join(record.getMessage().split())
        if not any(words in message for words in _KNOWN):
            _logger.log(record.levelno, "DeepSpeed: %s", message)


def _leave_kernels_out(deepspeed: Any) -> None:
    """Let it communicate through torch if its kernels were not built when it was installed.

    Otherwise it compiles the one for shared memory at start: half a minute, and an error without a compiler.
    """
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops import __compatible_ops__

    name = "deepspeed_shm_comm"
    if not installed_ops.get(name):
        __compatible_ops__[name] = False


@contextlib.contextmanager
def plain_files(what: str) -> Iterator[None]:
    """Every ``torch.load`` inside allows only tensors, plain values and DeepSpeed's few data classes.

    Raises CheckpointError, naming ``what``, for a file that holds anything else; none of its code was run.
    """
    # "Force" wins over weights_only=False, which DeepSpeed passes. Together with its opposite, which many set for
    # MMEngine's files, torch loads nothing.
    before = {variable: os.environ.pop(variable, None) for variable in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_safe_classes()):
            yield
    except CheckpointError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "nsupported" in line), lines[0] if lines else repr(error))
        if "nsupported" in reason:
            reason = f"refused because it may contain code; nothing in it was run ({reason})"
        raise CheckpointError(f"{what}: {reason}") from error
    finally:
        for variable, value in before.items():
            os.environ.pop(variable, None)
            if value is not None:
                os.environ[variable] = value


def _safe_classes() -> list[Any]:
    return [getattr(importlib.import_module(module), name) for module, names in _SAFE.items() for name in names]
