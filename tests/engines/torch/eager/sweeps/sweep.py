"""One sample of one operator of torch's own database: trained plainly and with everything computed again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.testing._internal import common_methods_invocations
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.testing._utils import wrapper_set_seed
from torch.utils._pytree import tree_leaves, tree_map_only

from autoremat.engines.torch.eager.first import NotRecorded
from autoremat.engines.torch.eager.tape import Reports, Tape
from autoremat.program import Plan
from tests.engines.torch.compare import off_path, plan_that_keeps_nothing, same
from tests.engines.torch.follow import following, recorded, reruns_of

torch.backends.__allow_nonbracketed_mutation_flag = True  # torch's own test code forbids it to the whole process

SEED = 1
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128)
EVERY: tuple[OpInfo, ...] = tuple(op for op in op_db if "empty" not in op.name and "jiterator" not in op.name)
"""Those without a gradient, too; not what is whatever the memory held before, and what runs on GPUs alone."""
Around = Callable[[], AbstractContextManager[Any]]
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


class Aside(Step):
    """The operator where nobody asks for its gradient."""

    def __init__(self, call: Callable[..., Any], finish: Callable[[Any], Any], around: Around) -> None:
        super().__init__(call, finish)
        self.around, self.weight = around, nn.Parameter(torch.ones(3))

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, list[Tensor]]:
        with self.around():
            args, kwargs = tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
            made = tree_leaves((self.finish(self.operator(*args, **kwargs)), args, kwargs))
        return square(self.weight.exp()), [dense(t).clone() for t in made if isinstance(t, Tensor)]


class WithGradients(Step):
    """The operator and a gradient of it in the forward, or a gradient of that."""

    def __init__(self, call: Callable[..., Any], finish: Callable[[Any], Any], order: int) -> None:
        super().__init__(call, finish)
        self.order = order

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, list[Tensor]]:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        loss, made = super().forward(*args, **kwargs)
        objective = loss
        for order in range(self.order):
            if objective is None:
                break
            last = order + 1 == self.order
            found = torch.autograd.grad(objective, inputs, allow_unused=True, retain_graph=True, create_graph=not last)
            made += [dense(t.detach()) for t in found if t is not None]
            squares = [square(t) for t in found if t is not None and t.requires_grad]
            objective = sum(squares) if squares else None
        return loss, made


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
        refused: what plain torch said when it refused the sample.
        wrong: what is not as in plain training.
        asked: values with bytes that the operator made and the backward asks for.
        again: how many of them are computed again.
        kept: of the operator's ATen operators those that must not run again, and why.
        random: numbers were drawn.
    """

    refused: str = ""
    wrong: tuple[str, ...] = ()
    asked: int = 0
    again: int = 0
    kept: tuple[tuple[str, str], ...] = ()
    random: bool = False


def name_of(op: OpInfo) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def sweep(op: OpInfo, dtypes: Iterable[torch.dtype], at_most: int) -> list[Outcome]:
    """The outcomes of some samples of every dtype, as a function and in place, where they are differentiable."""
    supported = [d for d in dtypes if d in op.supported_backward_dtypes("cpu")]
    with quiet():
        found = [examine(call, s) for d in supported for s in samples(op, d, at_most) for call in calls_of(op, s)]
    return [outcome for outcome in found if outcome is not None]


def samples(op: OpInfo, dtype: torch.dtype, at_most: int) -> list[SampleInput]:
    """Some samples of an operator, always the same: from all over its list, those without elements last."""
    torch.manual_seed(SEED)
    differentiable = dtype.is_floating_point or dtype.is_complex
    found = sorted(op.sample_inputs_func(op, "cpu", dtype, differentiable), key=is_empty)  # without its stack traces
    n = min(at_most, len(found))
    return [found[(2 * k + 1) * len(found) // (2 * n)] for k in range(n)]


def is_empty(sample: SampleInput) -> bool:
    return any(isinstance(t, Tensor) and not t.numel() for t in tree_leaves((sample.input, sample.args, sample.kwargs)))


def calls_of(op: OpInfo, sample: SampleInput) -> Iterator[Callable[..., Any]]:
    """The operator as a function and, where it has a differentiable one, in place."""
    wrapper = op.gradcheck_wrapper
    wrapper = _without_seed if wrapper is wrapper_set_seed else wrapper
    yield partial(wrapper, op.get_op())
    if op.inplace_variant is not None and op.supports_inplace_autograd and not sample.broadcasts_input:
        yield partial(wrapper, op.inplace_variant)


def examine(call: Callable[..., Any], sample: SampleInput) -> Outcome | None:
    """Train one step plainly and with everything computed again; None where nothing is differentiable."""
    return examine_step(Step(call, sample.output_process_fn_grad), (sample.input, *sample.args), dict(sample.kwargs))


def examine_step(step: Step, args: Any, kwargs: Any) -> Outcome | None:
    """The same for a step and its arguments, of which copies are taken."""
    args, kwargs = tree_map_only(Tensor, leaf, (args, kwargs))
    try:
        plain = observe(step, args, kwargs)
    except RuntimeError as error:
        return Outcome(refused=str(error))
    if plain is None:
        return None
    torch.manual_seed(SEED)
    try:
        with unchanged(step, args, kwargs):
            program, path = recorded(step, args, kwargs)
    except NotRecorded as error:  # its backward looks at numbers: such a step runs without checkpointing
        return Outcome(kept=(("the step", str(error)),))
    plan = plan_that_keeps_nothing(program)
    wrong: list[str] = []
    reruns: list[float] = []
    tape = following(plan, path, Reports(lambda reason, growth: wrong.append(reason), reruns.append), check=True)
    got = observe(step, args, kwargs, tape)
    assert got is not None
    assert tape.script is not None
    wrong += [name for name, value in plain.items() if not same(got[name], value)]
    if not (len(reruns) > 0) <= (reruns_of(tape.script) > 0) or len(reruns) > reruns_of(tape.script):
        wrong.append(f"{len(reruns)} calls were made again in place of {reruns_of(tape.script)}")
    drawn = not same(plain["generator"], torch.Generator().manual_seed(SEED).get_state())
    return account_of(plan, tuple(wrong), drawn)


@contextmanager
def within(*around: AbstractContextManager[Any]) -> Iterator[None]:
    """Several blocks at once."""
    with ExitStack() as stack:
        for block in around:
            stack.enter_context(block)
        yield


class Place(NamedTuple):
    """Where an operator may stand: a step in which it does, and whether the backward gets there."""

    step: Callable[[Callable[..., Any], Callable[[Any], Any]], Step]
    is_differentiated: bool


def _bfloat16() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


PLACES = {
    "in a model": Place(Step, True),
    "within autocast": Place(lambda call, finish: Step(_bfloat16()(call), finish), True),
    "with a gradient in the forward": Place(partial(WithGradients, order=1), True),
    "with a second gradient in the forward": Place(partial(WithGradients, order=2), True),
    "on data": Place(partial(Aside, around=nullcontext), False),
    "in no_grad within autocast": Place(partial(Aside, around=lambda: within(_bfloat16(), torch.no_grad())), False),
    "in inference_mode": Place(partial(Aside, around=torch.inference_mode), False),
    "in inference_mode within autocast": Place(
        partial(Aside, around=lambda: within(_bfloat16(), torch.inference_mode())), False
    ),
}


def wrong_at(place: Place, op: OpInfo, dtype: torch.dtype, at_most: int) -> list[list[str]]:
    """For every sample of an operator what is not as in plain training where it stands in this place."""
    if dtype not in (op.supported_backward_dtypes("cpu") if place.is_differentiated else op.dtypes):
        return []
    found = []
    with quiet():
        for sample in samples(op, dtype, at_most):
            for call in calls_of(op, sample):
                step = place.step(call, sample.output_process_fn_grad)
                found.append(wrong_off_path(step, (sample.input, *sample.args), dict(sample.kwargs)))
    return [wrong for wrong in found if wrong is not None]


def wrong_off_path(step: Step, args: Any, kwargs: Any) -> list[str] | None:
    """What is not as in plain training where the first op leaves the path and the budget has room for nothing.

    None where plain torch refuses the step or nothing is differentiable.
    """
    args, kwargs = tree_map_only(Tensor, leaf, (args, kwargs))
    try:
        plain = observe(step, args, kwargs)
    except RuntimeError:
        return None
    if plain is None:
        return None
    got = observe(step, args, kwargs, off_path()) or {}
    return [name for name, value in plain.items() if not same(got[name], value)]


def account_of(plan: Plan, wrong: tuple[str, ...], random: bool) -> Outcome:
    """What of the operator was computed again, what was kept and why."""
    program = plan.program
    own = {i: op for i, op in enumerate(program.ops) if op.phase == "forward" and op.module.startswith("operator")}
    asked = {op.reads[0] for op in program.ops if op.kind == "ask" and program.values[op.reads[0]].nbytes}
    makers = [program.producer[v] for v in asked if program.producer[v] in own]
    again = sum(plan.schedule.runs_of[i] > 1 for i in makers)
    kept = [(op.name, op.why) for op in own.values() if op.once]
    return Outcome("", wrong, len(makers), again, tuple(kept), random)


def is_steady(op: OpInfo, runs: int = 30) -> bool:
    """Whether plain torch computes the same numbers whenever it is asked."""
    with quiet():
        for sample in (s for dtype in DTYPES if dtype in op.dtypes for s in samples(op, dtype, 6)):
            step = Step(next(calls_of(op, sample)), sample.output_process_fn_grad)
            args, kwargs = tree_map_only(Tensor, leaf, ((sample.input, *sample.args), dict(sample.kwargs)))
            first = observe(step, args, kwargs)
            for again in (observe(step, args, kwargs) for _ in range(runs)):
                if first and again and not all(same(again[name], value) for name, value in first.items()):
                    return False
    return True


def leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(t.requires_grad)


def observe(step: Step, args: Any, kwargs: Any, tape: Tape | None = None) -> dict[str, Any] | None:
    """Everything that a step leaves behind, each under its name; inputs, parameters and buffers are as before.

    None where nothing is differentiable.
    """
    tensors = tensors_of(step, args, kwargs)
    torch.manual_seed(SEED)
    with unchanged(step, args, kwargs):
        with tape.forward() if tape is not None else nullcontext():
            loss, made = step(*args, **kwargs)
        if loss is None:
            return None
        seen: dict[str, Any] = {"generator after the forward": torch.get_rng_state(), "loss": loss.detach()}
        loss.backward()
        seen |= {f"output {i}": dense(t) for i, t in enumerate(made)}
        seen |= {f"gradient of {name}": dense(t.grad) for name, t in tensors.items()}
        seen |= {name: dense(t.detach()).clone() for name, t in tensors.items()}
        seen["generator"] = torch.get_rng_state()
    return seen


def tensors_of(step: Step, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """Inputs, parameters and buffers, each under its name."""
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    return {f"input {i}": t for i, t in enumerate(inputs)} | dict((*step.named_parameters(), *step.named_buffers()))


def dense(t: Any) -> Any:
    return t.to_dense() if t is not None and t.layout is not torch.strided else t


@contextmanager
def unchanged(step: Step, args: Any, kwargs: Any) -> Iterator[None]:
    """Inputs, parameters and buffers are afterwards as before: no gradients, and the same numbers."""
    tensors = list(tensors_of(step, args, kwargs).values())
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
    """Operators warn of this and that; the database has random ones draw from a generator that is then put back."""
    with warnings.catch_warnings(), patch.object(common_methods_invocations, "wrapper_set_seed", _without_seed):
        warnings.simplefilter("ignore")
        yield


def _without_seed(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return call(*args, **kwargs)
