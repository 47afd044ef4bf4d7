"""A script, trained plainly and with autoremat, compared to the last bit."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import autoremat
from autoremat.engines.torch.eager.away import Store
from autoremat.engines.torch.eager.first import FirstStep
from autoremat.engines.torch.eager.session import Session
from autoremat.engines.torch.eager.tape import Reports
from autoremat.engines.torch.operators import timing
from autoremat.engines.torch.operators.timing import Cost
from autoremat.engines.torch.world.memory_account import account, resident
from autoremat.planner import beside
from autoremat.planner.beside import Here, Wanted
from autoremat.planner.search.calls import planned_as, unfolded
from autoremat.planner.search.tables import tables_of
from autoremat.planner.search.unrolled import unroll
from autoremat.program import InfeasibleBudget, Link, Plan, Program, Schedule, simulate, verify
from tests.engines.torch.compare import frozen, off_path, plan_that_keeps_nothing, same
from tests.engines.torch.eager.fuzz.model import Model
from tests.engines.torch.eager.fuzz.scripts import WIDTH, If, In, Instruction, Script, Step, Way, leaves_of
from tests.engines.torch.eager.fuzz.uses import USES, Call
from tests.engines.torch.eager.stores import AtRandom
from tests.planner.random_offloads import with_random_offloads

SCALARS_BYTES = 64


# ---- running a script --------------------------------------------------------------------------------------------


def _kind_of(error: Exception) -> str:
    """The kind that plain torch knows: ours are kinds of those."""
    return next(c.__name__ for c in type(error).__mro__ if not c.__module__.startswith("autoremat"))


def train(script: Script, wrap: Callable[[Model], Call]) -> Iterator[tuple[str, Any]]:
    """The steps of a script; every number that can be seen, under its name. An error of torch's ends it."""
    torch.manual_seed(0)
    random.seed(0)
    model = Model(script)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    call = wrap(model)
    for n, step in enumerate(script.steps):
        model.train(step.training)
        xs = inputs_of(step, n)
        if step.use != "accumulate":
            optimizer.zero_grad()
        try:
            result = USES[step.use](call, model, xs, step.k)
            optimizer.step()
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            yield f"step {n}, error", (_kind_of(error), str(error))
            return
        for name, seen in visible(model, xs, result):
            yield f"step {n}, {name}", frozen(seen)


def inputs_of(step: Step, n: int) -> list[Tensor]:
    own = torch.Generator().manual_seed(n)
    xs = [torch.randn(step.rows, WIDTH, generator=own) * step.sign for _ in range(2)]
    xs[1].requires_grad_(step.input_grad)
    return xs


def visible(model: Model, xs: list[Tensor], result: Any) -> Iterator[tuple[str, Any]]:
    for i, leaf in enumerate(tree_leaves(result)):
        yield f"result {i}", leaf
    yield "order of nodes", nodes_in_order(result)
    for name, p in model.named_parameters():
        yield f"gradient of {name}", p.grad
        yield f"parameter {name}", p
    yield from model.named_buffers()
    for i, x in enumerate(xs):
        yield f"input {i}", x
        yield f"gradient of input {i}", x.grad
    for i, t in enumerate(model.kept):
        yield f"kept {i}", t
    yield "generator", model.generator
    yield "torch's generator", torch.get_rng_state()
    yield "python's generator", random.getstate()


def nodes_in_order(result: Any) -> tuple[str, ...]:
    """The names of the nodes behind a result, as they were made: that order decides how gradients are added up."""
    found: dict[Any, None] = {}
    pending = [node_of(t) for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
    while pending:
        node = pending.pop()
        if node is not None and node not in found and not hasattr(node, "variable"):
            found[node] = None
            pending += [n for n, _ in node.next_functions]
    return tuple(node.name() for node in sorted(found, key=lambda node: node._sequence_nr()))


def node_of(tensor: Tensor) -> Any:
    """None of a view from which torch lets nobody go on."""
    try:
        return tensor.grad_fn
    except RuntimeError:
        return None


COSTS: dict[Any, Cost] = {}
MEASURE = timing._measure_for_real


@contextmanager
def scratch_only() -> Iterator[None]:
    """Operators are measured for what they allocate; all of them take as long."""
    quick = {"_MEASURED": COSTS, "_CACHE_BYTES": 0, "_time_once": lambda *call: 1e-6, "_MAX_REPEATS": 1}
    quick["_LEAST_SECONDS"] = float("inf")
    quick["_measure_for_real"] = MEASURE
    with patch.multiple(timing, **quick):
        yield


class Planner:
    """Plans as a way says."""

    time_limit_seconds = 0.02
    given = None

    def __init__(self, way: Way) -> None:
        self.way = way
        self.stores: list[AtRandom] = []

    def first(self, fixed_bytes: int) -> Callable[[int], float]:
        share = 0.0 if self.way.mode == "nothing" else self.way.share
        return lambda plain_bytes: share * plain_bytes

    def is_kept(self, module: str, name: str) -> bool:
        return False

    def assembled(self, first: FirstStep) -> Program:
        measured = self.way.mode == "measured"
        with scratch_only() if measured else nullcontext():
            return first.program(
                optimizer_state_bytes=0, optimizer_scratch_bytes=0, progress=None, limit=None,
                timing="measure" if measured else "estimate",
            )  # fmt: skip

    def budget_bytes(self, program: Program, plain_peak_bytes: int, *, anew: bool = False) -> int:
        return plain_peak_bytes

    def share_bytes(self, program: Program, plain_peak_bytes: int) -> int:
        return plain_peak_bytes

    def wanted(self, program: Program, budget: int, seconds: float) -> Wanted:
        return WantedOf(program, budget, seconds, planner=self)

    def store(self, nbytes: int) -> tuple[Store, str] | None:
        store = AtRandom(self.way.seed)
        self.stores.append(store)
        return store, "a test"

    def solve(self, program: Program, budget: int, seconds: float | None = None) -> Plan:
        if self.way.mode == "nothing":
            return plan_that_keeps_nothing(program)
        if self.way.mode == "random":
            return random_plan(program, random.Random(self.way.seed))
        if self.way.mode == "moved":
            return moved_plan(program, random.Random(self.way.seed))
        solver = "auto" if self.way.seed % 4 == 0 else "greedy"
        plain_peak, floor, share = simulate(program).peak_bytes, 0, self.way.share
        while True:
            budget = max(1, min(plain_peak, floor + int(share * (plain_peak - floor))))
            try:
                return autoremat.solve(program, budget, solver=solver, time_limit_seconds=0.02)
            except InfeasibleBudget as error:  # once to know the floor; where the time did not suffice, again
                floor, share = error.floor_bytes, share if not floor else share + 0.1


@dataclass(frozen=True)
class WantedOf(Wanted):
    """A plan that is looked for as the way says, in this process."""

    planner: Planner | None = None

    def found(self) -> Plan:
        assert self.planner is not None
        return self.planner.solve(self.program, self.budget_bytes, self.seconds)


def random_plan(program: Program, random: random.Random) -> Plan:
    """Values stay, go, and go again at random."""
    planned = planned_as(program)
    droppable = sorted(tables_of(planned).droppable)
    keep = frozenset(v for v in droppable if random.random() < 0.3)
    again = tuple(frozenset(v for v in droppable if random.random() < 0.5) for _ in range(random.randrange(3)))
    schedule = unfolded(program, Schedule.from_order(planned, unroll(planned, keep, drop_again=again)))
    peak, plain_peak = simulate(program, schedule).peak_bytes, simulate(program).peak_bytes
    return Plan(program, schedule, peak, peak, plain_peak, peak, 0.0, 0.0, "random")


def moved_plan(program: Program, random: random.Random) -> Plan:
    """Values stay, go, or move to a tier and come back at random."""
    linked = replace(program, link=Link(1e9, 1e9))
    base = random_plan(program, random).schedule if random.random() < 0.7 else Schedule.plain(program)
    schedule = with_random_offloads(linked, base, random)
    peak, plain_peak = simulate(linked, schedule).peak_bytes, simulate(program).peak_bytes
    assert verify(linked, schedule) == ()
    return Plan(linked, schedule, peak, peak, plain_peak, peak, 0.0, 0.0, "moved")


@dataclass
class Outcome:
    """What became of a script.

    Attributes:
        wrong: what is not as in plain training, or what autoremat should not have said.
        error: what plain torch raised; "" if nothing.
        reruns: operators run again.
        deviations: steps that left the path.
        unplanned: why the step ran without checkpointing.
        peak: budget and peak where that was measured.
        moved: values that have been in the tier, and come back.
    """

    wrong: list[str] = field(default_factory=list)
    error: str = ""
    reruns: int = 0
    deviations: int = 0
    unplanned: str = ""
    peak: tuple[int, int] | None = None
    moved: int = 0


def examine(script: Script) -> Outcome:
    """Run a script plainly and with autoremat."""
    outcome, sessions, planners = Outcome(), list[Session](), list[Planner]()

    def wrap(model: Model) -> Call:
        if script.way.mode == "online":
            return _online(model, outcome)
        planners.append(Planner(script.way))
        session = Session(model, planners[-1])
        sessions.append(session)
        return lambda *args: session.call(args, {})

    with quiet() as messages, patch.object(beside, "begun", Here):
        plain = dict(train(script, lambda model: model))
        compare(outcome, dict(train(script, wrap)), plain)
        for session in sessions:
            judge(outcome, script, session, [str(w.message) for w in messages])
            if script.way.mode == "measured" and not outcome.wrong and not outcome.error:
                measure(outcome, script, session)
    outcome.moved = sum(store.moved for planner in planners for store in planner.stores)
    return outcome


def _online(model: Model, outcome: Outcome) -> Call:
    def rerun(seconds: float) -> None:
        outcome.reruns += 1

    def call(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return model(*args)
        with off_path(Reports(rerun=rerun)).forward():
            return model(*args)

    return call


NOT_REFUSED = "Inplace update to inference tensor outside InferenceMode"
"""What torch itself does not refuse of composite operators while a dispatch mode is active (docs/limits.md)."""


def compare(outcome: Outcome, got: dict[str, Any], plain: dict[str, Any]) -> None:
    refused, mine = ([seen for name, seen in of.items() if name.endswith("error")] for of in (plain, got))
    if refused and not mine and NOT_REFUSED in refused[0][1]:
        outcome.error = refused[0][0]
        return
    for name in got | plain:
        if name not in got or name not in plain:
            error = (got | plain)[name] if name.endswith("error") else ""
            outcome.wrong.append(f"{name} only in {'autoremat' if name in got else 'plain'} {error}")
        elif name.endswith("error"):
            outcome.error = plain[name][0]
            if got[name][0] != plain[name][0]:
                outcome.wrong.append(f"{name}: {got[name]} instead of {plain[name]}")
        elif not same(got[name], plain[name]):
            outcome.wrong.append(name)


def judge(outcome: Outcome, script: Script, session: Session, messages: list[str]) -> None:
    """What autoremat must not say of a valid script."""
    stats, failed = session.stats(), bool(outcome.error)
    outcome.reruns, outcome.deviations = stats.reruns, stats.deviations
    said = [m for m in messages if "autoremat" in m]
    if stats.unplanned:
        outcome.unplanned = next((m for m in said if "without checkpointing" in m), "?")
    if stats.differing:
        outcome.wrong.append(f"the self-check found a difference: {said}")
    if stats.deviations and not may_vary(script.body) and not goes_row_by_row(script) and not failed:
        outcome.wrong.append(f"a step left the path: {said}")
    failed |= any(step.use == "interrupted" for step in script.steps)
    if stats.unplanned and not failed and NOT_PLANNED not in outcome.unplanned:
        outcome.wrong.append(f"not planned: {said}")


NOT_PLANNED = "a leaf Variable that requires grad is being used in an in-place operation"
"""Why autoremat runs valid programs plainly: inputs from a graph outside are overwritten."""


def may_vary(body: tuple[Instruction, ...]) -> bool:
    """Whether numbers, or what an earlier step has left on the module, decide which operators run, or on how much."""
    branches = any(isinstance(i, If) or (isinstance(i, In) and may_vary(i.body)) for i in body)
    ops = {i.op for i in leaves_of(body)}
    return branches or "nonzero" in ops or ops >= {"kept", "kept_before"}


def goes_row_by_row(script: Script) -> bool:
    """Whether steps of different rows run different numbers of operators."""
    return "list" in {i.op for i in leaves_of(script.body)} and len({step.rows for step in script.steps}) > 1


def measure(outcome: Outcome, script: Script, session: Session) -> None:
    """The peak of one more step by the allocator's account; what it runs must be the whole step."""
    model, xs, plan = session.fn, inputs_of(script.steps[0], 0), session.stats().plan
    assert isinstance(model, Model)
    assert plan is not None
    model.zero_grad()
    model.train(script.steps[0].training)
    before = resident(model, *xs)
    peak = account(lambda: session.call(xs, {}).backward(), before).peak_bytes
    outcome.peak = plan.budget_bytes, peak
    allowed = max(plan.budget_bytes + SCALARS_BYTES, before + torch.get_rng_state().nbytes)  # copied at the beginning
    if session.stats().deviations == 0 and peak > allowed:
        outcome.wrong.append(f"a peak of {peak} bytes under a budget of {plan.budget_bytes}")


@contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
