"""Bytes and operations by XLA's own account, barriers kept; docs/jax.md has the whole tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

jax = pytest.importorskip("jax")

import autoremat.jax as aj  # noqa: E402 - jax is optional
from autoremat.engines.jax import lowering  # noqa: E402
from autoremat.engines.jax.compiler import flops  # noqa: E402
from autoremat.engines.jax.lowering import Lowered, Stretch, fence  # noqa: E402
from autoremat.program import simulate  # noqa: E402
from tests.engines.jax.models import BRIEF, MIB, OPTIONS, QUIET, error, gpt, gpt_parameters, tokens  # noqa: E402

pytestmark = [pytest.mark.filterwarnings(QUIET), pytest.mark.slow]


@dataclass(frozen=True)
class Compiled:
    """A step by XLA, and what was foretold of it."""

    step: Any
    temporaries_bytes: int
    planned_bytes: int


def plain(fn: Callable[..., Any], args: Any, **options: Any) -> Compiled:
    plan = aj.plan(fn, *args, budget=1.0, time_limit_seconds=BRIEF)
    return _compiled(fn, args, simulate(plan.program).peak_bytes, plan.program, options)


def planned(fn: Callable[..., Any], args: Any, share: float, **options: Any) -> Compiled:
    """A step with that share of what plain training takes beside what is fixed."""
    program = aj.plan(fn, *args, budget=1.0, time_limit_seconds=BRIEF).program
    budget = program.fixed_bytes + int(share * (simulate(program).peak_bytes - program.fixed_bytes))
    peak = aj.plan(fn, *args, budget=budget).peak_bytes
    return _compiled(aj.checkpoint(fn, budget=budget), args, peak, program, options)


def _compiled(fn: Callable[..., Any], args: Any, peak: int, program: Any, options: Any) -> Compiled:
    step = jax.jit(jax.grad(fn, **options)).lower(*args).compile(compiler_options=OPTIONS)
    ahead = next(v.nbytes for v in program.values if v.id == "ahead")
    return Compiled(step, aj.memory(step).temporaries_bytes, peak - program.fixed_bytes + ahead)


@pytest.mark.parametrize(("share", "mib", "ratio"), [(0.35, 42, 1.02), (0.25, 29, 1.10), (0.15, 21, 1.20)])
def test_a_gpt_in_the_memory_and_operations_of_xla(share: float, mib: float, ratio: float) -> None:
    """``jax.checkpoint`` of every block takes 27.5 MiB and 1.209 times the operations."""
    args = gpt_parameters(6, 128, 512, 128), tokens(8, 128, 512)
    before, after = plain(gpt, args), planned(gpt, args, share)
    assert before.planned_bytes == pytest.approx(before.temporaries_bytes, rel=0.05)
    assert after.temporaries_bytes <= mib * MIB
    assert flops(after.step) <= ratio * flops(before.step)
    assert after.planned_bytes >= 0.9 * after.temporaries_bytes
    assert error(after.step(*args), before.step(*args)) <= 2e-6


def test_a_resnet_in_the_memory_and_operations_of_xla() -> None:
    """``nn.remat`` of every block takes 24.4 MiB and 1.317 times the operations."""
    pytest.importorskip("flax")
    from benchmarks._jax_resnet import inputs, loss_of

    loss, args = loss_of(), inputs()
    before, after = plain(loss, args, has_aux=True), planned(loss, args, 0.35, has_aux=True)
    assert after.temporaries_bytes <= 27 * MIB
    assert flops(after.step) <= 1.01 * flops(before.step)
    assert after.planned_bytes >= 0.9 * after.temporaries_bytes
    assert error(after.step(*args), before.step(*args)) <= 2e-6


def _of_inputs_only(self: Lowered, stretch: Stretch, fixed: dict[int, Any], memory: dict[int, Any]) -> dict[int, Any]:
    """What the stretch reads goes through a fence, and nothing else that is in memory."""
    read = {v for p in range(stretch.begin, stretch.end) for v in self.recorded.groups[self.schedule.order[p]].reads}
    names = [v for v in (*memory, *fixed) if v in read]
    behind = dict(zip(names, fence([memory[v] if v in memory else fixed[v] for v in names]), strict=True))
    memory.update((v, behind[v]) for v in memory if v in behind)
    return fixed | {v: behind[v] for v in names if v in fixed}


def test_fences_hold_everything_that_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fences of fewer operands hold nothing: somebody who thins them out has to see this."""
    args = gpt_parameters(6, 128, 512, 128), tokens(8, 128, 512)
    full = planned(gpt, args, 0.25).temporaries_bytes
    monkeypatch.setattr(Lowered, "_fenced", _of_inputs_only)
    assert planned(gpt, args, 0.25).temporaries_bytes >= 3 * full
    monkeypatch.undo()
    monkeypatch.setattr(lowering, "fence", list)
    assert planned(gpt, args, 0.25).temporaries_bytes >= 3 * full
