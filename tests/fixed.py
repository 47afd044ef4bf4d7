"""What takes the place of seconds in tests, so that they say the same on every machine, however busy it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from hypothesis import settings

from autoremat.engines.torch.operators import timing
from autoremat.engines.torch.operators.timing import Cost
from autoremat.planner import beside, clock
from autoremat.planner.beside import Here
from autoremat.planner.bounds.stages import Table, Whole

SEED_IS = "AUTOREMAT_SEED"
"""The variable that has the seed of random examples; without it examples are the same every time."""

MOST_EXAMPLES = 15
"""Of a property on an ordinary day; what costs as much as a search for a plan shows what it has to show in these."""

MORE = 5
"""How many times what was asked for, where examples are random."""

LOOK_SECONDS = 1 / 1024
"""What passes from one look at the planner's clock to the next; sums of it are exact."""

SOLVER_SECONDS = 1 / 8
"""What a linear or integer program takes."""

NODES_IN_A_SECOND = 0.5
"""Of the search for an integer program's optimum: few, since the first one alone may take seconds."""

MOST_NODES = 20
"""Where the planner itself limits them; it would stop after its seconds as well."""

MOST_COLUMNS = 40
"""Of an integer program that is solved in a second, in two seconds four times as many: what is larger may take minutes
for its first node, and counts as not done."""

_COSTS: dict[Any, Cost] = {}
_measured, _solve = timing._measure_for_real, Table.solve


def is_thorough() -> bool:
    """Whether examples are random."""
    return bool(os.environ.get(SEED_IS))


def seed() -> int:
    """The seed of random examples."""
    return int(os.environ[SEED_IS])


def examples(n: int, *, everyday: int = MOST_EXAMPLES) -> settings:
    """A few examples of a property, always the same; where tests are to be thorough random ones, ``MORE`` times n."""
    return settings(max_examples=n * MORE if is_thorough() else min(n, everyday), deadline=None)


def random_seed(number: int) -> int:
    """This number; where tests are to be thorough another one each time, which the seed decides."""
    return number + 1000 * seed() if is_thorough() else number


def _estimated(signature: Any, room_bytes: int | None, repeats: int = 1) -> Cost:
    """An operator run once, for what it allocates; its seconds are an estimate."""
    cost = _measured(signature, room_bytes, 1)
    return cost._replace(seconds=timing.estimate(signature, sum(cost.made_bytes)).seconds, runs=1)


def _long_enough(func: Any, args: Any, kwargs: Any, cuda: bool) -> float:
    """Longer than what is run again to be timed."""
    return timing._LONG_SECONDS


@contextmanager
def fixed_seconds() -> Iterator[None]:
    """Operators are measured for the bytes that they allocate; seconds are estimated."""
    quick = {"_MEASURED": _COSTS, "_FACTORS": {}, "_CACHE_BYTES": 0, "_time_once": _long_enough}
    quick["_measure_for_real"] = _estimated
    with patch.multiple(timing, **quick):
        yield


class Work:
    """A clock that counts how often it is looked at, and how many programs are handed to a solver."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        """The work so far."""
        self.seconds += LOOK_SECONDS
        return self.seconds

    def relaxation_limits(self, seconds: float) -> dict[str, float]:
        """A linear program always ends."""
        self.seconds += SOLVER_SECONDS
        return {}

    def search_limits(self, seconds: float) -> dict[str, float]:
        """An integer program may have nodes in place of seconds."""
        self.seconds += SOLVER_SECONDS
        return {"node_limit": max(1, int(seconds * NODES_IN_A_SECOND)) if seconds < 1e6 else 1_000_000}


def _solved(table: Table, seconds: float, *, nodes: int | None = None, **rest: Any) -> Whole:
    """The integer program, if it is small."""
    if nodes is None and len(table.cost) > MOST_COLUMNS * seconds**2:
        return Whole(0.0, None)
    return _solve(table, seconds, nodes=nodes and min(nodes, MOST_NODES), **rest)


@contextmanager
def fixed_planning() -> Iterator[None]:
    """The planner's limits of time count work, from none on, and plans are looked for in this process."""
    work = Work()
    limits = {name: getattr(work, name) for name in ("now", "relaxation_limits", "search_limits")}
    with (
        patch.multiple(clock, _METER=clock._Meter(), **limits),
        patch.object(Table, "solve", _solved),
        patch.object(beside, "begun", Here),
    ):
        yield
