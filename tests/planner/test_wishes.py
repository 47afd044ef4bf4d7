"""``keep=`` and ``recompute=``: what they match, what they forbid, and that a plan under them is one of the program."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import autoremat
from autoremat.demo.models import GPT, GPTConfig
from autoremat.planner import SOLVERS, Wishes, solve
from autoremat.planner.search.tables import tables_of
from autoremat.planner.wishes import kept_anyway
from autoremat.program import InfeasibleBudget, Once, Plan, Program, simulate, verify
from tests.engines.torch.compare import same
from tests.fixed import examples
from tests.planner.brute_force import optimum
from tests.planner.chains import Builder, chain, gpt
from tests.planner.random_programs import literature_steps, recorded_steps, steps

HUGE = 1 << 40


def wishes(program: Program) -> st.SearchStrategy[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Names of forward ops, parted into keep, recompute and neither."""
    names = [op.name for op in program.ops if op.name.startswith("f") and not op.once]
    parts = st.lists(st.sampled_from("kr--"), min_size=len(names), max_size=len(names))
    return parts.map(
        lambda p: tuple(tuple(n for n, x in zip(names, p, strict=True) if x == kind) for kind in "kr")  # type: ignore[misc,return-value]
    )


@pytest.mark.slow
@examples(30)
@given(data=st.data(), program=steps(), share=st.floats(0, 1))
def test_plans_obey_and_can_be_carried_out(data: st.DataObject, program: Program, share: float):
    keep, again = data.draw(wishes(program))
    plain = simulate(program).peak_bytes
    floor = solve(program, HUGE, wishes=Wishes(keep, again)).floor_bytes
    budget = max(1, floor + int(share * max(0, plain - floor)))
    plan = solve(program, budget, wishes=Wishes(keep, again))
    assert plan.program is program
    assert verify(program, plan) == ()
    assert plan.peak_bytes <= budget
    assert plan.lower_bound <= plan.overhead + 1e-12
    assert not {program.ops[i].name for i, n in plan.schedule.runs_of.items() if n > 1} & set(keep)
    passing = tables_of(Wishes(keep, again).applied_to(program)).passing
    assert not kept_anyway(plan.schedule, passing, tables_of(program).until)


@pytest.mark.slow
@pytest.mark.guard
@examples(20)
@given(data=st.data(), program=st.one_of(recorded_steps(2, 4), literature_steps(2, 4)), share=st.floats(0, 1))
def test_no_schedule_without_what_must_be_kept_is_below_the_bound(data: st.DataObject, program: Program, share: float):
    keep, _ = data.draw(wishes(program))
    limited = Wishes(keep).applied_to(program)
    plain = simulate(program).peak_bytes
    floor = solve(limited, plain).floor_bytes
    plan = solve(program, max(1, floor + int(share * (plain - floor))), wishes=Wishes(keep=keep))
    best = optimum(limited, plan.budget_bytes)
    assert best is not None
    assert plan.lower_bound * program.seconds <= best + 1e-9 <= plan.overhead * program.seconds + 2e-9


def test_a_program_with_wishes_is_a_program_like_any_other():
    program = replace(gpt(2), recorded="fake", timing="measured", measured_share=0.5)
    wished = Wishes(keep="head", recompute="gelu").applied_to(program)
    assert type(wished) is Program
    assert {program.ops[program.producer[v]].name for v in wished.passing} == {"gelu"}
    assert Program.from_json(wished.to_json()) == wished
    assert replace(wished, values=program.values, ops=program.ops) == program
    assert Wishes().applied_to(program) is program


def attempt(program: Program, solver: str) -> Plan | str:
    """The plan that computes the MLPs again, or why there is none."""
    try:
        return solve(program, HUGE, solver=solver, wishes=Wishes(recompute="blocks.*.mlp"))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_obeys_or_says_that_it_cannot(solver: str):
    program = gpt(2, vocabulary=256)
    plan = attempt(program, solver)
    if isinstance(plan, str):
        assert "recompute= forbids" in plan
        assert solver not in ("auto", "greedy")
        return
    ran = {program.ops[i].name for i, n in plan.schedule.runs_of.items() if n > 1}
    assert {"fc1", "gelu"} <= ran
    assert solver not in ("auto", "greedy") or plan.overhead == pytest.approx(plan.lower_bound)


def test_a_block_that_runs_again_as_a_whole_leaves_out_what_only_a_passing_value_feeds():
    b = Builder()
    x = b.fixed("x", 4)
    e = b.forward("embed", (x,), 8, 1.0)
    r = b.forward("left", (e,), 8, 1.0, module="blocks.0")
    s = b.forward("right", (x,), 8, 1.0, module="blocks.0")
    b.forward("join", (r, s), 8, 1.0, saves=(s,), module="blocks.0")
    program = b.backward("two branches")
    plan = solve(program, HUGE, solver="every-block", wishes=Wishes(recompute="embed"))
    assert [(program.ops[i].name, n) for i, n in simulate(program, plan).repeats] == [("right", 1)]


def test_recompute_holds_at_any_budget_and_costs_just_that():
    program = chain(8)
    plan = solve(program, HUGE, wishes=Wishes(recompute="f3"))
    assert [(program.ops[i].name, n) for i, n in simulate(program, plan).repeats] == [("f3", 1)]
    assert plan.overhead == pytest.approx(plan.lower_bound) == pytest.approx(1 / program.seconds)
    assert solve(program, HUGE).overhead == 0


@pytest.mark.slow
def test_keep_moves_the_recomputation_elsewhere_and_raises_the_floor():
    program = gpt(4, vocabulary=256)
    plan = solve(program, 0.8, wishes=Wishes(keep="gelu"))
    free = solve(program, 0.8)
    assert "gelu" in {program.ops[i].name for i, _ in simulate(program, free).repeats}
    assert "gelu" not in {program.ops[i].name for i, _ in simulate(program, plan).repeats}
    assert plan.overhead >= free.overhead
    assert plan.floor_bytes > free.floor_bytes


def test_an_infeasible_budget_names_the_constraints():
    program = gpt(4, vocabulary=256)
    floor = solve(program, 1.0).floor_bytes
    with pytest.raises(InfeasibleBudget, match=r"under the constraints keep=\['blocks'\]") as caught:
        solve(program, floor, wishes=Wishes(keep="blocks"))
    assert caught.value.floor_bytes > floor
    assert solve(program, caught.value.floor_bytes, wishes=Wishes(keep="blocks")).peak_bytes <= caught.value.floor_bytes


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("blocks.0", {"blocks.0.ln1", "blocks.0.attn", "blocks.0", "blocks.0.ln2", "blocks.0.mlp"}),
        ("blocks.*.mlp", {"blocks.0.mlp", "blocks.1.mlp"}),
        ("head", {"head"}),
        ("gel?", {"blocks.0.mlp", "blocks.1.mlp"}),
    ],
)
def test_patterns_are_held_against_modules_and_operators(pattern: str, names: set[str]):
    program = gpt(2)
    passing = Wishes(recompute=pattern).applied_to(program).passing
    assert {program.ops[program.producer[v]].module for v in passing} == names


def test_a_pattern_that_matches_nothing_names_what_is_near():
    with pytest.raises(ValueError, match=r"keep='blocks.0.mpl' matches no module.*blocks\.0\.mlp"):
        solve(gpt(2), 0.5, wishes=Wishes(keep="blocks.0.mpl"))


def test_the_backward_is_never_matched():
    with pytest.raises(ValueError, match="matches no module and no operator of the forward"):
        solve(gpt(2), 0.5, wishes=Wishes(recompute="unpack"))


def test_a_pattern_for_what_cannot_run_again_says_why():
    b = Builder()
    b.forward("dropout", (b.fixed("x", 4),), 4, 1.0, saves_output=True, once=Once.FOREIGN)
    with pytest.raises(ValueError, match=r"only ops that must not run again, such as dropout \(custom operator"):
        solve(b.backward("one"), 1.0, wishes=Wishes(recompute="drop*"))


def test_both_at_once_is_refused():
    with pytest.raises(ValueError, match="keep and recompute both match 2 op"):
        solve(gpt(2), 0.5, wishes=Wishes(keep="gelu", recompute="gelu"))


def step_of(model: torch.nn.Module):
    def loss_fn(x, y):
        return torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())

    return loss_fn


@pytest.mark.one_in(3, guard=True)
@pytest.mark.parametrize(
    ("options", "again", "never"),
    [
        ({"recompute": "blocks.0.*", "budget": 1.0}, {"blocks.0"}, {"blocks.1", "blocks.2"}),
        ({"keep": ("blocks.0", "aten.gelu"), "budget": 0.8}, {"blocks.1"}, {"blocks.0"}),
        ({"keep": "blocks.1", "recompute": ("blocks.2",), "budget": 0.8}, {"blocks.2"}, {"blocks.1"}),
    ],
    ids=["recompute", "keep", "both"],
)
def test_a_real_model_under_constraints_trains_bit_for_bit(options, again: set[str], never: set[str]):
    torch.manual_seed(0)
    model = GPT(GPTConfig(blocks=3, width=32, context=32, dropout=0.1))
    x, y = (torch.randint(0, 256, (4, 32)) for _ in range(2))

    def gradients(fn) -> list[torch.Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        fn(x, y).backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients(step_of(model))
    checkpointed = autoremat.checkpoint(step_of(model), **options)
    assert all(same(a, b) for a, b in zip(gradients(checkpointed), plain, strict=True))
    stats = autoremat.stats(checkpointed)
    assert stats.reruns > 0
    plan = stats.plan
    ran = {plan.program.ops[i].module for i, n in plan.schedule.runs_of.items() if n > 1}
    blocks = {".".join(module.split(".")[:2]) for module in ran}
    assert again <= blocks
    assert not never & blocks
