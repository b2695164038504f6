"""Loads a config as MMEngine's Config, with ``--cfg-options`` merged in."""

import importlib
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.config.config import RESERVED_KEYS

from mmtrain.config.dump import PythonWriter, top_level
from mmtrain.config.keys import KEYS
from mmtrain.config.lazy import Placeholder, resolve_placeholders, run_config
from mmtrain.config.reader import read_source
from mmtrain.errors import ConfigError
from mmtrain.source_lines import OPTIONS, ConfigSource, config_error, positions, short_name
from mmtrain.suggest import nearest

_SUFFIXES = (".py", ".json", ".yaml", ".yml")


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read a config file and merge ``overrides`` (dotted path to value, as in ``--cfg-options``) into it.

    The modules in ``custom_imports`` are imported. Names that the file imports, and variables that cannot be written
    as Python source, are left out. MMEngine's lazy objects remain only as the value of a ``type``.

    Raises ConfigError for a missing file, a syntax error, an exception in the config, an override that does not fit, a
    module that cannot be imported, and a value of a key that cannot be written as Python source.
    """
    given = Path(path).expanduser()
    file = _existing(given)
    source = read_source(file)
    cfg = _read(file, source)
    _merge(cfg, overrides or {}, source)
    with positions(source):
        members = {name: value for name, value in top_level(cfg).items() if not _is_import(name, value, source)}
        members = {name: resolve_placeholders(value, name) for name, value in members.items()}
        cfg = Config(_writable(members), cfg_text=cfg.text, filename=str(given), env_variables=cfg.env_variables)
        object.__setattr__(cfg, "_mmtrain_source", source)
        import_custom_modules(cfg)
    return cfg


def parse_overrides(options: Iterable[str]) -> dict[str, Any]:
    """``["a.b=1", "c=[x,y]"]`` as ``{"a.b": 1, "c": ["x", "y"]}``, with values as in MMEngine's DictAction.

    Raises ConfigError for an option without ``=`` or without a name, and for brackets that do not match.
    """
    overrides: dict[str, Any] = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals or not all(name.strip().split(".")):
            raise ConfigError(f"{OPTIONS}: found {option!r}, expected key=value, as in optim_wrapper.optimizer.lr=1e-4")
        overrides[name.strip()] = _override_value(option, text)
    return overrides


def _override_value(option: str, text: str) -> Any:
    plain = text.strip().strip("'\"")
    if not any(sign in plain for sign in ",[]()"):
        return DictAction._parse_int_float_bool(plain)  # MMEngine would remove the spaces from a string
    try:
        return DictAction._parse_iterable(text)
    except AssertionError as error:
        raise ConfigError(f"{OPTIONS}: unmatched brackets in {option!r}") from error
    except RecursionError:  # in MMEngine, for dict(a=1, b=2)
        raise ConfigError(
            f"{OPTIONS}: cannot read the value in {option!r}; write a list as [a,b], a tuple as (a,b), and a dict "
            "key by key, as in strategy.type=FSDPStrategy"
        ) from None


# -- reading


def _existing(path: Path) -> Path:
    shown = short_name(str(path))
    if path.is_dir():
        raise ConfigError(f"config {shown} is a directory; name a file in it")
    if not path.is_file():
        beside = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = nearest(path.name, beside)
        hint = f"; did you mean {short_name(str(path.parent / near[0]))}?" if near else f" (relative to {Path.cwd()})"
        raise ConfigError(f"config {shown} does not exist{hint}")
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"config {shown}: expected a file that ends in {', '.join(_SUFFIXES)}")
    return path.absolute()


def _read(file: Path, source: ConfigSource) -> Config:
    try:
        if source.pure_python:
            return Config(run_config(file, source), filename=str(file), format_python_code=False)
        return Config.fromfile(str(file), import_custom_modules=False, format_python_code=False, lazy_import=False)
    except ConfigError:
        raise
    except Exception as error:
        _close_temporary_file(error)
        line = _line_in(error, source)
        text = _text(error)
        if line or not text:
            text = f"{type(error).__name__}: {text}"
        raise ConfigError(f"{line or 'config ' + short_name(str(file))}: {text}") from error


def _text(error: BaseException) -> str:
    """The message of an error on one line, without the quotes that KeyError adds."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split())


def _close_temporary_file(error: BaseException) -> None:
    """Close the temporary copy of a config, which MMEngine leaves open if the config raises."""
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_locals.get("temp_config_file")
        if file is not None:
            file.close()
        trace = trace.tb_next


def _line_in(error: BaseException, source: ConfigSource) -> str:
    """The innermost line of a config file in the traceback of ``error``."""
    found, trace = "", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if str(Path(name).resolve()) in {str(Path(file).resolve()) for file in source.files}:
            found = f"config {short_name(name)}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _merge(cfg: Config, overrides: dict[str, Any], source: ConfigSource) -> None:
    for name, value in overrides.items():
        if name.partition(".")[0] in RESERVED_KEYS:
            raise ConfigError(f"`{name}` ({OPTIONS}): this name is reserved by MMEngine; use another one")
        try:
            cfg.merge_from_dict({name: value})
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise ConfigError(f"`{name}` ({OPTIONS}) does not fit the config: {_text(error)}") from error
        source.override(name, value)


def _is_import(name: str, value: Any, source: ConfigSource) -> bool:
    """Whether a top-level name is only something that the file imports, or a function or class that it defines."""
    if isinstance(value, ModuleType):
        return True
    code = (type, FunctionType, BuiltinFunctionType)
    if name in source.imported:
        return isinstance(value, (Placeholder, *code))
    return isinstance(value, code) and getattr(value, "__name__", None) == name


def _writable(members: dict[str, Any]) -> dict[str, Any]:
    """The members that can be written as source. A key that cannot is an error; a variable is left out."""
    kept = {}
    for name, value in members.items():
        try:
            PythonWriter().tree(value, name)
        except ConfigError:
            if name in KEYS:
                raise
            continue
        kept[name] = value
    return kept


# -- custom_imports


def import_custom_modules(cfg: Any) -> None:
    """Import the modules of ``custom_imports=dict(imports=[...], allow_failed_imports=False)``.

    They are searched on ``sys.path``, then in the working directory and in that of the config file. Raises ConfigError
    for a module that is not found or that raises.
    """
    wanted = cfg.get("custom_imports")
    if not wanted:
        return
    imports = wanted.get("imports") if isinstance(wanted, dict) else None
    names = [imports] if isinstance(imports, str) else imports
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise config_error("custom_imports", "expected dict(imports=['module', ...])")
    file = getattr(cfg, "filename", None)
    folders = [str(Path.cwd()), *([str(Path(file).absolute().parent)] if file else [])]
    for index, name in enumerate(names):
        _import_module(name, f"custom_imports.imports[{index}]", folders, optional=wanted.get("allow_failed_imports"))


def _import_module(name: str, path: str, folders: list[str], *, optional: Any) -> None:
    before = list(sys.path)
    # They stay on the path if a module was found there, for later imports and for data workers.
    sys.path.extend(folder for folder in folders if folder not in sys.path)
    try:
        importlib.import_module(name)
        return
    except ModuleNotFoundError as error:
        cause: Exception = error
        found = not f"{name}.".startswith(f"{error.name}.")
        text = f"cannot import {name}: {error}" if found else f"there is no module {name!r}"
    except Exception as error:
        found = True
        cause, text = error, f"importing {name} raised {type(error).__name__}: {error}{_place(error)}"
    sys.path[:] = before
    if optional:
        warnings.warn(f"custom_imports: {text} (ignored, because allow_failed_imports=True)", stacklevel=2)
        return
    if not found:
        text += f" on sys.path or in {' or '.join(dict.fromkeys(folders))}"
    raise config_error(path, text) from cause


def _place(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return ""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({short_name(trace.tb_frame.f_code.co_filename)}, line {trace.tb_lineno})" if trace else ""
