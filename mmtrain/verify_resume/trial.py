"""The changes that ``verify-resume`` makes to a config.

A trial needs a log line for every iteration and a checkpoint before the first kill, and must not write outside its own
directory. The length of the run in the config does not change, because schedules depend on it: the run is stopped early
instead.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mmtrain.verify_resume.hook import ResumeTrialHook


@dataclass(frozen=True)
class Trial:
    """Where a run stops, saves and is killed; all in iterations.

    Args:
        stop: the run is stopped after this iteration.
        interval: iterations between checkpoints.
        kills: the run is killed once after each of these iterations.
        record: the directory in which `ResumeTrialHook` records starts and kills.
    """

    stop: int
    interval: int
    kills: tuple[int, ...] = ()
    record: str = ""

    def to_json(self) -> str:
        """The trial as a command-line argument."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Trial":
        """The inverse of `to_json`."""
        values = json.loads(text)
        return cls(**{**values, "kills": tuple(values["kills"])})


def change_config(cfg: Any, trial: Trial) -> None:
    """Add the trial to a config. Other settings of the config's hooks are kept."""
    hooks = dict(cfg.get("default_hooks") or {})
    hooks["logger"] = _with(hooks, "logger", "LoggerHook", {"interval": 1, "out_dir": None})
    saves = {"interval": trial.interval, "by_epoch": False, "save_begin": 0, "save_last": True, "out_dir": None}
    hooks["checkpoint"] = _with(hooks, "checkpoint", "CheckpointHook", saves)
    cfg.default_hooks = hooks
    hook = {"type": ResumeTrialHook.__name__, "stop": trial.stop, "record": trial.record, "kills": list(trial.kills)}
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), hook]
    cfg.visualizer = None  # a trial should not appear on a dashboard


def _with(hooks: Mapping[str, Any], name: str, kind: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": kind, **(hooks.get(name) or {}), **changes}
