"""Which operators are swept, and which are left out, or not compared as a whole, and why."""

from __future__ import annotations

from torch.testing._internal.opinfo.core import OpInfo

from tests.engines.torch.eager.sweeps.sweep import EVERY, OPERATORS, Place, name_of

UNSTEADY = {
    "linalg.lstsq": "plain torch gives other last bits from run to run",
    "linalg.lstsq.grad_oriented": "plain torch gives other last bits from run to run",
}
"""Operators that are left out, and why."""

REFUSED = {
    "abs": "in place on complex numbers",
    "as_strided.partial_views": "looks beyond its input, where a copy of it has nothing",
    "float_power": "in place on anything but double precision",
}
"""Operators of which plain torch refuses some samples, and which; the others are compared."""

STEADY = [op for op in OPERATORS if name_of(op) not in UNSTEADY]


def operators_at(place: Place) -> list[OpInfo]:
    """Those that may stand in this place."""
    return STEADY if place.is_differentiated else [op for op in EVERY if name_of(op) not in UNSTEADY]
