"""What users of JAX meet: refusals with a way out, the trap on CPU, plans with their names, nothing of torch."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402 - jax is optional
from jax import lax  # noqa: E402

import autoremat.jax as aj  # noqa: E402
from autoremat.engines.jax import compiler, core  # noqa: E402
from autoremat.engines.jax.compiler import BarriersRemoved, compiler_options, keeps_barriers  # noqa: E402
from autoremat.engines.jax.lowering import Lowered  # noqa: E402
from autoremat.engines.jax.steps import record_step  # noqa: E402
from autoremat.program import Once, simulate, verify  # noqa: E402
from tests.engines.jax.models import (  # noqa: E402
    BRIEF,
    OPTIONS,
    QUIET,
    batch,
    checkpoint,
    gpt,
    gpt_parameters,
    layers,
    tightest,
    tokens,
    weights,
)

pytestmark = pytest.mark.filterwarnings(QUIET)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.guard
def test_forward_mode_is_refused_by_name() -> None:
    ws, x = weights(2, "float32"), batch("float32")
    with pytest.raises(TypeError, match=r"layers is checkpointed, and JAX differentiates it in forward mode"):
        jax.jvp(aj.checkpoint(layers, budget=1.0), (ws, x), (ws, x))


@pytest.mark.parametrize("effect", [lambda x: jax.debug.print("{}", x.sum()), lambda x: _ordered(x)])
def test_effects_are_refused_by_name(effect: Callable[[Any], None]) -> None:
    def fn(x: Any) -> Any:
        effect(x)
        return jnp.sin(x).sum()

    with pytest.raises(ValueError, match=r"fn has an effect .*auxiliary output"):
        jax.grad(aj.checkpoint(fn, budget=1.0))(jnp.ones(3))


def test_an_effect_without_a_name_is_called_by_its_type() -> None:
    def fn(x: Any) -> Any:
        known = jax.new_ref(x)
        known[...] = jnp.sin(known[...])
        return known[...].sum()

    with pytest.raises(ValueError, match=r"fn has an effect \([A-Za-z]+\)"):
        jax.grad(aj.checkpoint(fn, budget=1.0))(jnp.ones(3))


def _ordered(x: Any) -> None:
    from jax.experimental import io_callback

    io_callback(lambda x: None, None, x, ordered=True)


def test_while_in_reverse_is_refused_as_jax_does() -> None:
    def fn(x: Any) -> Any:
        return lax.while_loop(lambda c: c.sum() < 3, lambda c: c * 2, x).sum()

    messages = []
    for f in (fn, aj.checkpoint(fn, budget=1.0)):
        with pytest.raises(ValueError, match="Reverse-mode differentiation does not work") as found:
            jax.grad(f)(jnp.ones(3))
        messages.append(str(found.value))
    assert messages[0] == messages[1]


def test_an_argument_that_is_changed_in_place_is_refused() -> None:
    def fn(state: dict[str, Any], x: Any) -> Any:
        state["mean"] = x.mean()
        return jnp.sin(x).sum()

    with pytest.raises(TypeError, match=r"changes its argument in place .*Return the new state instead"):
        jax.grad(aj.checkpoint(fn, budget=1.0), argnums=1)({"mean": jnp.zeros(())}, jnp.ones(3))


def test_budgets_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="cannot read"):
        aj.checkpoint(layers, budget="much")
    with pytest.raises(ValueError, match="ahead of time"):
        aj.checkpoint(layers, budget="auto")
    with pytest.raises(ValueError, match=r"only autoremat\.jax\.fit can find"):
        jax.grad(aj.checkpoint(layers))(weights(1, "float32"), batch("float32"))
    with pytest.raises(aj.InfeasibleBudget, match="the floor"):
        jax.grad(aj.checkpoint(layers, budget=10))(weights(1, "float32"), batch("float32"))


def test_what_cannot_be_checkpointed() -> None:
    with pytest.raises(TypeError, match="takes a function, got int"):
        aj.checkpoint(3, budget=1.0)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="layers is checkpointed by autoremat already"):
        aj.checkpoint(aj.checkpoint(layers, budget=1.0), budget=1.0)
    with pytest.raises(ValueError, match="nothing to differentiate"):
        aj.plan(lambda i: i.sum(), jnp.arange(3), budget=1.0)
    with pytest.raises(TypeError, match="argnums names position 2"):
        aj.plan(layers, weights(1, "float32"), batch("float32"), argnums=2, budget=1.0)


def test_collectives_run_once() -> None:
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()

    def fn(ws: Any, x: Any) -> Any:
        for w in ws:
            x = x + jnp.sin(lax.pmean(x, "d") @ w)
        return lax.pmean((x**2).mean(), "d")

    for check_vma in (True, False):
        recorded = []

        def traced(ws: Any, x: Any, recorded: list[Any] = recorded) -> Any:
            recorded.append(record_step(fn, (ws, x), {}).plain)
            return jax.grad(fn)(ws, x)

        one = jax.shard_map(traced, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=check_vma)
        jax.make_jaxpr(one)(weights(2, "float32"), batch("float32"))
        once = {op.name for op in recorded[0].program.ops if op.once is Once.COMMUNICATES}
        assert len(once) == 1
        assert not any("pvary" in name for name in once)


# ---- barriers --------------------------------------------------------------------------------------------------------


def test_the_trap_on_cpu_is_found_and_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA for CPU removes barriers by default; the option that keeps them is in the warning."""
    assert not keeps_barriers()
    assert compiler_options() == OPTIONS
    assert keeps_barriers(OPTIONS)
    monkeypatch.setattr(compiler, "_WARNED", set())
    ws, x = weights(3, "float32"), batch("float32")
    step = jax.grad(tightest(layers, ws, x))
    with pytest.warns(BarriersRemoved, match=re.escape("'xla_disable_hlo_passes': 'cse_barrier_expander'")):
        step(ws, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(step).lower(ws, x)


def test_no_warning_where_nothing_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_WARNED", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(jax.grad(lambda x: aj.checkpoint(jnp.dot, budget=1.0)(x, x))).lower(jnp.ones(3))


def test_options_are_added_to_the_users_own() -> None:
    mine = {"xla_disable_hlo_passes": "algsimp"}
    assert compiler_options(mine) == {"xla_disable_hlo_passes": "algsimp,cse_barrier_expander"}
    assert keeps_barriers(compiler_options(mine))
    assert not keeps_barriers({"there_is_no_such_option": True})


def test_as_many_fences_as_stretches_of_further_runs() -> None:
    ws, x = weights(4, "float32"), batch("float32")
    floor = aj.plan(layers, ws, x, budget=1.0, time_limit_seconds=BRIEF).floor_bytes
    plan = aj.plan(layers, ws, x, budget=floor, time_limit_seconds=BRIEF)
    lowered = Lowered(record_step(layers, (ws, x), {}).plain, plan.schedule)
    text = jax.jit(jax.grad(checkpoint(layers, budget=floor))).lower(ws, x).as_text()
    assert text.count("stablehlo.optimization_barrier") == lowered.n_fences > 0


def barriers(jaxpr: Any) -> Iterator[Any]:
    """All barriers of a jaxpr, those inside of calls included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive is lax.optimization_barrier_p:
            yield eqn
        for one in eqn.params.values():
            if hasattr(one, "eqns") or hasattr(one, "jaxpr"):
                yield from barriers(getattr(one, "jaxpr", one))


def test_a_fence_has_a_barrier_for_each_way_in_which_arrays_vary_over_a_mesh() -> None:
    """A common one would make parameters, which are the same on all devices, differ as the batch does."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    batched, same = jax.sharding.PartitionSpec("d"), jax.sharding.PartitionSpec()
    ws, x = weights(4, "float32"), batch("float32")
    fences = []

    def shard(ws: Any, x: Any) -> Any:
        floor = aj.plan(layers, ws, x, budget=1.0, time_limit_seconds=BRIEF).floor_bytes
        plan = aj.plan(layers, ws, x, budget=floor, time_limit_seconds=BRIEF)
        fences.append(Lowered(record_step(layers, (ws, x), {}).plain, plan.schedule).n_fences)
        return jax.grad(checkpoint(layers, budget=floor))(ws, x)

    one = jax.shard_map(shard, mesh=mesh, in_specs=(same, batched), out_specs=same)
    found = list(barriers(jax.make_jaxpr(one)(ws, x).jaxpr))
    kinds = [{core.varying(v.aval) for v in eqn.invars} for eqn in found]
    assert all(len(kind) == 1 for kind in kinds)
    assert set().union(*kinds) == {frozenset(), frozenset({"d"})}
    assert kinds.count({frozenset({"d"})}) == fences[0]
    assert fences[0] < len(found) <= 2 * fences[0]


# ---- plans -----------------------------------------------------------------------------------------------------------


def small_gpt() -> tuple[dict[str, Any], dict[str, Any]]:
    return gpt_parameters(2, 32, 64, 16), tokens(2, 16, 64)


@pytest.mark.slow
@pytest.mark.guard
def test_a_plan_needs_shapes_alone_and_has_the_users_names() -> None:
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), small_gpt())
    plan = aj.plan(gpt, *shapes, budget=0.8, time_limit_seconds=BRIEF)
    program = plan.program
    assert program == record_step(gpt, small_gpt(), {}).plain.program
    assert verify(program, plan) == ()
    assert simulate(program, plan).peak_bytes == plan.peak_bytes <= plan.budget_bytes
    labels = {v.label for v in program.values}
    assert "p['layers'][0]['qkv'] float32[32, 96]" in labels
    assert "gradient of p['emb'] float32[64, 32]" in labels
    assert "batch['x'] int32[2, 16]" in labels
    assert {"layers.0", "layers.1", ""} == {".".join(op.module.split(".")[:2]) for op in program.ops}
    assert all("models.py:" in op.source for op in program.ops if op.source and "layers" in op.module)
    assert "estimate: the engine orders runs" in str(plan)


def test_explanations_and_frontiers_read_as_they_do_for_torch() -> None:
    args = small_gpt()
    why = aj.explain(gpt, *args)
    assert sum(why.categories.values()) == why.peak_bytes
    assert "layers" in str(why)
    plan = aj.plan(gpt, *args, budget=0.7, time_limit_seconds=BRIEF)
    assert aj.explain(plan).peak_bytes == plan.peak_bytes
    assert aj.explain(gpt, *args, budget=0.7, time_limit_seconds=BRIEF).peak_bytes == plan.peak_bytes
    front = aj.frontier(plan.program, points=3, time_limit_seconds=BRIEF)
    assert front.points[-1].overhead == 0
    assert "floor" in str(front)


def test_wishes_are_obeyed() -> None:
    args = small_gpt()
    plan = aj.plan(gpt, *args, budget=0.9, keep="layers.1*", time_limit_seconds=BRIEF)
    again = {i for i, n in plan.schedule.runs_of.items() if n > 1}
    assert again
    assert not any(plan.program.ops[i].module.startswith("layers.1") for i in again)
    with pytest.raises(ValueError, match="matches no module"):
        aj.plan(gpt, *args, budget=0.7, keep="blocks.*")


# ---- without torch ---------------------------------------------------------------------------------------------------


def test_torch_is_never_imported() -> None:
    code = """
import sys
sys.modules["torch"] = None
import jax, jax.numpy as jnp, autoremat.jax
def fn(x): return jnp.sin(jnp.sin(x)).sum()
print(autoremat.jax.plan(fn, jnp.ones(64), budget=1.0), autoremat.jax.explain(fn, jnp.ones(64)))
jax.grad(autoremat.jax.checkpoint(fn, budget=1.0))(jnp.ones(64))
assert sys.modules["torch"] is None
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def processor_seconds(imported: str) -> float:
    """What a new process takes for imports, of three the quickest."""
    code = f"import time; began = time.process_time(); import {imported}; print(time.process_time() - began)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    return min(float(run.stdout) for run in runs)


@pytest.mark.slow
def test_its_import_adds_little_to_that_of_jax() -> None:
    assert processor_seconds("jax, autoremat.jax") - processor_seconds("jax") < 1.5


def test_jax_is_not_imported_by_the_package() -> None:
    code = "import sys; import autoremat; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_jax_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['jax'] = None; import autoremat.jax"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'autoremat[jax]'" in done.stderr
