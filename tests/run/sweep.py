"""One sample of one operator of torch's own database: trained plainly and with everything computed again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils._pytree import tree_leaves, tree_map_only

from recollect.plan.unroll import unroll
from recollect.program import Op, Plan, Program, Schedule, simulate
from recollect.record import record
from recollect.run import Tape, instructions_for
from tests.run.compare import same

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128)
OPERATORS: tuple[OpInfo, ...] = tuple(op for op in op_db if op.supports_autograd)


class Operator(nn.Module):
    """A module of its own, so that a program tells the operator's ops from those around it."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


class Step(nn.Module):
    """The operator on activations, and a loss whose backward asks for everything that the operator made."""

    def __init__(self, call: Callable[..., Any], finish: Callable[[Any], Any]) -> None:
        super().__init__()
        self.operator, self.finish = Operator(call), finish

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, list[Tensor]]:
        args, kwargs = tree_map_only(Tensor, activation, (args, kwargs))
        out = self.finish(self.operator(*args, **kwargs))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        squares = [square(t) for t in made if t.requires_grad]
        return sum(squares) if squares else None, [t.detach().clone() for t in made]


def activation(t: Tensor) -> Tensor:
    """What a step computes from an input; running statistics stay what they are."""
    computed = t.requires_grad or not (t.is_floating_point() or t.is_complex())
    return t.clone() if computed else t


def square(t: Tensor) -> Tensor:
    """A number that depends on every element; its backward reads the tensor."""
    t = t if t.layout is torch.strided else t.to_dense()
    if t.is_complex():
        return square(t.real) + square(t.imag)
    return (t * t).sum().double()


@dataclass(frozen=True)
class Outcome:
    """What became of one sample.

    Attributes:
        wrong: what is not as in plain training.
        own: ATen operators that the operator consists of.
        again: how many of them ran again.
        kept: those that must not run again, and why.
        left_path: the reason for which the forward left the recorded path.
    """

    wrong: tuple[str, ...]
    own: int
    again: int
    kept: tuple[tuple[str, str], ...]
    left_path: str


def samples(op: OpInfo, dtype: torch.dtype, at_most: int) -> Iterator[SampleInput]:
    """The first samples of an operator, always the same."""
    torch.manual_seed(0)
    for k, sample in enumerate(op.sample_inputs("cpu", dtype, requires_grad=True)):
        if k == at_most:
            return
        yield sample


def calls_of(op: OpInfo, sample: SampleInput) -> Iterator[Callable[..., Any]]:
    """The operator as a function and, where it has a differentiable one, in place."""
    yield lambda *args, **kwargs: op.gradcheck_wrapper(op.get_op(), *args, **kwargs)
    in_place = op.inplace_variant
    if in_place is not None and op.supports_inplace_autograd and not sample.broadcasts_input:
        yield lambda *args, **kwargs: op.gradcheck_wrapper(in_place, *args, **kwargs)


def examine(call: Callable[..., Any], sample: SampleInput) -> Outcome | None:
    """Train one step plainly and with everything computed again; None where nothing is differentiable."""
    step = Step(call, sample.output_process_fn_grad)
    args, kwargs = tree_map_only(Tensor, leaf, ((sample.input, *sample.args), dict(sample.kwargs)))
    with quiet(), unchanged(args, kwargs):
        torch.manual_seed(1)
        loss, _ = step(*args, **kwargs)
    if loss is None:
        return None
    with quiet():
        plain = observe(step, args, kwargs)
        with unchanged(args, kwargs):
            plan = plan_that_keeps_nothing(record(step, args, kwargs, timing="estimate"))
        reruns: list[None] = []
        reasons: list[str] = []
        tape = Tape(instructions_for(plan), reasons.append, lambda: reruns.append(None))
        got = observe(step, args, kwargs, tape)
    wrong = [name for name, value in plain.items() if not same(got[name], value)]
    expected = len(plan.schedule.order) - len(plan.program.ops)
    if not reasons and len(reruns) != expected:
        wrong.append(f"{len(reruns)} reruns instead of {expected}")
    own = own_ops(plan.program)
    again = [i for i in own if plan.schedule.runs_of[i] > 1]
    kept = [(op.name, op.repeatable) for op in own.values() if op.repeatable]
    return Outcome(tuple(wrong), len(own), len(again), tuple(kept), "".join(reasons))


def leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(t.requires_grad)


def own_ops(program: Program) -> dict[int, Op]:
    """The ops of the forward that the operator consists of, by index."""
    return {i: op for i, op in enumerate(program.ops) if op.phase == "forward" and op.module == "operator"}


def plan_that_keeps_nothing(program: Program) -> Plan:
    """Whatever may be computed again is."""
    schedule = Schedule.from_order(program, unroll(program, frozenset()))
    peak, plain_peak = simulate(program, schedule).peak_bytes, simulate(program).peak_bytes
    return Plan(program, schedule, peak, peak, plain_peak, peak, 0.0, 0.0, "keep nothing")


def observe(step: Step, args: Any, kwargs: Any, tape: Tape | None = None) -> dict[str, Any]:
    """Everything that a step leaves behind, each under its name; the inputs are as before."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    torch.manual_seed(1)
    with unchanged(args, kwargs):
        if tape is None:
            loss, made = step(*args, **kwargs)
        else:
            with tape.forward():
                loss, made = step(*args, **kwargs)
        seen: dict[str, Any] = {"generator after the forward": torch.get_rng_state(), "loss": loss.detach()}
        loss.backward()
        seen |= {f"output {i}": dense(t) for i, t in enumerate(made)}
        seen |= {f"gradient {i}": dense(t.grad) for i, t in enumerate(tensors)}
        seen |= {f"input {i}": dense(t.detach()).clone() for i, t in enumerate(tensors)}
        seen["generator"] = torch.get_rng_state()
    return seen


def dense(t: Tensor | None) -> Tensor | None:
    return t.to_dense().resolve_conj().resolve_neg() if t is not None and t.layout is not torch.strided else t


@contextmanager
def unchanged(args: Any, kwargs: Any) -> Iterator[None]:
    """Inputs are afterwards as before: no gradients, and the same numbers."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    copies = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        for t, copy in zip(tensors, copies, strict=True):
            t.grad = None
            if not same(dense(t.detach()), dense(copy)):
                t.detach().copy_(copy)


@contextmanager
def quiet() -> Iterator[None]:
    """Operators warn of this and that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
