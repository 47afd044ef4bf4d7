"""Kinds of input: what makes two calls of a callable the same to a plan, and what is known of each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from autoremat.engines.torch.eager.first import Cached
from autoremat.engines.torch.eager.path import Path
from autoremat.engines.torch.eager.script import Script, script_of
from autoremat.engines.torch.eager.sections import Sections, Taken
from autoremat.plan import clock
from autoremat.program import Plan
from autoremat.record.compiled import is_compiled
from autoremat.record.local import Jagged, is_jagged, local_of
from autoremat.record.parallel import Parallel, parallel_of
from autoremat.record.parallel import signature as parallel_signature
from autoremat.record.world import reachable_modules

MAX_DEVIATIONS: Final = 3
"""So often at most a kind of input is recorded anew; a step that has strayed more of late is noted from the start."""
MAX_MEASURED: Final = 3
"""How many steps of a plan are tried to measure one."""
_FORGIVEN: Final = 0.1
"""So much less a kind of input strays with every step that stays on its path."""


@dataclass
class Straying:
    """How steps of a kind leave their path.

    Attributes:
        deviations: how often, in all.
        records: how often the kind has been recorded.
        of_late: how much of late: one for each, a tenth less for every step that makes the calls of the path.
        way: where the last step left the path, and how many calls it made; None if it did not.
        growth: by so much what steps made was larger than recorded, at most.
    """

    deviations: int = 0
    records: int = 0
    of_late: float = 0.0
    way: tuple[int, int] | None = None
    growth: float = 1.0

    @property
    def is_habit(self) -> bool:
        """Whether steps stray so much that the next one goes without the plan."""
        return self.of_late > MAX_DEVIATIONS

    def recorded_anew(self) -> Straying:
        """What is to be remembered when the kind is recorded once more."""
        return Straying(self.deviations, self.records + 1, self.of_late)

    def step_is_over(self, way: tuple[int, int] | None) -> bool:
        """A step has come to its end; whether it has left the path as the last one did: for good, it seems."""
        before, self.way = self.way, way
        if way is None:
            self.of_late = max(0.0, self.of_late - _FORGIVEN)
        return way is not None and way == before

    def left(self, growth: float) -> None:
        """A step has left its path."""
        self.deviations += 1
        self.of_late += 1
        self.growth = max(self.growth, growth)


@dataclass
class Kind:
    """What is known of one kind of input.

    Attributes:
        plan: for it; None where it runs without checkpointing.
        script: that carries it out; None where there is no plan.
        path: of its forward, once it has been recorded.
        parallel: what torch.distributed does around the modules.
        straying: how its steps leave the path.
        cached: what the first step may have left for the second one to find.
        differing: new reasons why a call must not be made again, by its number.
        sections: what listens to code of the user's in the backward of the first step.
        taken: what such code takes, if that is not in the plan yet.
        is_new: the next step is its first one.
        stale: it is to be recorded anew.
        quick: the plan is the first that was found, good for a kind of input that never comes back.
        checked: a step with this plan has been through the self-check.
        since_seconds: when the plan was made.
        together: calls before one backward that the plan is for.
        steps: calls under this plan.
        measured_bytes: the measured peak of one of them.
        to_measure: how many more steps may be measured.
    """

    plan: Plan | None = None
    script: Script | None = None
    path: Path | None = None
    parallel: Parallel = field(default_factory=Parallel)
    straying: Straying = field(default_factory=Straying)
    cached: Cached | None = None
    differing: dict[int, str] = field(default_factory=dict)
    sections: Sections | None = None
    taken: tuple[Taken, ...] = ()
    is_new: bool = False
    stale: bool = False
    quick: bool = False
    checked: bool = False
    since_seconds: float = 0.0
    together: int = 1
    steps: int = 0
    measured_bytes: int | None = None
    to_measure: int = 0

    def follow(self, plan: Plan, budget_bytes: int, *, quick: bool = False) -> None:
        """Take this plan from now on; all calls before one backward have so many bytes."""
        assert self.path is not None
        script = replace(script_of(plan, self.path), budget_bytes=budget_bytes)
        if self.parallel.units:  # off the path nobody knows which parameters are there
            script = replace(script, budget_bytes=None)
        self.plan, self.script = plan, script
        self.quick, self.since_seconds, self.checked = quick, clock.now(), False
        self.steps, self.measured_bytes, self.to_measure = 0, None, MAX_MEASURED

    def step_is_over(self, way: tuple[int, int] | None) -> None:
        """A step has come to its end; ``way``: where it left the path, and how many calls it made."""
        self.checked = True
        if self.straying.step_is_over(way) and self.straying.records <= MAX_DEVIATIONS:
            self.stale = True

    def left(self, growth: float) -> bool:
        """A step has left the path; whether steps of this kind will go on leaving it."""
        self.straying.left(growth)
        has_grown = growth > 1
        self.stale = has_grown and self.straying.records <= MAX_DEVIATIONS
        return self.straying.is_habit or (has_grown and not self.stale)


def input_signature(fn: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What makes two calls the same kind: everything that usually decides which operators run.

    Shapes, strides, dtypes, devices and ``requires_grad`` of tensor arguments; other arguments by value where they
    are numbers, strings or flags; of every module that the callable can reach, ``training``, and which parameters
    require and have gradients; autocast.
    """
    leaves, structure = torch.utils._pytree.tree_flatten((tuple(args), kwargs))
    roots = reachable_modules(fn, args, kwargs)
    modules = _all_modules(roots)
    flags = tuple([(m.training, is_compiled(m)) for m in modules])
    tables = [table for m in modules for table in (m._parameters, m._buffers) if table]
    tensors = tuple([_tensor_signature(t) for table in tables for t in table.values() if t is not None])
    autocast = tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))
    around = parallel_signature(parallel_of(roots))
    return structure, tuple(_leaf_signature(x) for x in leaves), flags, tensors, autocast, around


def _all_modules(roots: Sequence[nn.Module]) -> list[nn.Module]:
    """These modules and all inside them, each once; ``nn.Module.modules`` takes several times as long."""
    found: dict[int, nn.Module] = {}
    pending = list(roots)
    while pending:
        module = pending.pop()
        if id(module) not in found:
            found[id(module)] = module
            pending += [m for m in module._modules.values() if m is not None]
    return list(found.values())


def _tensor_signature(tensor: Tensor) -> tuple[Any, ...]:
    shape = None if nn.parameter.is_lazy(tensor) else tuple(tensor.shape)
    return tensor.requires_grad, tensor.is_leaf and tensor.grad is not None, tensor.dtype, shape


def _leaf_signature(x: Any) -> Any:
    if is_jagged(x):  # every one has a size of its own, told by its offsets
        inside = Jagged.of(x)
        return "jagged", _leaf_signature(local_of(x)), tuple(inside.offsets.shape), x.requires_grad
    if isinstance(x, Tensor):
        stride = tuple(x.stride()) if x.layout is torch.strided else None
        grad = x.is_leaf and x.grad is not None
        return x.dtype, tuple(x.shape), stride, x.device, x.requires_grad, grad, getattr(x, "placements", None)
    if isinstance(x, (int, float, str, bool, type(None), complex, bytes)):
        return type(x), x
    return id(x) if isinstance(x, nn.Module) else type(x)
