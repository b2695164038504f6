"""Checks that all ranks run the same modules and get gradients of the same parameters.

FSDP2 and ZeRO exchange parameters and gradients in the order in which each rank comes to them. Ranks that take
different branches (stochastic depth, experts, heads that depend on the sample) then exchange those of different
parameters: where the sizes happen to fit, nothing fails and the model is wrong; where not, gloo aborts and NCCL hangs.

In the first updates, and the first evaluations, each step is compared over ranks before it communicates. Later each
rank keeps a trace of its steps, and a hash of it is compared every `EVERY` updates and before each save and evaluation.
"""

from array import array
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple, NoReturn

import torch
import xxhash
from torch import Tensor

from mmtrain import dist
from mmtrain.errors import RunError
from mmtrain.printable import listed

FIRST = 5  # updates, and forwards of evaluation, in which each step is compared before it communicates
EVERY = 50  # updates between two comparisons of hashes
_SIZE_BITS = 42
_NAMED = 4  # parameters, or ranks, that a message lists
WITH, _WITHOUT = "got a gradient of", "got no gradient of"


class Step(NamedTuple):
    """What a rank did: ``did`` is put between "rank 1" and ``name``."""

    did: str
    name: str
    in_backward: bool = False


class Lockstep:
    """Traces the steps of this rank, and compares them over ranks.

    ``engine`` is the strategy's name for messages. ``defers``: a difference in the backward is not raised at once but
    sets `is_apart`, so that the backward ends without communication and `end_backward` can name the parameters.
    All ranks must `declare` the same steps in the same order. ``in_backward`` is set by the strategy around a backward
    that `end_backward` follows. ``compiled``: the model is, and its graphs must leave this out.
    """

    def __init__(
        self, engine: str, parameters: Mapping[str, Tensor], *, defers: bool = False, compiled: bool = False
    ) -> None:
        self._engine = engine
        self._parameters = [(name, parameter) for name, parameter in parameters.items() if parameter.requires_grad]
        self._defers = defers
        self.in_backward = False
        self._steps: list[Step] = []
        self._end_of_forward = self.declare("ended the forward")
        self._end = self.declare("ended the backward", in_backward=True)
        self._without = [self.declare(_WITHOUT, name) for name, _ in self._parameters]
        self._group = torch.distributed.new_group(backend="gloo")
        self._updates = self._evaluations = 0
        self._strict = False
        self._collected: set[int] = set()
        self._apart: list[int] = []  # what each rank does, once that differs
        self._trace = array("q")
        self._hashes = array("Q")  # of each update, or evaluation, since the last check
        if compiled:
            for name in ("begin", "step"):
                setattr(self, name, torch.compiler.disable(getattr(self, name)))
        self._known: dict[int, array[int]] = {}  # the trace of each hash
        self._checked = 0  # updates that were done at the last check

    def declare(self, did: str, name: str = "", *, in_backward: bool = False) -> int:
        """A number for a step, to be given to `step`."""
        self._steps.append(Step(did, name, in_backward))
        return len(self._steps) - 1

    def watch_forwards(self, model: torch.nn.Module) -> None:
        """`begin` at each forward of the whole model, whose end is a step; where every rank must run it."""
        model.register_forward_pre_hook(lambda *_: self.begin(), prepend=True)
        model.register_forward_hook(lambda *_: self.step(self._end_of_forward))

    def begin(self) -> None:
        """Decide whether the steps that follow are compared one by one."""
        if torch.is_grad_enabled():
            self._strict = self._updates < FIRST
        else:
            self._strict = self._evaluations < FIRST
            self._evaluations += 1

    @property
    def is_apart(self) -> bool:
        """Whether the ranks have come apart, so that this one must not communicate."""
        return bool(self._apart)

    def step(self, number: int, size: int = 0) -> None:
        """Note a step, of ``size`` elements, just before it communicates. Raises RunError."""
        value = number << _SIZE_BITS | size
        self._trace.append(value)
        if self._strict and not self._apart:
            self._compare(value)

    def collect(self, number: int) -> None:
        """Note a step whose place among others has no effect; `compare_collected` makes one step of all of them."""
        self._collected.add(number)

    def compare_collected(self) -> None:
        """Note the end of what was collected, just before it communicates. Raises RunError."""
        values = [number << _SIZE_BITS for number in sorted(self._collected)]
        self._collected.clear()
        self._trace.extend(values)
        if self._strict:
            everyone = dist.gather_objects(values)
            if any(other != values for other in everyone):
                found = [{self._steps[value >> _SIZE_BITS].name for value in other} for other in everyone]
                self._raise(self._unequal(found))

    def _compare(self, value: int) -> None:
        own = torch.tensor([value])
        everyone = [torch.empty_like(own) for _ in range(dist.world_size())]
        torch.distributed.all_gather(everyone, own, group=self._group)
        values = [int(other) for other in everyone]
        if len(set(values)) > 1:
            self._apart = values
            backward = self.in_backward and all(self._steps[one >> _SIZE_BITS].in_backward for one in values)
            if not (self._defers and backward):
                self._raise(self._list(values))

    def end_backward(self) -> None:
        """Note the end of a backward; raises RunError if the ranks came apart in it."""
        self.step(self._end)
        self.in_backward = False
        if self._apart:
            found = {name for name, parameter in self._parameters if parameter.grad is not None}
            self._raise(self._unequal(dist.gather_objects(found)) or self._list(self._apart))

    def end_update(self, *, look: bool = True) -> None:
        """Note, before the optimizer steps, which parameters have no gradient (with ``look``), and check if it is due.

        Raises RunError where ranks differ.
        """
        if look:
            for number, (_, parameter) in zip(self._without, self._parameters, strict=True):
                if parameter.grad is None:
                    self._trace.append(number << _SIZE_BITS)
        self._keep_trace()
        self._updates += 1
        if self._updates <= FIRST or len(self._hashes) >= EVERY:
            self.check()

    def check(self) -> None:
        """Compare all steps since the last check; a collective. Raises RunError where they differ."""
        if self._trace:
            self._keep_trace()
        everyone = dist.gather_objects(xxhash.xxh3_64_intdigest(self._hashes))
        if len(set(everyone)) > 1:
            self._raise_difference()
        del self._hashes[:]
        self._known.clear()
        self._checked = self._updates

    def _keep_trace(self) -> None:
        digest = xxhash.xxh3_64_intdigest(self._trace)
        if digest not in self._known:
            self._known[digest] = self._trace[:]
        self._hashes.append(digest)
        del self._trace[:]

    # ---- what is said of it ---------------------------------------------------------------------------------------
    def _raise_difference(self) -> NoReturn:
        """Find the first update in which the ranks differ, and in it the parameters or the step."""
        hashes = dist.gather_objects(self._hashes.tolist())
        first = next((index for index, one in enumerate(zip(*hashes, strict=False)) if len(set(one)) > 1), None)
        if first is None:
            self._raise("they did different numbers of updates or evaluations")
        traces = dist.gather_objects(self._known[self._hashes[first]].tolist())
        found = [{self._steps[v >> _SIZE_BITS] for v in trace} for trace in traces]
        every = {name for name, _ in self._parameters}
        without = [every - {step.name for step in steps if step.did == _WITHOUT} for steps in found]
        arrived = [{step.name for step in steps if step.did == WITH} for steps in found]
        steps = zip_longest(*traces, fillvalue=self._end << _SIZE_BITS)
        apart = next(one for one in steps if len(set(one)) > 1)
        self._raise(
            self._unequal(without) or self._unequal(arrived) or self._list(apart),
            min(self._checked + first + 1, self._updates),
        )

    def _list(self, values: Sequence[int]) -> str:
        """What each rank does, those together that do the same."""
        said = []
        for value in dict.fromkeys(values):
            step, size = self._steps[value >> _SIZE_BITS], value & (1 << _SIZE_BITS) - 1
            who = _ranks([rank for rank, other in enumerate(values) if other == value])
            said.append(f"{who} {step.did} {step.name}".strip() + (f" ({size} elements)" if size else ""))
        return ", ".join(said[:_NAMED]) + (", ..." if len(said) > _NAMED else "")

    def _unequal(self, found: Sequence[set[str]]) -> str:
        """Which parameters have a gradient on some ranks only, those together that have it on the same; "" if none."""
        kinds: dict[tuple[int, ...], list[str]] = {}
        for name, _ in self._parameters:
            having = tuple(rank for rank, names in enumerate(found) if name in names)
            if 0 < len(having) < len(found):
                kinds.setdefault(having, []).append(name)
        return "; ".join(
            f"{listed(names, _NAMED)} got {'a gradient' if len(names) == 1 else 'gradients'} only on {_ranks(having)}"
            for having, names in list(kinds.items())[:_NAMED]
        )

    def _raise(self, difference: str, update: int | None = None) -> NoReturn:
        number = update or self._updates + 1
        raise RunError(
            f"the ranks ran different branches of the model at update {number} of this start: {difference}. "
            f"{self._engine} needs the same modules and gradients of the same parameters on every rank: "
            "make the choice alike on all ranks (randomness=dict(diff_rank_seed=False) makes them draw alike), use all "
            "branches in every loss (add 0.0 * output.sum()), or use DDPStrategy with find_unused_parameters=True"
        )


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {listed([*map(str, ranks)], _NAMED)}"
