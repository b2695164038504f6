"""DeepSpeed's config: presets, the file, the strategy's own arguments, joined; where each value was written."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtrain.errors import ConfigError
from mmtrain.suggest import did_you_mean

_AUTO: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"},
}  # fmt: skip
_TO_CPU = {"device": "cpu"}
PRESETS: dict[str, dict[str, Any]] = {
    "zero1": {**_AUTO, "zero_optimization": {"stage": 1}},
    "zero2": {**_AUTO, "zero_optimization": {"stage": 2}},
    "zero2_offload": {**_AUTO, "zero_optimization": {"stage": 2, "offload_optimizer": _TO_CPU}},
    "zero3": {**_AUTO, "zero_optimization": {"stage": 3}},
    "zero3_offload": {
        **_AUTO, "zero_optimization": {"stage": 3, "offload_optimizer": _TO_CPU, "offload_param": _TO_CPU},
    },
}  # fmt: skip

# Keys whose value another part of the config decides: there they may say "auto".
_AUTO_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
# Sections that are plain tables in DeepSpeed, with the keys it reads. None: a single value.
_PLAIN: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys(
        (
            *_AUTO_KEYS, "steps_per_print", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
            "wall_clock_breakdown", "memory_breakdown", "dump_state", "prescale_gradients", "disable_allgather",
            "gradient_predivide_factor", "communication_data_type", "log_level",
        )
    ),
    "activation_checkpointing": (
        "partition_activations", "contiguous_memory_optimization", "cpu_checkpointing", "number_checkpoints",
        "synchronize_checkpoint_boundary", "profile",
    ),
    "aio": ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"),
    "data_types": ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
    "comms_logger": ("enabled", "verbose", "prof_all", "debug", "prof_ops"),
    "flops_profiler": (
        "enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file",
    ),
}  # fmt: skip
_MODELLED = ("zero_optimization", "fp16", "bf16")
# What DeepSpeed knows and a run of mmtrain decides elsewhere.
_ELSEWHERE = {
    "optimizer": "the optimizer is `optim_wrapper.optimizer`, with its multipliers; delete the section",
    "scheduler": "schedules are `param_scheduler`; delete the section",
    "amp": "DeepSpeed has removed apex; use bf16 or fp16",
    "torch_autocast": "use bf16 or fp16",
    "compile": "use the config's own `compile`",
    "checkpoint": "checkpoints are `default_hooks.checkpoint`, and resuming elsewhere is automatic; delete the section",
    "data_efficiency": "the data are `train_dataloader`; delete the section",
    "managed_gradient_accumulation": "the train loop sets the windows; delete it",
    "gradient_allreduce_op": "gradients are averaged over ranks, as on every strategy; delete it",
    "tensorboard": "use `visualizer`", "wandb": "use `visualizer`", "csv_monitor": "use `visualizer`",
    "comet": "use `visualizer`",
}  # fmt: skip


@dataclass(slots=True)
class Options:
    """A DeepSpeed config; ``origin`` says for each top-level key where the user wrote it."""

    values: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """The full path of a key, ``zero_optimization.stage``, as the user would look for it."""
        top, _, rest = key.partition(".")
        return self.origin.get(top, f"strategy.{top}") + (f".{rest}" if rest else "")

    def get(self, key: str, default: Any = None) -> Any:
        """A value by its dotted key."""
        value: Any = self.values
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value

    @property
    def stage(self) -> int:
        """The ZeRO stage, 0 where nothing says."""
        return int(self.get("zero_optimization.stage", 0))


def joined(config: Any, arguments: Mapping[str, Any]) -> Options:
    """The file or dict ``config`` and the strategy's other arguments as one; None arguments do not count.

    Raises ConfigError for a file that cannot be read, and for a key that both give with different values.
    """
    found = Options()
    values, source = _read(config)
    for key, value in values.items():
        found.values[key], found.origin[key] = value, f"{source}{key}"
    for key, value in arguments.items():
        if value is None:
            continue
        if key in found.values and found.values[key] not in (value, "auto"):
            raise ConfigError(
                f"strategy.{key} is {value!r} and {found.origin[key]} is {found.values[key]!r}: the two contradict one "
                "another; keep one"
            )
        found.values[key], found.origin[key] = _plain(value), f"strategy.{key}"
    check_keys(found)
    return found


def preset_or_file(name: str) -> dict[str, Any] | str:
    """What ``--deepspeed NAME`` means: a preset's config, or the path. Raises ConfigError for neither."""
    preset = PRESETS.get(name.removeprefix("deepspeed_"))
    if preset is not None:
        return json.loads(json.dumps(preset))
    if Path(name).is_file():
        return name
    hint = did_you_mean(name, PRESETS) or f"; expected {', '.join(PRESETS)}"
    raise ConfigError(f"--deepspeed {name}: no such file or preset{hint}")


def overrides_for(argument: str, strategy_cfg: Any) -> dict[str, Any]:
    """The config values that ``--deepspeed ARGUMENT`` sets; ``strategy_cfg`` is the config's ``strategy``, or None.

    Raises ConfigError if the config selects another strategy, or already has a DeepSpeed config.
    """
    config = preset_or_file(argument)
    strategy = strategy_cfg or {}
    type_ = strategy.get("type", "")
    name = str(getattr(type_, "__name__", type_)).rpartition(".")[2]
    if strategy and name != "DeepSpeedStrategy":
        raise ConfigError(
            f"--deepspeed {argument} contradicts strategy.type={name!r} in the config; remove one of them"
        )
    if strategy.get("config") is not None:
        raise ConfigError(f"--deepspeed {argument} contradicts strategy.config in the config; remove one")
    return {"strategy.type": "DeepSpeedStrategy", "strategy.config": config}


def _read(config: Any) -> tuple[dict[str, Any], str]:
    """The config's keys, and what to put before a key to name its place."""
    if config is None:
        return {}, ""
    if isinstance(config, Mapping):
        return _plain(config), "strategy.config."
    if not isinstance(config, str | Path):
        raise ConfigError(f"strategy.config is {config!r}; expected a dict or the path of a JSON file")
    try:
        values = json.loads(Path(config).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"strategy.config {str(config)!r} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"strategy.config {str(config)!r} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"strategy.config {str(config)!r} holds a {type(values).__name__}; expected a JSON object")
    return values, f"{config}: "


def _plain(value: Any) -> Any:
    """A config's nested dicts as plain ones: DeepSpeed puts its config into its files, which hold plain data alone."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def check_keys(options: Options) -> None:
    """Raise ConfigError for a key that DeepSpeed does not know, or that belongs elsewhere in a run's config."""
    for key, value in options.values.items():
        if key in _ELSEWHERE:
            raise ConfigError(f"{options.where(key)}: not supported here: {_ELSEWHERE[key]}")
        if key not in _PLAIN and key not in _MODELLED:
            known = (*_PLAIN, *_MODELLED)
            hint = did_you_mean(key, known) or f"; expected one of {', '.join(known)}"
            raise ConfigError(f"{options.where(key)}: mmtrain's DeepSpeedStrategy has no such key{hint}")
        keys = _PLAIN.get(key)
        if key in _PLAIN and keys is None:
            _check_single(options, key, value)
        elif keys is not None:
            _check_names(value, keys, options.where(key))


def _check_single(options: Options, key: str, value: Any) -> None:
    if isinstance(value, (Mapping, list)):
        raise ConfigError(f"{options.where(key)} is {value!r}; expected a single value")
    if value == "auto" and key not in _AUTO_KEYS:
        raise ConfigError(
            f"{options.where(key)} is 'auto', which has no meaning here; leave it out for DeepSpeed's default"
        )
    if key in _AUTO_KEYS and value != "auto" and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ConfigError(f"{options.where(key)} is {value!r}; expected a number or 'auto'")


def _check_names(value: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {value!r}; expected a table with {', '.join(known[:3])}, ...")
    for name in value:
        if name not in known:
            hint = did_you_mean(name, known) or f"; expected one of {', '.join(known)}"
            raise ConfigError(f"{where}.{name}: DeepSpeed has no such key{hint}")


def check_models(options: Options) -> None:
    """Check ``zero_optimization``, ``fp16`` and ``bf16`` against DeepSpeed's own models of them; imports DeepSpeed.

    Raises ConfigError for an unknown key and for a value that DeepSpeed refuses.
    """
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models = {"zero_optimization": DeepSpeedZeroConfig, "fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config}
    for key, model in models.items():
        if key in options.values:
            _check_model(options.values[key], model, options.where(key))


def _check_model(value: Any, model: Any, where: str) -> None:
    fields = {(info.alias or name): info for name, info in model.model_fields.items()}
    _check_names(value, tuple({**fields, **dict.fromkeys(model.model_fields)}), where)
    for name, inner in value.items():
        info = fields.get(name)
        nested = _nested_model(info.annotation) if info is not None else None
        if nested is not None and isinstance(inner, Mapping):
            _check_model(inner, nested, f"{where}.{name}")
        if info is not None and (info.json_schema_extra or {}).get("deprecated"):
            raise ConfigError(f"{where}.{name}: DeepSpeed has replaced it; use {info.json_schema_extra['new_param']}")
    try:
        model(**value)
    except ValueError as error:  # pydantic's, or DeepSpeed's own
        raise ConfigError(_first_fault(error, where)) from error


def _nested_model(annotation: Any) -> Any:
    from typing import get_args

    for candidate in (annotation, *get_args(annotation)):
        if hasattr(candidate, "model_fields"):
            return candidate
    return None


def _first_fault(error: ValueError, where: str) -> str:
    faults: Any = getattr(error, "errors", list)()
    if not faults:
        return f"{where}: {error}"
    path = ".".join([where, *map(str, faults[0]["loc"])])
    return f"{path} is {faults[0]['input']!r}; {faults[0]['msg'][:1].lower()}{faults[0]['msg'][1:]}"
