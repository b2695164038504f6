"""Where in the config files a dotted path was written, so that an error can name the file and the line.

The index is read from the files' syntax trees and runs nothing. It follows ``read_base`` imports, ``_base_`` lists,
names, ``dict(...)``, literals, ``update`` and item assignment. Whatever else changes a value (a loop, a condition, a
method) makes its line unknown: no line is better than a wrong one.
"""

import contextlib
import re
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmtrain.errors import ConfigError

OPTIONS = "--cfg-options"
# Written by dump_config before a variable whose name looks like a key, so that the dump loads as the config did.
OWN_VARIABLE = "# own variable: "


@dataclass(slots=True)
class SourceNode:
    """Where one value was written, and its members."""

    file: str
    line: int | None
    children: "dict[str, SourceNode]" = field(default_factory=dict)
    is_dict: bool = False

    def merged(self, newer: "SourceNode") -> "SourceNode":
        """This node as MMEngine merges ``newer`` into it: dict into dict, anything else replaces."""
        if not (self.is_dict and newer.is_dict) or "_delete_" in newer.children:
            return newer
        children = dict(self.children)
        for name, child in newer.children.items():
            children[name] = children[name].merged(child) if name in children else child
        return SourceNode(newer.file, newer.line, children, is_dict=True)


@dataclass
class ConfigSource:
    """The positions of one config, and what else its files' syntax trees say.

    ``read`` are the names that its code reads, ``imported`` those that it binds by imports, ``files`` its own file and
    its bases. ``bases`` gives the file of a base from the file that includes it and the name in its import.
    ``pure_python`` says that the config is in MMEngine's pure Python style, and not in that of ``_base_`` lists.
    """

    file: str
    names: dict[str, SourceNode] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    imported: set[str] = field(default_factory=set)
    files: list[str] = field(default_factory=list)
    bases: dict[tuple[str, str], Path] = field(default_factory=dict)
    pure_python: bool = False

    def find(self, path: str) -> tuple[str, int | None]:
        """The file and line of a dotted path (``custom_hooks[0].interval`` or ``custom_hooks.0.interval``), or of the
        nearest section around it that is known."""
        first, *rest = split_path(path)
        node = self.names.get(first)
        if node is None:
            return self.file, None
        for name in rest:
            if name not in node.children:
                break
            node = node.children[name]
        return node.file, node.line

    def override(self, path: str, value: Any) -> None:
        """Note that the command line set ``path``."""
        *parents, last = split_path(path)
        children = self.names
        for name in parents:
            children = children.setdefault(name, SourceNode(OPTIONS, None, is_dict=True)).children
        children[last] = _from_value(value)


def split_path(path: str) -> list[str]:
    """The names of a dotted path; an index may stand in brackets."""
    return [name for name in re.split(r"[.\[\]]+", path) if name]


def _from_value(value: Any) -> SourceNode:
    members: Any = ()
    if isinstance(value, dict):
        members = value.items()
    elif isinstance(value, (list, tuple)):
        members = enumerate(value)
    return SourceNode(OPTIONS, None, {str(k): _from_value(v) for k, v in members}, is_dict=isinstance(value, dict))


# The config whose parts are being checked or built: `build` takes paths only, and its errors still name a line.
_current: ContextVar[ConfigSource | None] = ContextVar("config_source", default=None)


def source_of(cfg: Any) -> ConfigSource | None:
    """The positions of a config that `load_config` read, else None."""
    return getattr(cfg, "__dict__", {}).get("_mmtrain_source")


@contextlib.contextmanager
def positions(cfg: Any) -> Iterator[None]:
    """Within this context, errors about a dotted path name the file and line of ``cfg`` where it stands.

    ``cfg`` is a config that `load_config` read, or a ConfigSource; with anything else errors name no file.
    """
    token = _current.set(cfg if isinstance(cfg, ConfigSource) else source_of(cfg))
    try:
        yield
    finally:
        _current.reset(token)


def where(path: str) -> str:
    """`` (file, line n)`` for a dotted path of the config in hand; empty when nothing is known."""
    source = _current.get()
    if source is None:
        return ""
    file, line = source.find(path)
    if file == OPTIONS:
        return f" ({OPTIONS})"
    return f" ({short_name(file)}, line {line})" if line else f" ({short_name(file)})"


def short_name(file: str) -> str:
    """A file's name from the working directory when it lies inside, else as it is."""
    with contextlib.suppress(ValueError, OSError):
        return str(Path(file).resolve().relative_to(Path.cwd()))
    return file


def config_error(path: str, message: str) -> ConfigError:
    """The error that says ``message`` about a dotted path, with the file and line when they are known."""
    return ConfigError(f"`{path}`{where(path)}: {message}")
