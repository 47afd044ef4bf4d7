"""Scans: every choice gives the gradients of JAX; the choices are those that brute force finds."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402 - jax is optional
from jax import lax  # noqa: E402

import autoremat.jax as aj  # noqa: E402
from autoremat.engines.jax import scans, variants  # noqa: E402
from autoremat.engines.jax.engine import ENGINE, Step  # noqa: E402
from autoremat.engines.jax.scans import Choice  # noqa: E402
from autoremat.engines.jax.steps import record_step  # noqa: E402
from autoremat.program import Plan, simulate, verify  # noqa: E402
from autoremat.program.units import format_bytes  # noqa: E402
from tests.engines.jax.models import (  # noqa: E402
    MIB,
    OPTIONS,
    QUIET,
    checkpoint,
    error,
    gpt_parameters,
    recurrence,
    recurrence_parameters,
    scanned_gpt,
    stacked,
    tokens,
)

pytestmark = pytest.mark.filterwarnings(QUIET)
WIDTH = 8


def everything(
    length: int, *, reverse: bool = False, nested: bool = False, unroll: int | bool = 1
) -> tuple[Callable[..., Any], Any, Any]:
    """A scan with carries of all kinds, random keys, results, and another scan inside."""
    keys = jax.random.split(jax.random.key(0), length)
    w = jax.random.normal(jax.random.key(1), (WIDTH, WIDTH)) * 0.3
    xs = jax.random.normal(jax.random.key(2), (length, 4, WIDTH))

    def body(w: Any, carry: Any, x: Any) -> Any:
        h, count, untouched, total = carry
        x, key = x
        z = 0.5 * h + jnp.tanh(h @ w + x) + 0.01 * count * jnp.sin(untouched)
        z = z * jax.random.bernoulli(key, 0.8, z.shape)
        if nested:
            z, _ = lax.scan(lambda c, t: (jnp.sin(c @ w) + t * c, None), z, jnp.arange(3.0) * 0.1)
        return (z, count + 1, untouched * 0.99, total + z.sum()), z.mean(0)

    def fn(w: Any, xs: Any) -> Any:
        first = jnp.zeros((4, WIDTH)), 0, jnp.ones((4, WIDTH)), 0.0
        (h, _, _, total), ys = lax.scan(lambda c, x: body(w, c, x), first, (xs, keys), reverse=reverse, unroll=unroll)
        return (h**2).mean() + 0.1 * total + (ys * jnp.arange(length)[:, None]).sum()

    return fn, w, xs


CASES = [
    (7, (), {}), (7, (3,), {}), (12, (4,), {}), (12, (6, 2), {}), (13, (6, 3), {"reverse": True}),
    (7, (2,), {"reverse": True}), (5, (2,), {"nested": True}),
    (7, (), {"unroll": 3}), (7, (2,), {"unroll": True, "reverse": True}),
]  # fmt: skip


@pytest.mark.one_in(3)
@pytest.mark.parametrize("keeps", ["little", "much"])
@pytest.mark.parametrize(("length", "segments", "options"), CASES, ids=str)
def test_every_choice_gives_the_same_gradients(
    length: int, segments: tuple[int, ...], options: dict[str, bool], keeps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forced(choices: list[Choice], price: float) -> Choice:
        return Choice(segments, choices[0 if keeps == "little" else -1].body, 0, 0.0)

    with jax.enable_x64(True):
        fn, w, xs = everything(length, **options)
        expected = jax.jit(jax.grad(fn, argnums=(0, 1)))(w, xs)
        monkeypatch.setattr(variants, "chosen", forced)
        found = jax.jit(jax.grad(checkpoint(fn, budget=1.0), argnums=(0, 1)))(w, xs)
        assert error(found, expected) <= 1e-12


def test_a_carry_that_nothing_depends_on_has_no_gradient() -> None:
    fn, w, xs = everything(3)
    step = record_step(fn, (w, xs), {})
    step.prices()
    ((_, wanted, _),) = step._choices
    assert list(wanted) == [True, True, False, False, True, False, False]


def all_choices(length: int, carry: int, stack: int, transient: int, element: int) -> Iterator[tuple[int, int]]:
    """Bytes and levels of all ladders of at most two levels: the largest of all moments, iteration by iteration."""
    lengths = range(2, length // 2 + 1)
    for segments in ((), *((a,) for a in lengths), *((a, b) for a in lengths for b in range(2, a // 2 + 1))):
        sizes, size = [length, *segments], 0
        for whole, part in itertools.pairwise(sizes):
            begins = range(0, whole, part)
            size += len(begins) * carry + part * element + (whole * element if whole % part else 0)
        yield size + sum(stack for _ in range(sizes[-1])) + transient, len(segments)


@pytest.mark.parametrize("element", [0, 2])
@pytest.mark.parametrize("length", range(4, 25))
def test_ladders_are_the_best_of_all(length: int, element: int) -> None:
    """Bytes at the same number of levels, against brute force."""
    kept = scans.Kept(None, 3, 5, 0.0)  # type: ignore[arg-type]
    for levels in (0, 1, 2):
        best = min((b for b, n in all_choices(length, 1, 3, 5, element) if n == levels), default=None)
        tried = [s for s in scans.ladders(length) if len(s) == levels]
        assert best == min((scans._bytes_of(length, s, kept, 1, element) for s in tried), default=None)


@pytest.mark.parametrize(("carry", "stack", "element"), [(1, 3, 0), (10, 3, 10), (1, 1, 100), (100, 10, 1)])
@pytest.mark.parametrize("length", [31, 97, 1000])
def test_ladders_of_long_scans_are_nearly_as_good(length: int, carry: int, stack: int, element: int) -> None:
    """Whatever takes the most: states, what iterations keep, or what they read."""
    kept = scans.Kept(None, stack, 5, 0.0)  # type: ignore[arg-type]
    known = list(all_choices(length, carry, stack, 5, element))
    for levels in (1, 2):
        best = min(b for b, n in known if n == levels)
        tried = [s for s in scans.ladders(length) if len(s) == levels]
        assert best <= min(scans._bytes_of(length, s, kept, carry, element) for s in tried) <= 1.1 * best


def test_prices_lead_from_all_to_nothing() -> None:
    fn, w, xs = everything(12)
    step = record_step(fn, (w, xs), {})
    prices = step.prices()
    assert prices[0] == 0
    assert prices == sorted(prices)
    ((_, choices),) = step._choices.values()
    picked = [scans.chosen(choices, price) for price in prices]
    assert [c.nbytes for c in picked] == sorted((c.nbytes for c in picked), reverse=True)
    assert [c.extra_seconds for c in picked] == sorted(c.extra_seconds for c in picked)


def test_what_communicates_is_not_in_segments() -> None:
    """A collective runs once, whatever is kept."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()

    def fn(w: Any, xs: Any) -> Any:
        return lax.scan(lambda c, x: (jnp.sin(lax.pmean(c, "d") @ w + x), None), xs[0], xs)[0].sum()

    def traced(f: Callable[..., Any]) -> str:
        one = jax.shard_map(jax.grad(f), mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
        return str(jax.make_jaxpr(one)(jnp.eye(4), jnp.ones((16, 2, 4))))

    tight = traced(checkpoint(fn, budget=0.99))
    assert tight.count("psum") == traced(fn).count("psum")


def test_a_scan_of_one_iteration_and_of_none() -> None:
    def fn(x: Any) -> Any:
        return lax.scan(lambda c, t: (jnp.sin(c) * t, c), x, jnp.ones(1))[0] + lax.scan(
            lambda c, t: (jnp.sin(c) * t, c), x, jnp.ones(0)
        )[0]  # fmt: skip

    assert jax.grad(checkpoint(fn, budget=1.0))(0.5) == jax.grad(fn)(0.5)


# ---- unrolled --------------------------------------------------------------------------------------------------------


def unrolled(jaxpr: Any) -> Iterator[int]:
    """How many iterations each loop writes out in a row, loops inside included."""
    for eqn in jaxpr.eqns:
        if "unroll" in eqn.params:
            yield eqn.params["unroll"]
        for one in eqn.params.values():
            if hasattr(one, "eqns") or hasattr(one, "jaxpr"):
                yield from unrolled(getattr(one, "jaxpr", one))


def test_where_nothing_runs_again_loops_are_unrolled_as_the_user_says() -> None:
    args = recurrence_parameters(4), jnp.ones((30, 2, 4))
    fn = functools.partial(recurrence, unroll=5)
    forward, backward = unrolled(jax.make_jaxpr(jax.grad(checkpoint(fn, budget=1.0)))(*args).jaxpr)
    assert forward == backward == 5


@pytest.mark.slow
def test_within_a_budget_what_is_unrolled_takes_no_more() -> None:
    """Iterations side by side hold what the plan counts once: where something runs again there are none."""
    args = recurrence_parameters(32), jax.random.normal(jax.random.key(1), (256, 32, 32))
    fn = functools.partial(recurrence, unroll=7)
    expected, plain = temporaries(fn, args, None)
    tight = within(fn, args, 0.28)
    found, mib = temporaries(tight, args, None)
    assert plain > 3
    assert mib <= 0.27
    assert set(unrolled(jax.make_jaxpr(jax.grad(tight))(*args).jaxpr)) == {1}
    assert error(found, expected) <= 2e-6


# ---- figures ---------------------------------------------------------------------------------------------------------


def temporaries(fn: Callable[..., Any], args: Any, options: dict[str, str] | None) -> tuple[Any, float]:
    compiled = jax.jit(jax.grad(fn)).lower(*args).compile(compiler_options=options)
    return compiled(*args), aj.memory(compiled).temporaries_bytes / MIB


def within(fn: Callable[..., Any], args: Any, mib: float) -> Callable[..., Any]:
    """The function with so much beside what is fixed."""
    fixed = aj.plan(fn, *args, budget=1.0).program.fixed_bytes
    return aj.checkpoint(fn, budget=fixed + int(mib * MIB))


@pytest.mark.slow
@pytest.mark.guard
def test_a_long_recurrence_takes_a_twentieth_by_the_default_options() -> None:
    args = recurrence_parameters(64), jax.random.normal(jax.random.key(1), (1024, 32, 64))
    expected, plain = temporaries(recurrence, args, None)
    found, mib = temporaries(within(recurrence, args, 1.2), args, None)
    assert plain > 24
    assert mib <= 1.2
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "limit"), [(120, 110), (80, 77), (40, 32)])
def test_a_gpt_of_twelve_scanned_layers(budget: int, limit: int) -> None:
    args = stacked(gpt_parameters(12, 128, 512, 128)), tokens(8, 128, 512)
    expected, plain = temporaries(scanned_gpt, args, OPTIONS)
    found, mib = temporaries(within(scanned_gpt, args, budget), args, OPTIONS)
    assert plain > 280
    assert mib <= limit
    assert error(found, expected) <= 2e-6


@pytest.mark.slow
@pytest.mark.guard
@pytest.mark.parametrize("segments", [(), (2,), (4,), (6, 2)])
def test_segments_take_what_is_foretold(segments: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of stacked parameters and of their gradients are arrays of their own."""
    args = stacked(gpt_parameters(12, 64, 128, 64)), tokens(4, 64, 128)
    monkeypatch.setattr(variants, "chosen", lambda choices, price: Choice(segments, choices[0].body, 0, 1.0))
    program = record_step(scanned_gpt, args, {}).plain.program
    ahead = next(v.nbytes for v in program.values if v.id == "ahead")
    _, mib = temporaries(checkpoint(scanned_gpt, budget=1.0), args, OPTIONS)
    assert simulate(program).peak_bytes - program.fixed_bytes + ahead == pytest.approx(mib * MIB, rel=0.05)


def test_the_floor_does_not_depend_on_the_budget_asked() -> None:
    """What a scan stacks is another program for each budget; the floor is that of the step."""
    fn, w, xs = everything(12)
    ask = functools.partial(aj.plan, fn, w, xs, time_limit_seconds=0.2)
    plans = [ask(budget=share) for share in (1.0, 0.9, 0.8)]
    (floor,) = {plan.floor_bytes for plan in plans}
    assert plans[0].peak_bytes > floor
    assert ask(budget=floor).peak_bytes <= floor
    with pytest.raises(aj.InfeasibleBudget) as found:
        ask(budget=floor - 1)
    assert found.value.floor_bytes == floor


def test_a_frontier_has_what_scans_stack_for_less() -> None:
    args = recurrence_parameters(16), jnp.ones((64, 8, 16))
    front = aj.frontier(recurrence, *args, points=4, time_limit_seconds=2)
    plans = [p for p in front.points if p.peak_bytes < p.plain_peak_bytes]
    assert front.floor_bytes < 0.8 * front.plain_peak_bytes
    assert [p.overhead for p in front.points] == sorted((p.overhead for p in front.points), reverse=True)
    assert plans
    assert all(verify(p.program, p) == () for p in plans)
    assert front.plan_at(front.floor_bytes).peak_bytes <= front.floor_bytes
    assert f"floor {format_bytes(front.floor_bytes)}" in str(front)
    with pytest.raises(aj.InfeasibleBudget):
        front.plan_at(front.floor_bytes - 1000)


def test_a_plan_for_a_scan_is_judged_beside_plain_training() -> None:
    """What segments run again is a part of the program; the plan counts it, and a plan that does not is found out."""
    args = recurrence_parameters(8), jnp.ones((64, 4, 8))
    plan = Plan.from_json(aj.plan(recurrence, *args, budget="60%", time_limit_seconds=0.2).to_json())
    assert plan.overhead > 0
    assert verify(plan.program, plan) == ()
    for lie in ({"overhead": 0.0}, {"plain_seconds": 0.0}, {"plain_peak_bytes": plan.peak_bytes - 1}):
        assert {v.rule for v in verify(plan.program, replace(plan, **lie))} == {"plan's figures"}


def test_the_engine_carries_out_a_plan_for_a_scan() -> None:
    """Of the step as it was recorded at the plan's price."""
    args = recurrence_parameters(8), jax.random.normal(jax.random.key(1), (64, 4, 8))
    plan = aj.plan(recurrence, *args, budget="60%", time_limit_seconds=0.2)
    assert plan.program.ops != record_step(recurrence, args, {}).plain.program.ops
    value, gradients = jax.jit(ENGINE.carry_out(Step(recurrence, args), plan))(*args)
    expected = jax.jit(jax.value_and_grad(recurrence))(*args)
    assert error((value, gradients), expected) <= 2e-6
    other = recurrence_parameters(8), jnp.ones((32, 4, 8))
    with pytest.raises(ValueError, match="with other operations or sizes"):
        ENGINE.carry_out(Step(recurrence, other), plan)(*other)


def test_the_same_step_is_traced_to_the_same_code() -> None:
    fn, w, xs = everything(6)
    texts = {jax.jit(jax.grad(aj.checkpoint(fn, budget=0.9))).lower(w, xs).as_text() for _ in range(2)}
    assert len(texts) == 1


def test_choices_are_no_worse_than_any_of_the_same_kind() -> None:
    fn, w, xs = everything(12)
    step = record_step(fn, (w, xs), {})
    step.prices()
    ((_, choices),) = step._choices.values()
    for smaller, larger in itertools.pairwise(choices):
        assert smaller.nbytes < larger.nbytes
        assert smaller.extra_seconds > larger.extra_seconds
