"""MMEngine's visualizer, made only when it is used: importing it takes a second."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtrain.registry import VISBACKENDS, VISUALIZERS, build, resolve

LOCAL = "LocalVisBackend"


class LazyVisualizer:
    """Stands in for a Visualizer that writes to local files only; the real one is made at the first use."""

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        self._cfg = dict(cfg)
        self._made: Any = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy, pickle and inspect look for these without using it
            raise AttributeError(name)
        if self._made is None:
            self._made = _make(self._cfg, "visualizer")
        return getattr(self._made, name)


def build_visualizer(cfg: Any, *, save_dir: str | Path, name: str = "visualizer", path: str = "visualizer") -> Any:
    """The run's visualizer: an object is returned as it is, a config is built, None gives MMEngine's default.

    Files go to ``<save_dir>/vis_data``. A visualizer with only the local backend is a `LazyVisualizer`.
    Raises ConfigError for unknown names and arguments.
    """
    if cfg is not None and not isinstance(cfg, Mapping):
        return cfg
    full = {"type": "Visualizer", "vis_backends": [{"type": LOCAL}], **dict(cfg or {})}
    full.setdefault("name", name)
    full.setdefault("save_dir", str(save_dir))
    backends = full["vis_backends"] or []
    full["vis_backends"] = [backends] if isinstance(backends, Mapping) else list(backends)
    if full["type"] == "Visualizer" and all(_is_local(backend) for backend in full["vis_backends"]):
        return LazyVisualizer(full)
    return _make(full, path)


def scalar_targets(visualizer: Any) -> list[Any]:
    """What receives scalars: the visualizer's backends except the local one, or a user's object itself."""
    if isinstance(visualizer, LazyVisualizer):
        return []
    backends = getattr(visualizer, "_vis_backends", None)
    if not isinstance(backends, Mapping):
        return [visualizer] if hasattr(visualizer, "add_scalars") else []
    return [backend for backend in backends.values() if LOCAL not in {cls.__name__ for cls in type(backend).__mro__}]


def _is_local(backend: Any) -> bool:
    return isinstance(backend, Mapping) and backend.get("type") == LOCAL


def _make(cfg: Mapping[str, Any], path: str) -> Any:
    options = dict(cfg)
    options["vis_backends"] = [
        {**backend, "type": resolve(VISBACKENDS, backend["type"], path=f"{path}.vis_backends[{index}].type")}
        if isinstance(backend, Mapping)
        else backend
        for index, backend in enumerate(options["vis_backends"])
    ]
    return build(VISUALIZERS, options, path=path)
