"""A plan of 10,000 ops with all that a recorded program has: modules, lines, types."""

from __future__ import annotations

from dataclasses import replace

from autoremat.planner import solve
from autoremat.program import Plan
from tests.planner.chains import gpt


def large_plan() -> Plan:
    """A GPT so deep that it has 10,000 ops, with ``torch.utils.checkpoint`` around every block."""
    program = gpt(350)
    ops = tuple(replace(op, source=f"/home/user/model/gpt.py:{k % 300}") for k, op in enumerate(program.ops))
    values = tuple(
        replace(v, dtype="bfloat16", shape=(8, 1024, 1 + v.nbytes // 16384, 1 + k % 500))
        for k, v in enumerate(program.values)
    )
    plan = solve(replace(program, ops=ops, values=values), 1 << 62, solver="every-block")
    return replace(plan, budget_bytes=plan.peak_bytes + 10**9)
