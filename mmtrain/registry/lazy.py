"""Makes MMEngine's lazy configs behave like the Python they are written in, while one is being read.

In a config with ``read_base()`` or an import, MMEngine 0.10.7 turns every import into a placeholder. Two things go
wrong: it takes the standard library for a third-party package (a path comparison that fails in a virtual environment
and for frozen modules), and a placeholder that is called or computed with dies with an empty RuntimeError or a
TypeError about ``LazyAttr``. Within `plain_python` the standard library is imported for real, and a placeholder that a
config really computes with is imported at that moment; the others stay placeholders, so that reading a config imports
nothing else.
"""

import ast
import contextlib
import operator
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from mmengine.config import config as mmengine_config
from mmengine.config import utils as mmengine_utils
from mmengine.config.lazy import LazyAttr, LazyObject

LAZY = (LazyAttr, LazyObject)

_BINARY = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "lshift", "rshift")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_UNARY = ("neg", "pos", "abs", "invert")
_MISSING: Any = object()
_one_import = mmengine_utils.ImportTransformer.visit_Import


def is_standard_library(module: str) -> bool:
    """Whether a config may really import ``module``: the standard library, and ``mmengine.config`` itself."""
    return module.partition(".")[0] in sys.stdlib_module_names or module.startswith("mmengine.config")


def lazy_name(value: Any) -> str:
    """The dotted name that a placeholder stands for."""
    if isinstance(value, LazyObject) and value._imported is None:
        return str(value.module)
    return f"{value.module}.{value}"


def built(value: Any) -> Any:
    """What a placeholder stands for, imported; any other value as it is."""
    return value.build() if isinstance(value, LAZY) else value


@contextlib.contextmanager
def plain_python() -> Iterator[None]:
    """While a config is read: real standard-library imports, and placeholders that can be computed with.

    Everything is put back afterwards, whatever happens.
    """
    changes: list[tuple[Any, str, Any]] = [
        (module, "_is_builtin_module", is_standard_library) for module in (mmengine_config, mmengine_utils)
    ]
    changes.append((mmengine_utils.ImportTransformer, "visit_Import", _visit_import))
    changes += [(cls, name, method) for cls in LAZY for name, method in _methods().items()]
    # vars() and not getattr(): an inherited method must be inherited again afterwards.
    before = [(owner, name, vars(owner).get(name, _MISSING)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            _put_back(owner, name, value)


def _visit_import(self: Any, node: ast.Import) -> list[Any]:
    """MMEngine's own, which takes one name, for each name of ``import a, b``."""
    return [_one_import(self, ast.copy_location(ast.Import([alias]), node)) for alias in node.names]


def _put_back(owner: type | ModuleType, name: str, value: Any) -> None:
    if value is _MISSING:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _methods() -> dict[str, Callable[..., Any]]:
    methods: dict[str, Callable[..., Any]] = {"__call__": _call, "__bool__": _on_built(bool), "__len__": _on_built(len)}
    methods |= {"__iter__": _on_built(iter), "__getitem__": _on_built(operator.getitem)}
    methods |= {"__float__": _on_built(float), "__int__": _on_built(int), "__index__": _on_built(operator.index)}
    methods |= {f"__{name}__": _on_built(getattr(operator, name)) for name in (*_COMPARISONS, *_UNARY)}
    for name in _BINARY:
        function = getattr(operator, name)
        methods[f"__{name.rstrip('_')}__"] = _on_built(function)
        methods[f"__r{name.rstrip('_')}__"] = _on_built(function, reflected=True)
    return methods


def _call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
    return self.build()(*map(built, args), **{name: built(value) for name, value in kwargs.items()})


def _on_built(function: Callable[..., Any], *, reflected: bool = False) -> Callable[..., Any]:
    def method(*operands: Any) -> Any:
        values = [built(operand) for operand in operands]
        return function(*reversed(values)) if reflected else function(*values)

    return method
