"""Writes a config as a Python file that loads to an equal config, and hashes it.

A class or function under ``type`` is written as its dotted name, which `registry.resolve` understands. Anywhere else it
is imported, because an argument must load as the same object. A value that cannot be written as Python source (a
lambda, an instance) is a ConfigError.
"""

import enum
import functools
import keyword
import math
import re
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import xxhash

from mmtrain.config.keys import misspelled_key
from mmtrain.errors import ConfigError
from mmtrain.registry import REGISTRIES
from mmtrain.registry.names import LAZY, lazy_name
from mmtrain.source_lines import OWN_VARIABLE, config_error

_WIDTH = 100
# What MMEngine would substitute in a config's text: {{ fileBasename }}, {{ _base_.name }}, {{ $VARIABLE:default }}.
_SUBSTITUTED = re.compile(r"\{\{(?=\W*(?:\$|_base_|file))")
_HEADER = "# The resolved config of a run, written by mmtrain. Loading this file gives the same run.\n"


class _Bracketed(NamedTuple):
    """Something in brackets. Each item is a prefix (``key=``) and a value; ``inline`` is all of it on one line."""

    opening: str
    items: list[tuple[str, "_Bracketed | str"]]
    closing: str
    inline: str


def dump_config(cfg: Any, path: str | Path) -> None:
    """Write a Python file that `load_config` reads as an equal config.

    Raises ConfigError for a value that cannot be written as source, and if the file cannot be written.
    """
    text = config_text(cfg)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the resolved config to {path}: {error.strerror or error}") from error


def config_text(cfg: Any) -> str:
    """The text that `dump_config` writes."""
    members = top_level(cfg)
    writer = PythonWriter(taken=members)
    body = []
    for name, value in members.items():
        if not name.isidentifier() or keyword.iskeyword(name):
            raise config_error(name, "expected a Python name (letters, digits and _); rename it")
        if misspelled_key(name, value):
            body.append(f"{OWN_VARIABLE}{name}\n")
        body.append(_multi_line(writer.tree(value, name), f"{name} = ", "") + "\n")
    imports = writer.import_lines()
    return _HEADER + "".join(f"{line}\n" for line in imports) + ("\n" if imports else "") + "".join(body)


def config_hash(cfg: Any) -> str:
    """A hash of the whole config (xxh3, 128 bits, hexadecimal). The order of keys does not matter."""
    writer = PythonWriter(taken={}, ordered=True)
    members = sorted(top_level(cfg).items())
    text = "".join(_inline(writer.tree(value, name), f"{name}=") for name, value in members)
    return xxhash.xxh3_128_hexdigest(("\n".join(writer.import_lines()) + "\n" + text).encode())


def top_level(cfg: Any) -> dict[str, Any]:
    """The top-level names and values of a config; MMEngine's lazy objects are not imported."""
    members = vars(cfg).get("_cfg_dict", cfg) if hasattr(cfg, "__dict__") else cfg
    return dict(dict.items(members))


class PythonWriter:
    """Writes values as Python source, and collects the imports that the source needs.

    ``taken`` are the names that an import must not bind. With ``ordered``, the keys of dicts are sorted.
    """

    def __init__(self, *, taken: Iterable[str] = (), ordered: bool = False) -> None:
        self.taken = set(taken)
        self.ordered = ordered
        self.imports: dict[tuple[str, str], str] = {}

    def import_lines(self) -> list[str]:
        return [
            f"from {module} import {name}" + (f" as {alias}" if alias != name else "")
            for (module, name), alias in sorted(self.imports.items())
        ]

    def imported(self, module: str, name: str) -> str:
        """The name that the file will use for ``name`` in ``module``."""
        alias = name
        while alias in self.taken and self.imports.get((module, name)) != alias:
            alias += "_"
        self.taken.add(alias)
        return self.imports.setdefault((module, name), alias)

    def tree(self, value: Any, path: str) -> "_Bracketed | str":
        """The source of ``value``. Raises ConfigError, with ``path``, when there is none."""
        if isinstance(value, dict):
            return self._dict(value, path)
        if isinstance(value, (list, set, frozenset)) or type(value) is tuple:
            return self._sequence(value, path)
        return self._leaf(value, path)

    def _dict(self, value: dict[Any, Any], path: str) -> _Bracketed:
        members = list(dict.items(value))
        if self.ordered:
            members.sort(key=lambda member: repr(member[0]))
        plain = all(isinstance(k, str) and k.isidentifier() and not keyword.iskeyword(k) for k, _ in members)
        items = []
        for key, member in members:
            inner = f"{path}.{key}"
            text = self._type(member, inner) if key == "type" else self.tree(member, inner)
            prefix = f"{key}=" if plain else f"{_inline(self.tree(key, inner))}: "
            items.append((prefix, text))
        return _bracketed("dict(" if plain else "{", items, ")" if plain else "}")

    def _sequence(self, value: Any, path: str) -> "_Bracketed | str":
        members = list(value)
        if isinstance(value, (set, frozenset)):
            members.sort(key=repr)
        items = [("", self.tree(member, f"{path}[{index}]")) for index, member in enumerate(members)]
        if isinstance(value, list):
            return _bracketed("[", items, "]")
        if isinstance(value, tuple):
            return _bracketed("(", items, ",)" if len(items) == 1 else ")")
        if isinstance(value, frozenset):
            return _bracketed("frozenset([", items, "])")
        return _bracketed("{", items, "}") if items else "set()"

    def _type(self, value: Any, path: str) -> "_Bracketed | str":
        if isinstance(value, LAZY):
            return repr(lazy_name(value))
        if isinstance(value, str) or not callable(value):
            return self.tree(value, path)
        home = _import_path(value)
        return repr(home[0] + "." + home[1]) if home else repr(_registered_name(value, path))

    def _leaf(self, value: Any, path: str) -> str:
        if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
            value = value.item()
        for kind, write in _WRITERS.items():
            if isinstance(value, kind):
                return write(self, value)
        if type(value).__module__ == "torch" and type(value).__name__ == "dtype":
            return self.imported("torch", str(value).partition(".")[2])
        if type(value).__module__ == "torch" and type(value).__name__ == "device":
            return f"{self.imported('torch', 'device')}({str(value)!r})"
        return self._object(value, path)

    def _object(self, value: Any, path: str) -> str:
        if isinstance(value, LAZY):
            module, _, name = lazy_name(value).rpartition(".")
            return self.imported(module, name)
        home = _import_path(value) if callable(value) else None
        if home is None:
            raise config_error(path, _unwritable(value))
        module, qualified = home
        if module == "builtins":
            return qualified
        first, *rest = qualified.split(".")
        return ".".join([self.imported(module, first), *rest])


def _text(_: PythonWriter, value: str) -> str:
    return _SUBSTITUTED.sub(r"{\\x7b", repr(str(value)))


def _float(_: PythonWriter, value: float) -> str:
    return repr(float(value)) if math.isfinite(value) else f"float({str(float(value))!r})"


def _member(writer: PythonWriter, value: enum.Enum) -> str:
    return f"{writer._object(type(value), type(value).__name__)}.{value.name}"


def _path(writer: PythonWriter, value: PurePath) -> str:
    return f"{writer.imported('pathlib', 'Path' if isinstance(value, Path) else 'PurePath')}({str(value)!r})"


def _timedelta(writer: PythonWriter, value: timedelta) -> str:
    parts = [f"{name}={getattr(value, name)}" for name in ("days", "seconds", "microseconds") if getattr(value, name)]
    return f"{writer.imported('datetime', 'timedelta')}({', '.join(parts)})"


# In this order, because a member of an IntEnum is an int.
_WRITERS: dict[type, Callable[[PythonWriter, Any], str]] = {
    enum.Enum: _member,
    type(None): lambda _, value: repr(value),
    int: lambda _, value: repr(value),
    str: _text,
    float: _float,
    bytes: lambda _, value: repr(value),
    range: lambda _, value: repr(value),
    complex: lambda _, value: f"complex({value.real!r}, {value.imag!r})",
    timedelta: _timedelta,
    PurePath: _path,
}


def _import_path(value: Any) -> tuple[str, str] | None:
    """The module and qualified name from which ``value`` can be imported, or None."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    owner = getattr(value, "__self__", None)
    if isinstance(owner, type):  # a class method belongs to the class that it was taken from
        module, name = owner.__module__, f"{owner.__qualname__}.{value.__name__}"
    if not module or not name or module == "__main__":
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return (module, name) if found is value or (found == value and isinstance(owner, type)) else None


def _registered_name(value: Any, path: str) -> str:
    """The registered name of a class that cannot be imported because a script defines it."""
    for registry in REGISTRIES.values():
        for name, held in registry.module_dict.items():
            if held is value:
                return name
    raise config_error(path, _unwritable(value))


def _unwritable(value: Any) -> str:
    if isinstance(value, functools.partial):
        what = "a functools.partial"
    elif getattr(value, "__name__", None) == "<lambda>":
        what = "a lambda"
    elif callable(value) and getattr(value, "__qualname__", None):
        what = f"{value.__qualname__}, which cannot be imported by that name,"
    else:
        what = f"an instance of {type(value).__qualname__}"
    return (
        f"{what} cannot be written to the saved config; register a class or function in a module and give its name, "
        "as in dict(type='Name', ...)"
    )


def _bracketed(opening: str, items: list[tuple[str, "_Bracketed | str"]], closing: str) -> _Bracketed:
    inner = ", ".join(_inline(item, prefix) for prefix, item in items)
    return _Bracketed(opening, items, closing, f"{opening}{inner}{closing}")


def _inline(tree: "_Bracketed | str", prefix: str = "") -> str:
    return prefix + (tree if isinstance(tree, str) else tree.inline)


def _multi_line(tree: "_Bracketed | str", prefix: str, indent: str) -> str:
    line = indent + _inline(tree, prefix)
    if isinstance(tree, str) or len(line) <= _WIDTH or not tree.items:
        return line
    lines = [_multi_line(item, name, indent + "    ") + "," for name, item in tree.items]
    return "\n".join([f"{indent}{prefix}{tree.opening}", *lines, indent + tree.closing.lstrip(",")])
