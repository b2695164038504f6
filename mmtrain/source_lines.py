"""Where in the config files a value was written, so that an error about a dotted path names the file and the line.

`mmtrain.config.reader` fills a `ConfigSource` from the syntax trees of the files. This half of it is here, below the
packages, because whatever checks or builds a part of a config raises `config_error`, and `mmtrain.config` imports the
registries, which do so too.
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
# `dump_config` writes it before a variable that looks like a misspelled key, so that its file loads without an error.
OWN_VARIABLE = "# own variable: "


@dataclass(slots=True)
class SourceNode:
    """Where one value was written, and the same for its members."""

    file: str
    line: int | None
    children: "dict[str, SourceNode]" = field(default_factory=dict)
    is_dict: bool = False

    def merged(self, newer: "SourceNode") -> "SourceNode":
        """This node after ``newer`` is merged into it as in MMEngine: a dict into a dict; anything else is replaced."""
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
        """The file and line of a dotted path, or of the nearest section around it that is known.

        An index is written ``custom_hooks[0].interval`` or ``custom_hooks.0.interval``.
        """
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
        """Record that the command line set ``path``."""
        *parents, last = split_path(path)
        children = self.names
        for name in parents:
            children = children.setdefault(name, SourceNode(OPTIONS, None, is_dict=True)).children
        children[last] = _from_value(value)


def split_path(path: str) -> list[str]:
    """The names in a dotted path; an index may be in brackets."""
    return [name for name in re.split(r"[.\[\]]+", path) if name]


def _from_value(value: Any) -> SourceNode:
    members: Any = ()
    if isinstance(value, dict):
        members = value.items()
    elif isinstance(value, (list, tuple)):
        members = enumerate(value)
    return SourceNode(OPTIONS, None, {str(k): _from_value(v) for k, v in members}, is_dict=isinstance(value, dict))


# The config that is being checked or built. `build` is given paths only, and its errors name a line all the same.
_current: ContextVar[ConfigSource | None] = ContextVar("config_source", default=None)


def source_of(cfg: Any) -> ConfigSource | None:
    """Where the values of a config were written, if `load_config` read it; else None."""
    return getattr(cfg, "__dict__", {}).get("_mmtrain_source")


@contextlib.contextmanager
def positions(cfg: Any) -> Iterator[None]:
    """Within this context, errors about a dotted path name the file and line in ``cfg``.

    ``cfg`` is a config that `load_config` read, or a ConfigSource. With anything else, errors do not name a file.
    """
    token = _current.set(cfg if isinstance(cfg, ConfigSource) else source_of(cfg))
    try:
        yield
    finally:
        _current.reset(token)


def where(path: str) -> str:
    """`` (file, line n)`` for a dotted path in the current config, or an empty string if that is unknown."""
    source = _current.get()
    if source is None:
        return ""
    file, line = source.find(path)
    if file == OPTIONS:
        return f" ({OPTIONS})"
    return f" ({short_name(file)}, line {line})" if line else f" ({short_name(file)})"


def short_name(file: str) -> str:
    """A file's path relative to the working directory if it is inside it, else unchanged."""
    with contextlib.suppress(ValueError, OSError):
        return str(Path(file).resolve().relative_to(Path.cwd()))
    return file


def config_error(path: str, message: str) -> ConfigError:
    """The error ``message`` about a dotted path, with its file and line if they are known."""
    return ConfigError(f"`{path}`{where(path)}: {message}")
