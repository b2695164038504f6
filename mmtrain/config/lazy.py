"""Runs a config in MMEngine's pure Python style, with ``read_base()`` for bases and imported classes as types.

The file runs as ordinary Python, with another ``__import__`` function (`_Importer`). The standard library is imported,
a base is read as a config, and every other import gives a `Placeholder`, so that reading a config imports no model
code. If a config computes with a placeholder (``np.pi * 2``), the object that it stands for is imported right then.
`resolve_placeholders` finally replaces all of them. What remains are lazy objects of MMEngine as values of ``type``,
which `mmtrain.registry.resolve` imports when it builds the part.

MMEngine's reader (0.10.7) is not used for these files: in a virtual environment it mistakes the standard library for a
third-party package, and its lazy objects cannot be called or used in expressions.
"""

import builtins
import operator
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from mmengine.config import ConfigDict
from mmengine.config.lazy import LazyAttr, LazyObject

from mmtrain.config.reader import is_imported_for_real
from mmtrain.errors import ConfigError
from mmtrain.registry.names import import_lazy
from mmtrain.source_lines import ConfigSource, short_name
from mmtrain.suggest import did_you_mean


class Placeholder:
    """Stands for something that a config imports, until the object itself is needed."""

    __slots__ = ("_lazy",)

    def __init__(self, lazy: LazyObject | LazyAttr) -> None:
        self._lazy = lazy

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):  # torch.__version__, and what Python looks up in any object
            return getattr(_imported(self), name)
        return Placeholder(LazyAttr(name, self._lazy, self._lazy.location))

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return _imported(self)(*map(_imported, args), **{name: _imported(value) for name, value in kwargs.items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> "Placeholder":
        return self


def _imported(value: Any) -> Any:
    """Import what a placeholder stands for; any other value is returned."""
    if not isinstance(value, Placeholder):
        return value
    try:
        return value._lazy.build()
    except Exception as error:
        raise error.__context__ or error from None  # MMEngine wraps the error that says why


def _on_imported(function: Callable[..., Any], *, reflected: bool = False) -> Callable[..., Any]:
    def method(*operands: Any) -> Any:
        values = [_imported(operand) for operand in operands]
        return function(*reversed(values)) if reflected else function(*values)

    return method


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "bool": bool, "len": len, "iter": iter, "float": float, "int": int, "round": round, "str": str, "format": format,
    "hash": hash, "fspath": os.fspath,
}  # fmt: skip
_BINARY = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "lshift", "rshift")
_OPERATORS = ("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert", "index", "getitem", "contains")

for _name, _function in (_FUNCTIONS | {name: getattr(operator, name) for name in _OPERATORS}).items():
    setattr(Placeholder, f"__{_name}__", _on_imported(_function))
for _name in _BINARY:
    _function = getattr(operator, _name)
    setattr(Placeholder, f"__{_name.rstrip('_')}__", _on_imported(_function))
    setattr(Placeholder, f"__r{_name.rstrip('_')}__", _on_imported(_function, reflected=True))


def run_config(file: Path, source: ConfigSource) -> ConfigDict:
    """Run a config file and return its top-level names. ``source`` is what `read_source` found in it and its bases.

    Raises ConfigError for an import that a config cannot have, and any exception of the file itself.
    """
    names = {**vars(builtins), "__import__": _Importer(file, source)}
    namespace: dict[str, Any] = {"__file__": str(file), "__builtins__": names}
    exec(compile(file.read_text(encoding="utf-8"), str(file), "exec", dont_inherit=True), namespace)
    if "_base_" in namespace:
        shown = short_name(str(file))
        raise ConfigError(f"config {shown} is a base in `with read_base():`; use this in it too, instead of `_base_`")
    return ConfigDict({name: _copied(value) for name, value in namespace.items() if not name.startswith("__")})


def _copied(value: Any) -> Any:
    """A copy of dicts (as ConfigDicts) and lists, so that two names of a config never share a value."""
    if isinstance(value, dict):
        return ConfigDict({key: _copied(member) for key, member in dict.items(value)})
    if isinstance(value, (list, tuple)):
        return type(value)(map(_copied, value))
    return value


class _Importer:
    """The ``__import__`` of one config file."""

    def __init__(self, file: Path, source: ConfigSource) -> None:
        self.file = file
        self.source = source
        self.bases: dict[Path, ConfigDict] = {}
        self.modules: dict[str, list[str]] = {}  # top-level package: its modules in `import package.module`

    def __call__(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        here = f"{short_name(str(self.file))}, line {sys._getframe(1).f_lineno}"
        module = "." * level + name
        base = self.source.bases.get((str(self.file), module))
        if base is not None:
            return self._base(base, module, fromlist or (), here)
        if level:
            raise ConfigError(f"config {here}: put an import that starts with a dot inside `with read_base():`")
        if fromlist and "*" in fromlist:
            raise ConfigError(
                f"config {here}: `import *` works only for a base; import the names that you need from {name}"
            )
        if is_imported_for_real(name):
            return __import__(name, globals, locals, fromlist or (), level)
        if fromlist:
            return SimpleNamespace(**{member: Placeholder(LazyObject(name, member, here)) for member in fromlist})
        package = name.partition(".")[0]
        modules = self.modules.setdefault(package, [])
        modules.append(name)
        return Placeholder(LazyObject(modules, location=here))

    def _base(self, base: Path, name: str, wanted: Sequence[str], here: str) -> ModuleType:
        if base not in self.bases:
            self.bases[base] = run_config(base, self.source)
        members = dict(dict.items(self.bases[base]))
        for member in wanted:
            if member != "*" and member not in members:
                shown = short_name(str(base))
                raise ConfigError(f"config {here}: the base {shown} has no {member!r}{did_you_mean(member, members)}")
        module = ModuleType(name)
        vars(module).update(members, __all__=list(members))
        return module


def resolve_placeholders(value: Any, path: str) -> Any:
    """``value`` with its placeholders imported, except as a ``type``, which becomes a lazy object of MMEngine.

    An empty ``_scope_``, which MMEngine adds, is removed. Raises ConfigError if an import fails.
    """
    if isinstance(value, Placeholder):
        return import_lazy(value._lazy, path=path)
    if isinstance(value, dict):
        members = {_imported(key): member for key, member in dict.items(value)}
        return ConfigDict(
            {
                key: member._lazy
                if key == "type" and isinstance(member, Placeholder)
                else resolve_placeholders(member, f"{path}.{key}")
                for key, member in members.items()
                if not (key == "_scope_" and member is None)
            }
        )
    if type(value) in (list, tuple):
        return type(value)(resolve_placeholders(member, f"{path}[{index}]") for index, member in enumerate(value))
    if type(value) in (set, frozenset):
        return type(value)(resolve_placeholders(member, path) for member in value)
    return value
