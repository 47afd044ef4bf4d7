"""Steps recorded anew because the data made something larger.

Whatever the next step finds is as likely smaller as larger. So what was recorded before is not forgotten for something
smaller, and from the two recordings a plan is made for as much as the results have been seen to grow.
"""

from __future__ import annotations

from autoremat.engines.torch.eager.kinds import Prepared
from autoremat.engines.torch.eager.planning import Planning
from autoremat.program import Program


def still_larger(
    planning: Planning, step: Prepared, program: Program, before: Prepared, growth: float
) -> Prepared | None:  # fmt: skip
    """Return the plan of an earlier recording that this one fits into.

    Or one for ``growth`` times as much, if steps have outgrown the earlier one by that factor; None where this
    recording has other calls, or something larger.
    """
    new = Prepared(path=step.path, program=program)
    if before.plan is None or before.differing or before.taken or not new.is_within(before):
        return None
    larger = planning.foreseen(new, before, _ratio(new, before), growth) if growth > 1 else None
    return larger or before


def with_room(planning: Planning, step: Prepared, before: Prepared, growth: float) -> Prepared:
    """Return a plan for ``growth`` times as much as was recorded before.

    It is the step's own plan if that is enough, or if the two recordings do not tell how things grow.
    """
    ratio = _ratio(before, step) if before.is_within(step) else growth
    larger = planning.foreseen(before, step, ratio, growth / ratio) if growth > ratio > 1 else None
    return larger or step


def _ratio(small: Prepared, large: Prepared) -> float:
    """Return how much larger results are in another recording."""
    assert small.path is not None
    assert large.path is not None
    pairs = zip(small.path.numels(), large.path.numels(), strict=True)
    return max((b / a for a, b in pairs if 0 < a <= b), default=1.0)
