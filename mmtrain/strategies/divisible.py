"""Whether an optimizer gives the same result when parameters are divided over ranks. It is tried, not assumed.

An elementwise optimizer (SGD, Adam) updates each number from this number's own gradient and moments, so any part of a
parameter may be updated on its own. Others use a norm of the parameter (LAMB, LARS), factors of its rows and columns
(Adafactor, Shampoo) or the matrix as such (Muon); on a part they compute something else, without an error.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmtrain import dist
from mmtrain.errors import ConfigError
from mmtrain.optim import OptimWrapper

# Elementwise by their definition; what a trial would find for every start can be left out.
_ELEMENTWISE = (
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"
)  # fmt: skip
_NOT_SHARDED = ("Rprop",)  # assigns by a mask, for which DTensor has no sharding rule
_STEPS = 24
_WIDTH = 4


def refuse_flat_partitions(optim: OptimWrapper, engine: str) -> None:
    """Raise ConfigError for an optimizer that does not update each element by itself.

    ``engine`` names what trains flat pieces of many parameters at once.
    """
    for optimizer in _unknown(optim):
        make = _maker(optimizer)
        shape = (6, _WIDTH)
        together = _trial(make, [_start(shape)], [_gradients(shape)])
        if together is None:  # it steps in another way than these; the run's first step will show whether it can
            continue
        halves = [part.clone() for part in _start(shape).flatten().chunk(2)]
        gradients = [[grad.flatten().chunk(2)[number].clone() for grad in _gradients(shape)] for number in range(2)]
        apart = [_trial(make, [half], [grads]) for half, grads in zip(halves, gradients, strict=True)]
        joined = None if None in apart else torch.cat([one[0] for one in apart if one is not None])
        if joined is None or not _is_same(together[0].flatten(), joined, _start(shape).flatten(), tolerance=2e-5):
            raise ConfigError(
                f"optim_wrapper.optimizer: {type(optimizer).__name__} does not update each element by itself (it uses "
                "a norm, rows and columns, or the matrix), so its results would be wrong on the flat partitions of "
                f"{engine}; use an elementwise optimizer such as AdamW, or DDPStrategy"
            )


def refuse_shards(optim: OptimWrapper, mesh: Any, engine: str) -> None:
    """Raise ConfigError for an optimizer that cannot train sharded parameters (DTensor) as whole ones. A collective."""
    from torch.distributed.tensor import Shard, distribute_tensor

    for optimizer in _unknown(optim, *_NOT_SHARDED):
        make = _maker(optimizer)
        for shape in ((2 * dist.world_size() + 1, _WIDTH), (2 * dist.world_size() + 1,)):
            alone = _trial(make, [_start(shape)], [_gradients(shape)])
            if alone is None:
                continue

            def shard(tensor: Tensor) -> Tensor:
                placements = [Shard(0)] * mesh.ndim
                return distribute_tensor(tensor.to(mesh.device_type), mesh, placements, src_data_rank=None)

            sharded = _sharded_trial(make, shard(_start(shape)), [shard(grad) for grad in _gradients(shape)])
            if isinstance(sharded, Exception):
                reason = f"torch raised {type(sharded).__name__}: {str(sharded).strip().splitlines()[0]}"
            elif _is_same(alone[0], sharded.cpu(), _start(shape), tolerance=0.05):
                continue
            else:
                reason = "its result differs from the one for the same parameter in one piece"
            raise ConfigError(
                f"optim_wrapper.optimizer: {type(optimizer).__name__} cannot train the sharded parameters of {engine} "
                f"({reason}); use an elementwise optimizer such as AdamW, or DDPStrategy"
            )


def _unknown(optim: OptimWrapper, *but: str) -> list[Optimizer]:
    """The optimizers that must be tried: all but torch's elementwise ones, of these those named in ``but``."""
    known = set(_ELEMENTWISE) - set(but)
    return [one for one in optim.optimizers.values() if not (_is_torchs(one) and type(one).__name__ in known)]


def _is_torchs(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.partition(".")[0] == "torch"


def _maker(optimizer: Optimizer) -> Callable[[Sequence[Tensor]], Optimizer]:
    """Makes another optimizer of the same class and arguments."""
    known = inspect.signature(type(optimizer)).parameters
    arguments = {name: value for name, value in optimizer.defaults.items() if name in known}
    if arguments.get("weight_decay") == 0:  # some use norms in the decay alone
        arguments["weight_decay"] = 0.05
    if isinstance(arguments.get("lr"), Tensor):
        arguments["lr"] = float(arguments["lr"])
    if "lr" in arguments and not arguments["lr"]:
        arguments["lr"] = 0.01
    return lambda parameters: type(optimizer)(parameters, **arguments)


def _start(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _gradients(shape: tuple[int, ...]) -> list[Tensor]:
    """Gradients of some steps, chosen so that what looks at more than one element shows it.

    Later rows have larger ones, so that a norm over a part is not that of the whole. The first is orthogonal to each
    row of the start (AdamP projects such gradients); the others agree with one another, so that D-Adaptation and
    Prodigy move.
    """
    start, generator = _start(shape).reshape(shape[0], -1), torch.Generator().manual_seed(2)
    noise = torch.randn(start.shape, generator=generator)
    orthogonal = noise - start * ((noise * start).sum(1, keepdim=True) / start.square().sum(1, keepdim=True))
    scale = torch.linspace(0.1, 10, shape[0]).reshape(-1, 1)
    sizes = [0.2 if step % 3 == 0 else 1.0 for step in range(_STEPS - 1)]  # AdaNorm acts when the norm falls
    later = [size * (noise + 0.3 * torch.randn(start.shape, generator=generator)) for size in sizes]
    return [(grad * scale).reshape(shape) for grad in (orthogonal, *later)]


def _trial(
    make: Callable[[Sequence[Tensor]], Optimizer], starts: list[Tensor], gradients: list[list[Tensor]]
) -> list[Tensor] | None:
    """The parameters after some steps; None if the optimizer cannot be made or stepped like this."""
    try:
        return _steps(make, starts, gradients)
    except Exception:  # whatever another library raises: it takes no such parameters
        return None


def _sharded_trial(
    make: Callable[[Sequence[Tensor]], Optimizer], start: Tensor, gradients: list[Tensor]
) -> Tensor | Exception:
    try:
        result: Any = _steps(make, [start], [gradients])[0]
        return result.full_tensor()
    except Exception as error:
        return error


def _steps(
    make: Callable[[Sequence[Tensor]], Optimizer], starts: list[Tensor], gradients: list[list[Tensor]]
) -> list[Tensor]:
    parameters = [nn.Parameter(start) for start in starts]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        optimizer = make(parameters)
        for step in range(_STEPS):
            for parameter, grads in zip(parameters, gradients, strict=True):
                parameter.grad = grads[step].clone()
            optimizer.step()
    return [parameter.detach() for parameter in parameters]


def _is_same(one: Tensor, other: Tensor, start: Tensor, *, tolerance: float) -> bool:
    """Whether two results differ by less than ``tolerance`` times the length of the way from the start."""
    return bool((one - other).norm() <= tolerance * (one - start).norm())
