"""The registries, which are children of MMEngine's with the scope ``mmtrain``, and how a dict becomes an object.

A name is looked up in mmtrain's registry first and in MMEngine's only when it is not there, because importing
MMEngine's hooks, models or optimizers costs up to a second of start-up.
"""

import inspect
import re
from collections.abc import Mapping
from importlib import import_module
from types import TracebackType
from typing import Any

from mmengine import registry as mmengine_registry
from mmengine.registry import DefaultScope
from mmengine.registry import Registry as MMEngineRegistry
from mmengine.utils import ManagerMixin

from mmtrain.errors import ConfigError
from mmtrain.registry.arguments import arguments_of, check_arguments, display_name, unknown_argument
from mmtrain.registry.names import LAZY, import_dotted, import_lazy, lazy_name, torch_optimizers
from mmtrain.registry.unknown import unknown_name
from mmtrain.source_lines import config_error, short_name

SCOPE = "mmtrain"
# Packages whose classes were written for another runner: a class of mmtrain with the same name is used instead.
REPLACED_PACKAGES = ("mmengine", "xtuner")
# What a constructor raises about its arguments. Any other exception is not about the config and passes through.
_ARGUMENT_ERRORS = (TypeError, ValueError, KeyError, AssertionError)
# What Python says about a name that a ``**kwargs`` took and a function called with it did not.
_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")


class Registry(MMEngineRegistry):
    """A registry of mmtrain.

    ``locations`` are the packages that register classes here. ``fallback`` is the package of MMEngine that fills the
    root; it is imported when a name is found nowhere else.
    """

    def __init__(self, root: MMEngineRegistry, *, locations: tuple[str, ...] = (), fallback: str | None = None) -> None:
        super().__init__(
            root.name, parent=root, scope=SCOPE, locations=list(locations), build_func=_build_from_registry
        )
        self.fallback = fallback
        self._imported: bool = False

    def import_from_location(self) -> None:
        """Import the packages that register classes here."""
        if not self._imported:
            self._imported = True  # before the imports, which register classes and so come here again
            try:
                for location in self._locations:
                    import_module(location)
            except BaseException:
                self._imported = False
                raise

    def _register_module(self, module: Any, module_name: Any = None, force: bool = False) -> None:
        # mmtrain's classes are registered first: a name that is already taken is an error at the user's decorator, and
        # ``force=True`` there replaces mmtrain's class.
        if not str(getattr(module, "__module__", "")).startswith(f"{SCOPE}."):
            self.import_from_location()
        super()._register_module(module=module, module_name=module_name, force=force)

    def registered(self, name: str) -> Any:
        """The class or function registered here under ``name``, or None; the root is not searched."""
        if name not in self.module_dict:
            self.import_from_location()
        return self.module_dict.get(name)

    def import_fallback(self) -> None:
        """Import the package of MMEngine that fills the root, if there is one."""
        if self.fallback is not None:
            import_module(self.fallback)


def _build_from_registry(cfg: Any, registry: Registry, default_args: Mapping[str, Any] | None = None) -> Any:
    """``MODELS.build(cfg)``, which models written for MMEngine call."""
    path = next(constant for constant, value in REGISTRIES.items() if value is registry) + ".build()"
    if isinstance(cfg, list) and registry is MODELS:
        from mmengine.model import Sequential

        return Sequential(*(build(registry, part, path=path, **(default_args or {})) for part in cfg))
    return build(registry, cfg, path=path, **(default_args or {}))


def _child(root: str, *locations: str, fallback: str | None = None) -> Registry:
    return Registry(getattr(mmengine_registry, root), locations=locations, fallback=fallback)


RUNNERS = _child("RUNNERS", "mmtrain.runner", fallback="mmengine.runner")
RUNNER_CONSTRUCTORS = _child("RUNNER_CONSTRUCTORS")
LOOPS = _child("LOOPS", "mmtrain.runner", fallback="mmengine.runner")
HOOKS = _child("HOOKS", "mmtrain.hooks", fallback="mmengine.hooks")
STRATEGIES = _child("STRATEGIES", "mmtrain.strategies", fallback="mmengine._strategy")
DATASETS = _child("DATASETS", "mmtrain.datasets", fallback="mmengine.dataset")
DATA_SAMPLERS = _child("DATA_SAMPLERS", "mmtrain.data", fallback="mmengine.dataset")
TRANSFORMS = _child("TRANSFORMS", "mmtrain.datasets")
MODELS = _child("MODELS", "mmtrain.models", fallback="mmengine.model")
MODEL_WRAPPERS = _child("MODEL_WRAPPERS", fallback="mmengine.model")
WEIGHT_INITIALIZERS = _child("WEIGHT_INITIALIZERS", fallback="mmengine.model")
OPTIMIZERS = _child("OPTIMIZERS", "mmtrain.optim", fallback="mmengine.optim")
OPTIM_WRAPPERS = _child("OPTIM_WRAPPERS", "mmtrain.optim", fallback="mmengine.optim")
OPTIM_WRAPPER_CONSTRUCTORS = _child("OPTIM_WRAPPER_CONSTRUCTORS", "mmtrain.optim", fallback="mmengine.optim")
PARAM_SCHEDULERS = _child("PARAM_SCHEDULERS", "mmtrain.optim", fallback="mmengine.optim")
METRICS = _child("METRICS", "mmtrain.evaluation", fallback="mmengine.evaluator")
EVALUATOR = _child("EVALUATOR", "mmtrain.evaluation", fallback="mmengine.evaluator")
TASK_UTILS = _child("TASK_UTILS")
VISUALIZERS = _child("VISUALIZERS", fallback="mmengine.visualization")
VISBACKENDS = _child("VISBACKENDS", fallback="mmengine.visualization")
LOG_PROCESSORS = _child("LOG_PROCESSORS", fallback="mmengine.runner")
INFERENCERS = _child("INFERENCERS", fallback="mmengine.infer")
FUNCTIONS = _child("FUNCTIONS", "mmtrain.data", fallback="mmengine.dataset")

REGISTRIES = {name: value for name, value in list(globals().items()) if isinstance(value, Registry)}


# -- from a type to a class


def resolve(registry: Registry, type_: Any, *, path: str, scope: str | None = None) -> Any:
    """The class or function for a ``type``.

    A string is a registered name (in mmtrain's registry, then in MMEngine's), a name with a scope
    (``mmengine.LoggerHook``), or a dotted import path. A class or function is returned, unless it is from MMEngine or
    xtuner and mmtrain has a class of the same name, which is then returned instead. ``path`` is the dotted path of the
    ``type``, for errors; ``scope`` is the ``_scope_`` of the dict, in which a name is looked up first.

    Raises ConfigError, which names similar names, where they are defined, and which import is missing.
    """
    name = lazy_name(type_) if isinstance(type_, LAZY) else type_
    if isinstance(name, str):
        # By name, before anything is imported: the package that is replaced may not be installed.
        package, _, rest = name.partition(".")
        ours = registry.registered(name.rpartition(".")[2]) if rest and package in REPLACED_PACKAGES else None
        if ours is not None:
            return ours
    type_ = import_lazy(type_, path=path)
    if isinstance(type_, str):
        found = _find_in_scope(registry, scope, type_, path=path) if scope and "." not in type_ else None
        return _ours_instead(registry, found or _of_name(registry, type_, path=path))
    if not callable(type_):
        raise config_error(path, f"expected a name, a class or a function, found {type_!r}")
    return _ours_instead(registry, type_)


def _of_name(registry: Registry, name: str, *, path: str) -> Any:
    found = _find(registry, name, path)
    scope = name.partition(".")[0]
    in_scope = name.count(".") == 1 and (scope in (SCOPE, "mmengine") or scope in registry.root.children)
    if found is None and "." in name and not in_scope:
        found = import_dotted(name, path=path)
    if found is None:
        raise config_error(path, unknown_name(registry, name, REGISTRIES))
    return found


def _ours_instead(registry: Registry, target: Any) -> Any:
    package = str(getattr(target, "__module__", "")).partition(".")[0]
    if package in REPLACED_PACKAGES:
        return registry.registered(getattr(target, "__name__", "")) or target
    return target


def _find(registry: Registry, name: str, path: str) -> Any:
    scope, _, short = name.rpartition(".")
    if not scope:
        return _find_plain(registry, name, path)
    return _find_in_scope(registry, scope, short, path=path) if "." not in scope else None


def _find_plain(registry: Registry, name: str, path: str) -> Any:
    found = registry.registered(name)
    if found is None and registry is OPTIMIZERS:
        found = torch_optimizers().get(name)
    current = DefaultScope.get_current_instance()
    if found is None and current is not None and current.scope_name not in (SCOPE, "mmengine"):
        found = _find_in_scope(registry, current.scope_name, name, path=path)
    return _find_in_root(registry, name) if found is None else found


def _find_in_root(registry: Registry, name: str) -> Any:
    root = registry.root
    if name not in root.module_dict:
        registry.import_fallback()
    return root.module_dict.get(name)


def _find_in_scope(registry: Registry, scope: str, name: str, *, path: str) -> Any:
    if scope == SCOPE:
        return registry.registered(name)
    if scope == "mmengine":
        return _find_in_root(registry, name)
    root = registry.root
    if scope not in root.children:
        try:
            import_module(f"{scope}.registry")
        except ImportError as error:
            # What looks like a scope may be the module of a dotted path. A module that exists and fails is an error.
            if error.name not in (scope, f"{scope}.registry"):
                raise config_error(path, f"{scope} cannot be imported: {error}") from error
    child = root.children.get(scope)
    if child is None:
        return None
    child.import_from_location()
    return child.module_dict.get(name)


# -- from a dict to an object


def build(registry: Registry, cfg: Any, *, path: str, **defaults: Any) -> Any:
    """Build one object from ``cfg``, a dict with ``type`` and the arguments. Anything but a dict is returned.

    ``path`` is the dotted path of ``cfg``. ``defaults`` are arguments for which ``cfg`` may have a value (``type`` can
    be one of them); those that the target does not take are left out. ``cfg`` is not changed.

    Raises ConfigError for a type that is not found, for an unknown or missing argument, and when the constructor raises
    TypeError, ValueError, KeyError or AssertionError.
    """
    if not isinstance(cfg, Mapping):
        return cfg
    args: dict[str, Any] = dict(dict.items(cfg)) if isinstance(cfg, dict) else dict(cfg)
    type_ = args.pop("type", defaults.pop("type", None))
    scope = args.pop("_scope_", None)
    if type_ is None:
        raise config_error(path, "expected a dict with `type`; `type` is missing")
    target = resolve(registry, type_, path=f"{path}.type", scope=scope)
    takes = arguments_of(target)
    for name, value in defaults.items():
        if name in takes.names or not takes.bounded:
            args.setdefault(name, value)
    args = {name: import_lazy(value, path=f"{path}.{name}") for name, value in args.items()}
    if inspect.isclass(target) and issubclass(target, ManagerMixin):
        return _build_managed(target, args, path=path)
    check_arguments(target, args, path=path)
    return _call(target, target, args, path=path)


def _build_managed(target: Any, args: dict[str, Any], *, path: str) -> Any:
    """MMEngine keeps these objects by name for the whole process; each run in it gets a new one."""
    args.setdefault("name", target.__name__)
    check_arguments(target, args, path=path)
    target._instance_dict.pop(args["name"], None)
    return _call(target.get_instance, target, args, path=path)


def _call(function: Any, target: Any, args: dict[str, Any], *, path: str) -> Any:
    try:
        return function(**args)
    except ConfigError:
        raise
    except _ARGUMENT_ERRORS as error:
        unexpected = _UNEXPECTED.search(str(error)) if isinstance(error, TypeError) else None
        if unexpected and unexpected[1] in args and unexpected[1] not in arguments_of(target).names:
            raise unknown_argument(target, unexpected[1], path=path) from error
        raised = raised_at(error)
        at = f" ({raised})" if raised else ""
        text = str(error) or "no message"
        raise config_error(
            path, f"{display_name(target)} cannot be built: {type(error).__name__}: {text}{at}"
        ) from error


def raised_at(error: BaseException) -> str:
    """The file and line that raised ``error``, or an empty string if that is this file."""
    frame: TracebackType | None = error.__traceback__
    last = None
    while frame is not None:
        last, frame = frame, frame.tb_next
    if last is None or last.tb_frame.f_code.co_filename == __file__:
        return ""
    return f"{short_name(last.tb_frame.f_code.co_filename)}, line {last.tb_lineno}"
