"""One start of a run that `verify-resume` watches: the train command with a hook that stops it, or kills it.

It is a process of its own (``python -m mmtrain.verify_resume.trial TRIAL TRAIN_OPTIONS...``), and the same command
every time, as a scheduler would start it again. ``TRIAL`` is a `Trial` as JSON. The config is changed in what must be
seen (a log line every iteration), in what must exist (checkpoints before the kill), and so that nothing leaves the
trial's directory; its length stays, because schedules depend on it: the run is stopped instead.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mmtrain.cli import train
from mmtrain.cli.errors import run_command
from mmtrain.registry import RUNNERS, resolve
from mmtrain.verify_resume.hook import ResumeTrialHook


@dataclass(frozen=True)
class Trial:
    """What is done with a run: stop after ``stop`` iterations, a checkpoint every ``interval``, kills, and a record."""

    stop: int
    interval: int
    kills: tuple[int, ...] = ()
    record: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def change_config(cfg: Any, trial: Trial) -> None:
    """Put the trial into a config. What the user's config says of its hooks stays otherwise."""
    hooks = dict(cfg.get("default_hooks") or {})
    hooks["logger"] = _with(hooks, "logger", "LoggerHook", {"interval": 1, "out_dir": None})
    saves = {"interval": trial.interval, "by_epoch": False, "save_begin": 0, "save_last": True, "out_dir": None}
    hooks["checkpoint"] = _with(hooks, "checkpoint", "CheckpointHook", saves)
    cfg.default_hooks = hooks
    hook = {"type": ResumeTrialHook.__name__, "stop": trial.stop, "record": trial.record, "kills": list(trial.kills)}
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), hook]
    cfg.visualizer = None  # dashboards are no place for a trial


def _with(hooks: Mapping[str, Any], name: str, kind: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": kind, **(hooks.get(name) or {}), **changes}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one start and return its exit status."""
    text, *options = sys.argv[1:] if argv is None else argv
    arguments = train.make_parser().parse_args(options)

    def command() -> int:
        cfg = train.config_from(arguments)
        change_config(cfg, Trial(**json.loads(text)))
        runner = resolve(RUNNERS, cfg.get("runner_type") or "FlexibleRunner", path="runner_type").from_cfg(cfg)
        runner.train()
        return runner.exit_status

    return run_command(command, debug=arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
