"""Makes the script that the tape follows from a plan."""

from __future__ import annotations

import math
from typing import Final

from autoremat.engines.torch.eager.acts import Acts
from autoremat.engines.torch.eager.composite import untouched
from autoremat.engines.torch.eager.moves import Moves
from autoremat.engines.torch.eager.path import Path
from autoremat.engines.torch.eager.script import Script
from autoremat.engines.torch.eager.several import held_bytes, waiting_bytes
from autoremat.engines.torch.eager.stays import Stays
from autoremat.engines.torch.eager.tables import (
    asked_bytes,
    beside_bytes,
    costs_of,
    gradient_bytes,
    places_of,
    run_twice,
    saved_bytes,
    stops_of,
)
from autoremat.engines.torch.eager.works import Works
from autoremat.program import Plan, simulate

_SPARE_SECONDS: Final = 5e-5
"""Rough time to prepare one call that the plan does not rerun."""


def script_of(plan: Plan, path: Path) -> Script:
    """Make the script that carries out a plan. O(runs + reads).

    Args:
        plan: of a recorded program.
        path: of its forward.
    """
    program, schedule, n_calls = plan.program, plan.schedule, len(path.calls)
    stays, timeline = Stays(program, schedule, path), simulate(program, schedule)
    moves = Moves(schedule, stays, path)
    kept_packs = stays.kept_packs(moves.values)
    packs = tuple(None if j in kept_packs or v is None else v for j, v in enumerate(path.packed))
    stays.find_last_reads(packs)
    acts, stops = Acts(stays).of(packs, moves.at_ask), stops_of(program, stays.number)
    ready = frozenset(rerun.call for act in acts for rerun in act.reruns)
    hold = frozenset(stays.number[v] for v, ss in stays.by_value.items() if ss[0].last_read is not None)
    last = next((j for j in reversed(path.asks) if 0 <= j < len(packs)), -1)
    asked = frozenset(j for j in (last, *(a.pack for a in acts)) if j >= 0 and packs[j] is None)
    hold_at = {c.packs[0] + i: v for c in path.calls for i, v in c.saved if v in hold and packs[c.packs[0] + i] is None}
    hooked = {j for j, v in enumerate(packs) if v is not None} | asked | hold_at.keys()
    inside = {j for c in path.calls for j in range(*c.packs)}
    makes = Works(program, path, stops, ready, hold)
    works = moves.added(makes.of(packs, hooked), path)
    spare_works = moves.added(makes.spare(works), path)
    n_spare = sum(work is not None and work.spare and not work.ready for work in spare_works)
    return Script(
        funcs=tuple(c.func for c in path.calls),
        works=works,
        packs=packs,
        asked=asked,
        acts=acts,
        hold=hold,
        kept=frozenset(v for j in path.asks if j >= 0 and packs[j] is None and (v := path.packed[j]) is not None),
        at_end=stays.at_end(),
        hold_at=hold_at,
        loose=not hooked <= inside,
        twice=run_twice(plan, timeline, ready),
        budget_bytes=plan.budget_bytes,
        beside_bytes=beside_bytes(stays, timeline),
        asked_bytes=asked_bytes(stays, timeline),
        gradient_bytes=gradient_bytes(program, schedule.order),
        fixed_bytes=program.fixed_bytes,
        where=places_of(program, n_calls),
        numels=tuple(c.numel or math.inf for c in path.calls),
        saved_bytes=saved_bytes(stays, n_calls),
        held_bytes=(held_bytes(program, schedule, timeline), held_bytes(program)),
        waiting_bytes=waiting_bytes(program),
        last=last,
        stops=stops,
        spare_works=spare_works,
        spare_seconds=n_spare * _SPARE_SECONDS,
        packed=path.packed,
        costs=costs_of(program, n_calls),
        composites=untouched(path.composites, works),
        away=frozenset(stays.number[v] for v in moves.values),
        sent_bytes=timeline.sent_bytes,
    )
