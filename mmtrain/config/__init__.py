"""Configs: read a file, merge ``--cfg-options``, check everything, and write the result to a file."""

from mmtrain.config.check import check_config
from mmtrain.config.dump import config_hash, config_text, dump_config
from mmtrain.config.keys import KEYS
from mmtrain.config.load import import_custom_modules, load_config, parse_overrides
from mmtrain.source_lines import positions

__all__ = [
    "KEYS",
    "check_config",
    "config_hash",
    "config_text",
    "dump_config",
    "import_custom_modules",
    "load_config",
    "parse_overrides",
    "positions",
]
