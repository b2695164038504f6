"""Names that no registry of mmtrain holds: torch's optimizers, dotted import paths, and what to say of unknown ones."""

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.registry import Registry

from mmtrain.errors import ConfigError
from mmtrain.source_lines import config_error
from mmtrain.suggest import did_you_mean, nearest

# What MMEngine puts in a config for a class that is imported later, when it is needed.
LAZY = (LazyAttr, LazyObject)
# How many of the user's files are searched for a class that was never imported.
_FILES_SEARCHED = 500


def torch_optimizers() -> dict[str, type]:
    """torch's optimizers by class name; importing them here spares ``mmengine.optim``."""
    import torch

    members = vars(torch.optim).items()
    return {
        name: value for name, value in members if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
    }


def import_dotted(name: str, *, path: str) -> Any:
    """The object of a dotted path, which may be a class's member (``package.module.Class.from_pretrained``).

    None when there is no such module. Raises ConfigError when the module has no such member or fails to import.
    """
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        return None
    for length in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:length])
        try:
            found: Any = import_module(module_name)
        except ImportError as error:
            absent = getattr(error, "name", None) or ""
            if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{absent}."):
                continue
            raise config_error(path, f"{module_name} cannot be imported: {error}") from error
        for part in parts[length:]:
            if not hasattr(found, part):
                hint = did_you_mean(part, dir(found))
                raise config_error(path, f"{getattr(found, '__name__', found)} has no {part!r}{hint}")
            found = getattr(found, part)
        return found
    return None


def lazy_name(value: Any) -> str:
    """The dotted name that one of MMEngine's lazy objects stands for."""
    if isinstance(value, LazyObject) and value._imported is None:
        return str(value.module)
    return f"{value.module}.{value}"


def import_lazy(value: Any, *, path: str) -> Any:
    """What one of MMEngine's lazy objects stands for; any other value as it is. Raises ConfigError."""
    if not isinstance(value, LAZY):
        return value
    name = lazy_name(value)
    try:
        found = import_dotted(name, path=path)
        return value.build() if found is None else found
    except ConfigError:
        raise
    except Exception as error:
        place = f" (imported in {value.location})" if value.location else ""
        raise config_error(path, f"{name}{place} cannot be imported: {error.__context__ or error}") from error


def not_found(registry: Registry, name: str, registries: Mapping[str, Registry]) -> str:
    """The sentence for a name that ``registry`` and its root do not hold: near names, where they are defined, and which
    import is missing. ``registries`` are all of mmtrain's by the name of their constant."""
    constant = next(constant for constant, value in registries.items() if value is registry)
    short = name.rpartition(".")[2]
    known = _candidates(registry, with_torch=constant == "OPTIMIZERS")
    parts = [f"no {registry.name} is named {name!r}"]
    scope = name.partition(".")[0]
    if "." in name and scope not in ("mmengine", *registry.root.children):
        parts.append(f"and no module {scope!r} can be imported")
    near = nearest(short, known, 3)
    if near:
        parts.append("near names: " + ", ".join(known[found] for found in near))
    parts += _elsewhere(registry, short, registries)
    return "; ".join(parts) + ". " + _missing_import(constant, short)


def _candidates(registry: Registry, *, with_torch: bool) -> dict[str, str]:
    """Every name that could have been meant, with the text that shows it and the module that defines it."""
    held: list[tuple[str, Mapping[str, Any]]] = [("", torch_optimizers() if with_torch else {})]
    held += [
        (f"{scope}.", child.module_dict) for scope, child in registry.root.children.items() if child is not registry
    ]
    held += [("", registry.root.module_dict), ("", registry.module_dict)]
    return {
        name: f"{prefix + name!r} ({_module(value)})" for prefix, members in held for name, value in members.items()
    }


def _module(value: Any) -> str:
    return getattr(value, "__module__", None) or type(value).__module__


def _elsewhere(registry: Registry, name: str, registries: Mapping[str, Registry]) -> list[str]:
    for constant, other in registries.items():
        held = other.module_dict.get(name, other.root.module_dict.get(name))
        if other is not registry and held is not None:
            return [f"{name!r} is registered in {constant} ({_module(held)}), which is not what belongs here"]
    return []


def _missing_import(constant: str, name: str) -> str:
    module = _module_that_defines(name)
    if module is None:
        return (
            f"A class of your own is found once it has the decorator @{constant}.register_module() and its module is "
            "named by custom_imports = dict(imports=['your_module'])"
        )
    return (
        f"{module.replace('.', '/')}.py defines it: give it the decorator @{constant}.register_module() and write "
        f"custom_imports = dict(imports=['{module}'])"
    )


def _module_that_defines(name: str) -> str | None:
    """The module, in the working directory or one folder below, whose file defines ``name`` at its top level."""
    if not name.isidentifier():
        return None
    pattern = re.compile(rf"^(?:class|def) {name}\b", re.MULTILINE)
    for file in islice(_own_files(), _FILES_SEARCHED):
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if pattern.search(text):
            module = ".".join(file.with_suffix("").parts)
            return module if module not in sys.modules else None
    return None


def _own_files() -> Iterator[Path]:
    here = Path()
    for pattern in ("*.py", "*/*.py"):
        yield from (file for file in sorted(here.glob(pattern)) if not file.parts[0].startswith("."))
