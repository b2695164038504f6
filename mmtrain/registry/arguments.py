"""Checks a config's arguments against what a class or function takes, before it is called."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mmtrain.errors import ConfigError
from mmtrain.source_lines import config_error
from mmtrain.suggest import did_you_mean, nearest

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Takes:
    """What a class or function takes by name.

    Attributes:
        names: The names in its signature. After a ``**kwargs``, those of the next class in the MRO follow.
        required: The names that must be given.
        anything: Whether it has a ``**kwargs``. Only the call shows whether another name is accepted.
        bounded: Whether ``names`` are complete, if every ``**kwargs`` is passed to the next class in the MRO.
    """

    names: tuple[str, ...]
    required: tuple[str, ...]
    anything: bool
    bounded: bool


def check_arguments(
    target: Callable[..., Any],
    args: Mapping[str, Any],
    *,
    path: str,
    reserved: Iterable[str] | None = (),
    extra: tuple[str, ...] = (),
) -> None:
    """Raise ConfigError for an argument that ``target`` does not take, or a required one that is missing.

    Args:
        target: A class or function.
        args: The arguments by name.
        path: The dotted path of the dict that holds ``args``.
        reserved: The arguments that the caller fills in; None if these are unknown, so that none is missing.
        extra: Other names that may be in ``args`` and are for the caller.
    """
    takes = arguments_of(target)
    for name in args:
        if not takes.anything and name not in takes.names and name not in extra:
            raise unknown_argument(target, name, path=path, extra=extra)
    if reserved is None:
        return
    filled = set(reserved)
    missing = [name for name in takes.required if name not in args and name not in filled]
    if missing:
        word = "argument" if len(missing) == 1 else "arguments"
        unknown = next((name for name in args if name not in takes.names and nearest(name, missing)), None)
        hint = f"; found {unknown!r}{did_you_mean(unknown, missing)}" if unknown is not None else ""
        raise config_error(path, f"{display_name(target)} requires the {word} {', '.join(map(repr, missing))}{hint}")


def unknown_argument(target: Callable[..., Any], name: str, *, path: str, extra: tuple[str, ...] = ()) -> ConfigError:
    """The error for an argument that ``target`` does not take; see `check_arguments`."""
    names = arguments_of(target).names
    known = (*names, *(other for other in extra if other not in names))
    hint = did_you_mean(name, known) or "."
    listed = ", ".join(known) or "none"
    return config_error(
        f"{path}.{name}", f"{display_name(target)} has no argument {name!r}{hint} Its arguments: {listed}"
    )


def arguments_of(target: Callable[..., Any]) -> Takes:
    """What a class or function takes by name."""
    inits = []
    if inspect.isclass(target) and type(target).__call__ is type.__call__:  # else the metaclass decides
        inits = [vars(cls)["__init__"] for cls in target.__mro__[:-1] if "__init__" in vars(cls)]
    names: list[str] = []
    required: tuple[str, ...] = ()
    functions = inits or [target]
    for function in functions:
        try:
            parameters = list(inspect.signature(function).parameters.values())[1 if inits else 0 :]
        except (TypeError, ValueError):  # a builtin without a signature
            return Takes(tuple(names), required, anything=True, bounded=False)
        named = [parameter for parameter in parameters if parameter.kind in _NAMED]
        if function is functions[0]:
            required = tuple(parameter.name for parameter in named if parameter.default is inspect.Parameter.empty)
        names += [parameter.name for parameter in named if parameter.name not in names]
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            return Takes(tuple(names), required, anything=function is not functions[0], bounded=True)
    return Takes(tuple(names), required, anything=True, bounded=False)


def display_name(target: Any) -> str:
    """The name of a class or function in an error message."""
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or repr(target)
    return str(name).rpartition("<locals>.")[2]
