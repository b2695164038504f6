"""``mmtrain train CONFIG``: train a config, or resume it."""

import argparse
from collections.abc import Sequence
from typing import Any

from mmtrain.cli.errors import run_command
from mmtrain.config import load_config, parse_overrides
from mmtrain.errors import ConfigError


def make_parser() -> argparse.ArgumentParser:
    """The options of the train command; those MMEngine's and xtuner's tools/train.py have keep their names."""
    parser = argparse.ArgumentParser(prog="train.py", description="Train a model from a Python config file.")
    parser.add_argument("config", help="the config file")
    parser.add_argument("--work-dir", help="where logs and checkpoints go (default: work_dirs/<name of the config>)")
    parser.add_argument(
        "--resume", nargs="?", const=True, metavar="auto|PATH",
        help="continue: from the newest good checkpoint in the work dir, from it if there is one else from "
        "--load-from's weights (auto), or from the checkpoint PATH",
    )  # fmt: skip
    parser.add_argument("--load-from", metavar="PATH", help="start from these weights alone")
    parser.add_argument("--seed", type=int, help="randomness.seed")
    parser.add_argument("--deterministic", action="store_true", help="randomness.deterministic=True")
    parser.add_argument("--amp", action="store_true", help="train with AmpOptimWrapper")
    parser.add_argument("--auto-scale-lr", action="store_true", help="auto_scale_lr.enable=True")
    parser.add_argument(
        "--deepspeed", metavar="zero1|zero2|zero3|FILE.json",
        help="train with DeepSpeedStrategy: a preset (zero2_offload, zero3_offload too) or DeepSpeed's config file",
    )  # fmt: skip
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], help="what started the processes")
    parser.add_argument("--local-rank", "--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument(
        "--cfg-options", nargs="+", default=[], metavar="KEY=VALUE",
        help="change the config: optim_wrapper.optimizer.lr=1e-4",
    )  # fmt: skip
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors that are told in one sentence")
    return parser


def config_from(arguments: argparse.Namespace) -> Any:
    """The config with the command line's changes, all of them checked as the file itself is."""
    overrides: dict[str, Any] = parse_overrides(arguments.cfg_options)
    if arguments.work_dir is not None:
        overrides["work_dir"] = arguments.work_dir
    if arguments.launcher is not None:
        overrides["launcher"] = arguments.launcher
    if arguments.seed is not None:
        overrides["randomness.seed"] = arguments.seed
    if arguments.deterministic:
        overrides["randomness.deterministic"] = True
    if arguments.amp:
        overrides["optim_wrapper.type"] = "AmpOptimWrapper"
    if arguments.auto_scale_lr:
        overrides["auto_scale_lr.enable"] = True
    if arguments.load_from is not None:
        overrides["load_from"] = arguments.load_from
    if arguments.resume is not None:
        if arguments.resume in (True, "auto"):
            overrides["resume"] = arguments.resume
        elif arguments.load_from is not None:
            raise ConfigError(
                f"--resume {arguments.resume} continues from that checkpoint and --load-from {arguments.load_from} "
                "begins with other weights; give one of them, or --resume auto --load-from PATH to begin with these "
                "weights only where there is nothing to continue"
            )
        else:
            overrides["resume"], overrides["load_from"] = True, arguments.resume
    if arguments.deepspeed is not None:
        overrides |= _deepspeed(arguments, overrides)
    return load_config(arguments.config, overrides)


def _deepspeed(arguments: argparse.Namespace, overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides of ``--deepspeed``. Raises ConfigError where the config has chosen another strategy."""
    from mmtrain.strategies.zero.options import preset_or_file

    config = preset_or_file(arguments.deepspeed)
    own = load_config(arguments.config, overrides).get("strategy") or {}
    kind = str(getattr(own.get("type", ""), "__name__", own.get("type", ""))).rpartition(".")[2]
    if own and kind != "DeepSpeedStrategy":
        raise ConfigError(
            f"--deepspeed {arguments.deepspeed} contradicts strategy.type={kind!r} in the config; drop one"
        )
    if own.get("config") is not None:
        raise ConfigError(f"--deepspeed {arguments.deepspeed} contradicts strategy.config in the config; drop one")
    return {"strategy.type": "DeepSpeedStrategy", "strategy.config": config}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = make_parser().parse_args(argv)

    def command() -> int:
        from mmtrain.registry import RUNNERS, resolve
        from mmtrain.runner.signals import starting

        with starting():
            cfg = config_from(arguments)
            runner_class = resolve(RUNNERS, cfg.get("runner_type") or "FlexibleRunner", path="runner_type")
            runner = runner_class.from_cfg(cfg)
        runner.train()
        return runner.exit_status

    return run_command(command, debug=arguments.debug, launcher=arguments.launcher)
