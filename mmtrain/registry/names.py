"""Names that are in no registry: torch's optimizers, dotted import paths, and what a config imports lazily."""

import inspect
from importlib import import_module
from typing import Any

from mmengine.config.lazy import LazyAttr, LazyObject

from mmtrain.errors import ConfigError
from mmtrain.source_lines import config_error
from mmtrain.suggest import did_you_mean

# MMEngine's placeholders in a config for a class that is imported when it is needed.
LAZY = (LazyAttr, LazyObject)


def torch_optimizers() -> dict[str, type]:
    """torch's optimizers by class name. ``mmengine.optim`` registers them too, but is slow to import."""
    import torch

    members = vars(torch.optim).items()
    return {
        name: value for name, value in members if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
    }


def import_dotted(name: str, *, path: str) -> Any:
    """The object at a dotted path, which may end inside a class (``package.module.Class.from_pretrained``).

    Returns None if there is no such module. Raises ConfigError if the module has no such member or cannot be imported.
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
    """Import what one of MMEngine's lazy objects stands for; any other value is returned. Raises ConfigError."""
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
