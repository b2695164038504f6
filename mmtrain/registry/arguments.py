"""Checks a config's arguments against what a class or function takes, before it is called."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mmtrain.source_lines import config_error
from mmtrain.suggest import did_you_mean

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Takes:
    """The names a target takes, those it cannot do without, and whether it takes any other name too."""

    names: tuple[str, ...]
    required: tuple[str, ...]
    anything: bool


def check_arguments(
    target: Callable[..., Any],
    args: Mapping[str, Any],
    *,
    path: str,
    reserved: Iterable[str] | None = (),
    extra: tuple[str, ...] = (),
) -> None:
    """Raise ConfigError for an argument that ``target`` does not take, or one it needs and was not given.

    ``path`` is the dotted path of the dict that holds ``args``. The arguments in ``reserved`` are filled in by the
    caller and so are not missing; None says that which ones those are is unknown, and nothing is missing. The names in
    ``extra`` may stand beside the arguments: they are for the caller.
    """
    takes = arguments_of(target)
    known = (*takes.names, *(name for name in extra if name not in takes.names))
    name_of_target = display_name(target)
    for name in args:
        if takes.anything or name in known:
            continue
        hint = did_you_mean(name, known) or "."
        listed = ", ".join(known) or "nothing"
        raise config_error(f"{path}.{name}", f"{name_of_target} takes no argument {name!r}{hint} It takes: {listed}")
    if reserved is None:
        return
    filled = set(reserved)
    missing = [name for name in takes.required if name not in args and name not in filled]
    if missing:
        given = f"{', '.join(map(repr, missing))}, which {'is' if len(missing) == 1 else 'are'} not given"
        raise config_error(path, f"{name_of_target} needs {given}")


def arguments_of(target: Callable[..., Any]) -> Takes:
    """What a class or function takes by name.

    Where a class hands its ``**kwargs`` on to ``super().__init__`` and does nothing else with them, the arguments of
    the class above belong to it as well. A ``**kwargs`` used in any other way takes anything.
    """
    if not inspect.isclass(target):
        return _of_callables([target], skip_self=False)
    if type(target).__call__ is not type.__call__:
        return _of_callables([target], skip_self=False)  # the metaclass decides what a call takes
    inits = [vars(cls)["__init__"] for cls in target.__mro__ if "__init__" in vars(cls) and not _takes_nothing(cls)]
    if inits:
        return _of_callables(inits, skip_self=True)
    return _of_callables([target], skip_self=False)


def _takes_nothing(cls: type) -> bool:
    """Classes whose own constructor ends the chain: by signature they take anything, when called they refuse it."""
    return cls is object or (cls.__module__ == "torch.nn.modules.module" and cls.__name__ == "Module")


def _of_callables(chain: list[Any], *, skip_self: bool) -> Takes:
    names: list[str] = []
    required: list[str] = []
    for position, function in enumerate(chain):
        try:
            parameters = list(inspect.signature(function).parameters.values())[1 if skip_self else 0 :]
        except (TypeError, ValueError):  # a builtin that does not say
            return Takes(tuple(names), tuple(required), anything=True)
        named = [parameter for parameter in parameters if parameter.kind in _NAMED]
        names += [parameter.name for parameter in named if parameter.name not in names]
        if position == 0:
            required = [parameter.name for parameter in named if parameter.default is inspect.Parameter.empty]
        rest = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD), None)
        if rest is None:
            break
        if not (skip_self and _only_hands_on(function, rest)):
            return Takes(tuple(names), tuple(required), anything=True)
    return Takes(tuple(names), tuple(required), anything=False)


def _only_hands_on(function: Callable[..., Any], name: str) -> bool:
    """Whether the only use of ``**name`` in the source of ``function`` is ``super().__init__(..., **name)``."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return False
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == name]
    handed_on = [
        keyword.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and _is_super_init(call.func)
        for keyword in call.keywords
        if keyword.arg is None
    ]
    return bool(uses) and all(any(use is value for value in handed_on) for use in uses)


def _is_super_init(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "__init__"
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == "super"
    )


def display_name(target: Any) -> str:
    """A class's or function's name as an error shows it."""
    return getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or repr(target)
