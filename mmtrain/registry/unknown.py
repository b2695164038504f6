"""The error message for a name that no registry holds: what could be meant, and how to register a class."""

import re
import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from mmengine.registry import Registry

from mmtrain.registry.names import torch_optimizers
from mmtrain.suggest import nearest

# How many of the user's files are searched for a class that was not imported.
_FILES_SEARCHED = 500


def unknown_name(registry: Registry, name: str, registries: Mapping[str, Registry]) -> str:
    """The message for a name that is neither in ``registry`` nor in its root.

    It has the near names and the modules that define them, the registry that does hold the name, or the import that is
    missing. ``registries`` are all of mmtrain's, by the name of their constant.
    """
    constant = next(constant for constant, value in registries.items() if value is registry)
    short = name.rpartition(".")[2]
    known = _candidates(registry, with_torch=constant == "OPTIMIZERS")
    text = f"there is no {registry.name.replace('_', ' ')} named {name!r}"
    scope = name.partition(".")[0]
    if "." in name and scope and scope not in ("mmengine", *registry.root.children):
        text += f" and no module {scope!r}"
    near = [known[found] for found in nearest(short, known, 3)]
    if near:
        text += f"; did you mean {' or '.join(near)}?"
    text += _elsewhere(registry, constant, short, registries)
    return f"{text}{'' if text.endswith('?') else '.'} {_missing_import(constant, short)}"


def _candidates(registry: Registry, *, with_torch: bool) -> dict[str, str]:
    """Every name that could be meant, with its text for the message: the name and the module that defines it."""
    named: list[tuple[str, Mapping[str, Any]]] = [("", torch_optimizers() if with_torch else {})]
    named += [
        (f"{scope}.", child.module_dict) for scope, child in registry.root.children.items() if child is not registry
    ]
    named += [("", registry.root.module_dict), ("", registry.module_dict)]
    return {
        name: f"{prefix + name!r} ({_module(value)})" for prefix, members in named for name, value in members.items()
    }


def _module(value: Any) -> str:
    return getattr(value, "__module__", None) or type(value).__module__


def _elsewhere(registry: Registry, constant: str, name: str, registries: Mapping[str, Registry]) -> str:
    for other_constant, other in registries.items():
        found = other.module_dict.get(name, other.root.module_dict.get(name))
        if other is not registry and found is not None:
            return f"; {name!r} is registered in {other_constant} ({_module(found)}), not in {constant}"
    return ""


def _missing_import(constant: str, name: str) -> str:
    module = _module_that_defines(name)
    if module is None:
        return (
            f"To use a class of your own, decorate it with @{constant}.register_module() and import its module with "
            "custom_imports = dict(imports=['your_module'])"
        )
    return (
        f"{module.replace('.', '/')}.py defines it: decorate it with @{constant}.register_module() and import it with "
        f"custom_imports = dict(imports=['{module}'])"
    )


def _module_that_defines(name: str) -> str | None:
    """The module, in the working directory or one folder below, whose file defines ``name`` at its top level."""
    if not name.isidentifier():
        return None
    pattern = re.compile(rf"^(?:class|def) {name}\b", re.MULTILINE)
    for file in islice(_user_files(), _FILES_SEARCHED):
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if pattern.search(text):
            module = ".".join(file.with_suffix("").parts)
            return module if module not in sys.modules else None
    return None


def _user_files() -> Iterator[Path]:
    here = Path()
    for pattern in ("*.py", "*/*.py"):
        yield from (file for file in sorted(here.glob(pattern)) if not file.parts[0].startswith("."))
