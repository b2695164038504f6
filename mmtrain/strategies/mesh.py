"""The mesh of ranks: its dimensions and their sizes."""

from collections.abc import Mapping

from mmtrain.errors import ConfigError

_DIMENSIONS = ("replicate", "shard", "dp", "tp")
_PIPELINE = "pipeline parallelism is not supported; use dp and tp"
_REFUSED = {
    "pp": _PIPELINE,
    "pipeline_stage": _PIPELINE,
    "model_parallel": "is called tp here: write strategy.mesh=dict(tp=...)",
    "data_parallel": "is called dp here: write strategy.mesh=dict(dp=...)",
}


def mesh_shape(asked: Mapping[str, int], world: int) -> dict[str, int]:
    """The dimensions of the mesh and their sizes, slowest first: replicate and shard, or dp, and tp if requested.

    What is left out is computed. Raises ConfigError for an impossible mesh, or one of another number of processes.
    """
    _check(asked)
    inner = {"tp": asked["tp"]} if asked.get("tp", 1) > 1 else {}
    rest = max(1, world // asked.get("tp", 1))
    if "dp" in asked or (inner and not {"replicate", "shard"} & asked.keys()):
        shape = {"dp": asked.get("dp", rest), **inner}
    elif "replicate" in asked:
        shape = {
            "replicate": asked["replicate"], "shard": asked.get("shard", max(1, rest // asked["replicate"])), **inner
        }  # fmt: skip
    else:
        shape = {"shard": asked.get("shard", rest), **inner}
    product = 1
    for size in shape.values():
        product *= size
    if product != world:
        product_text = " x ".join(f"{name} {size}" for name, size in shape.items())
        raise ConfigError(f"strategy.mesh: {product_text} makes {product} processes, but {world} were started")
    return shape


def _check(asked: Mapping[str, int]) -> None:
    for name, size in asked.items():
        if name in _REFUSED:
            raise ConfigError(f"strategy.mesh.{name}: {_REFUSED[name]}")
        if name not in _DIMENSIONS:
            raise ConfigError(
                f"strategy.mesh.{name}: unknown dimension; expected 'dp' and 'tp', or 'replicate' and 'shard'"
            )
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"strategy.mesh.{name} is {size!r}; expected a positive integer")
    other = sorted({"replicate", "shard"} & asked.keys())
    if "dp" in asked and other:
        raise ConfigError(
            f"strategy.mesh.dp: found beside {other[0]!r}; dp shards over all of its ranks, "
            "hybrid sharding is replicate=R, shard=S (with tp=T, if wanted)"
        )
