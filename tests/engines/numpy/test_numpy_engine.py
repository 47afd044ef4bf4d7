"""Plans of every solver, carried out by the reference engine: the peak to the byte, the values to the bit, no torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import autoremat
from autoremat.engines.numpy import Call, carry_out, record
from autoremat.engines.numpy.engine import Array
from autoremat.planner import SOLVERS, solve
from autoremat.program import InfeasibleBudget, Plan, Program, simulate, verify
from tests.engines.numpy.meter import Meter
from tests.engines.numpy.steps_of_programs import calls_of, every_result, inputs_of, scaled
from tests.fixed import examples
from tests.planner.random_calls import call_steps
from tests.planner.random_programs import steps


def carried_out(plan: Plan) -> tuple[dict[str, bytes], int]:
    """What is left after a plan, and the measured peak."""
    with Meter() as meter:
        calls, inputs = calls_of(plan.program, meter.look), inputs_of(plan.program)
        left = carry_out(plan, calls, inputs)
        return {name: a.tobytes() for name, a in left.items()}, meter.peak_bytes


@pytest.mark.parametrize("solver", SOLVERS)
@examples(6, everyday=3)
@given(program=st.one_of(steps(), call_steps()), share=st.floats(0, 1))
def test_plans_of_every_solver_are_carried_out(solver: str, program: Program, share: float) -> None:
    program = scaled(program)
    plain = simulate(program).peak_bytes
    floor = solve(program, plain).floor_bytes
    try:
        plan = solve(program, floor + int(share * (plain - floor)), solver=solver)
    except InfeasibleBudget as error:
        plan = solve(program, error.floor_bytes, solver=solver)
    assert verify(program, plan) == ()
    left, peak_bytes = carried_out(plan)
    assert peak_bytes == plan.peak_bytes
    results = every_result(program)
    fixed = {v.id for v in program.values if v.fixed}
    assert left.keys() >= fixed
    assert all(array == results[name] for name, array in left.items() if name not in fixed)


def layers(n: int) -> tuple[list[Call], dict[str, Array]]:
    """Sigmoid layers by hand, forward and backward."""
    generator = np.random.default_rng(0)
    inputs: dict[str, Array] = {f"w{k}": generator.standard_normal((64, 64)) / 8 for k in range(n)}
    inputs["a0"] = generator.standard_normal((256, 64))
    calls = [
        Call(f"layer {k}", lambda a, w: [1 / (1 + np.exp(-a @ w))], (f"a{k}", f"w{k}"), (f"a{k + 1}",))
        for k in range(n)
    ]
    calls.append(Call("seed", lambda a: [np.ones_like(a)], (f"a{n}",), (f"g{n}",), "backward"))
    for k in reversed(range(n)):
        reads, writes = (f"g{k + 1}", f"a{k + 1}", f"a{k}", f"w{k}"), (f"g{k}", f"d{k}")
        calls.append(
            Call(f"back {k}", lambda g, y, x, w: [(h := g * y * (1 - y)) @ w.T, x.T @ h], reads, writes, "backward")
        )
    return calls, inputs


def _backward(g: Array, y: Array, x: Array, w: Array) -> list[Array]:
    h = g * y * (1 - y)
    return [h @ w.T, x.T @ h]


@pytest.mark.parametrize("share", [0.9, 0.8, 0.75])
def test_gradients_of_layers_by_hand_are_the_same(share: float) -> None:
    calls, inputs = layers(6)
    program = record("layers", calls, inputs)
    plain = carry_out(solve(program, 1.0), calls, inputs)
    plan = solve(program, share)
    assert plan.overhead > 0
    mine = carry_out(plan, calls, inputs)
    assert mine.keys() == plain.keys()
    assert all(np.array_equal(mine[name], plain[name]) for name in plain)


def test_torch_is_not_needed() -> None:
    code = """
import sys
sys.modules["torch"] = None
import numpy as np, autoremat
from autoremat.engines.numpy import Call, carry_out, record
calls = [Call("double", lambda a: [2 * a], ("x",), ("y",)), Call("add", lambda a, b: [a + b], ("x", "y"), ("z",))]
program = record("tiny", calls, {"x": np.ones(8)})
print(carry_out(autoremat.solve(program, 1.0), calls, {"x": np.ones(8)})["z"].sum())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "24.0", done.stderr


def test_a_plan_is_for_its_own_program() -> None:
    calls, inputs = layers(3)
    program = record("layers", calls, inputs)
    again = autoremat.Plan.from_json(solve(program, 0.9).to_json())
    plain = carry_out(solve(program, 1.0), calls, inputs)
    assert np.array_equal(carry_out(again, calls, inputs)["d0"], plain["d0"])
