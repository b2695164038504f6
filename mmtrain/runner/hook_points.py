"""The points at which hooks run, and which hooks run there: computed once, so an unused point costs nothing.

The points are MMEngine's, with its arguments, plus two. Drawn in the loop::

    before_run
    before_train
    while the run lasts:
        before_train_epoch                         at the first iteration of an epoch, and after a resume inside one
        before_train_iter(batch_idx, data_batch)
            forward, backward, at a window's end the optimizer step
        after_train_iter(batch_idx, data_batch, outputs)
        after_train_epoch                          after the last iteration of an epoch
        before_val, before_val_epoch, {before_val_iter, after_val_iter}*, after_val_epoch(metrics), after_val
        before_save_checkpoint(checkpoint), after_save_checkpoint(entry)
    after_train
    after_run
    on_exception(error)                            instead of what is left, when anything raised

A save in the background ends later than the step that began it: `after_save_checkpoint` then fires at the end of a
later step, the same on every rank. With several ranks it is one at which they exchange what they know.
"""

from collections.abc import Callable, Iterable
from typing import Any

from mmtrain.errors import ConfigError
from mmtrain.suggest import did_you_mean

POINTS = (
    "before_run", "after_run", "before_train", "after_train", "before_train_epoch", "after_train_epoch",
    "before_train_iter", "after_train_iter", "before_val", "after_val", "before_val_epoch", "after_val_epoch",
    "before_val_iter", "after_val_iter", "before_test", "after_test", "before_test_epoch", "after_test_epoch",
    "before_test_iter", "after_test_iter", "before_save_checkpoint", "after_load_checkpoint",
    "after_save_checkpoint", "on_exception",
)  # fmt: skip

# MMEngine's generic methods and the points each one serves when the specific method is not overridden.
_GENERIC = {
    "_before_epoch": ("before_train_epoch", "before_val_epoch", "before_test_epoch"),
    "_after_epoch": ("after_train_epoch", "after_val_epoch", "after_test_epoch"),
    "_before_iter": ("before_train_iter", "before_val_iter", "before_test_iter"),
    "_after_iter": ("after_train_iter", "after_val_iter", "after_test_iter"),
}

PRIORITIES = {
    "HIGHEST": 0, "VERY_HIGH": 10, "HIGH": 30, "ABOVE_NORMAL": 40, "NORMAL": 50,
    "BELOW_NORMAL": 60, "LOW": 70, "VERY_LOW": 90, "LOWEST": 100,
}  # fmt: skip

Bound = Callable[..., Any]


class HookList:
    """The hooks of a run by name, in the order of their priorities (smaller runs earlier; equal ones as given).

    ``hook_list.points[point]`` is the list of bound methods that do something at that point.
    """

    def __init__(self, hooks: Iterable[tuple[str, Any]]) -> None:
        named = list(hooks)
        for name, hook in named:
            _refuse_unknown_points(name, hook)
        named.sort(key=lambda pair: priority_of(pair[1]))
        self.named: dict[str, Any] = {}
        for name, hook in named:
            self.named[_free_name(name, self.named)] = hook
        self.points: dict[str, list[Bound]] = {
            point: [getattr(hook, point) for _, hook in named if _overrides(hook, point)] for point in POINTS
        }

    def __iter__(self):
        return iter(self.named.values())

    def call(self, point: str, runner: Any, **arguments: Any) -> None:
        """Run every hook that does something at ``point``."""
        for method in self.points[point]:
            method(runner, **arguments)


def priority_of(hook: Any) -> int:
    """A hook's priority as a number. Raises ConfigError for a name that is not one of MMEngine's."""
    value = getattr(hook, "priority", "NORMAL")
    if isinstance(value, str):
        if value.upper() not in PRIORITIES:
            raise ConfigError(
                f"{type(hook).__name__}.priority is {value!r}; expected a number or one of {', '.join(PRIORITIES)}"
            )
        return PRIORITIES[value.upper()]
    return int(value)


def _free_name(name: str, taken: dict[str, Any]) -> str:
    # Two hooks of one class have two names, so that each gets its own state back.
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    return candidate


def _refuse_unknown_points(name: str, hook: Any) -> None:
    for attribute in dir(type(hook)):
        if attribute.startswith(("before_", "after_")) and attribute not in POINTS:
            hint = did_you_mean(attribute, POINTS) or "."
            raise ConfigError(
                f"hook {name!r} ({type(hook).__module__}.{type(hook).__name__}) has a method {attribute!r}, "
                f"which is not a hook point and would never run{hint}. Start the names of helper methods with '_'."
            )


def _overrides(hook: Any, point: str) -> bool:
    if _is_own(hook, point):
        return True
    return any(point in served and _is_own(hook, generic) for generic, served in _GENERIC.items())


def _is_own(hook: Any, name: str) -> bool:
    """Whether the class, or a class it inherits from other than a base Hook, defines ``name``."""
    if name in vars(hook):
        return True
    for cls in type(hook).__mro__:
        if name in vars(cls):
            return not _is_base_hook(cls)
    return False


def _is_base_hook(cls: type) -> bool:
    return cls.__name__ == "Hook" and cls.__module__ in ("mmengine.hooks.hook", "mmtrain.hooks.base")
