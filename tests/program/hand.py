"""Small programs whose bytes were worked out on paper, and the plan made for one of them."""

from __future__ import annotations

from dataclasses import replace

from autoremat.program import END, INSIDE, Link, Offload, Once, Op, Plan, Program, Schedule, Value

BACKWARD = {"phase": "backward", "once": Once.BACKWARD}


def chain() -> Program:
    """Three layers forward, two ops of backward: ``a`` is needed late, ``b`` early in the backward."""
    values = (
        Value("x", 10, fixed=True, kind="input"),
        Value("a", 20),
        Value("b", 30),
        Value("c", 5, label="loss"),
        Value("db", 30),
        Value("da", 20),
    )
    ops = (
        Op("f0", (0,), (1,), 1.0),
        Op("f1", (1,), (2,), 2.0),
        Op("f2", (2,), (3,), 3.0),
        Op("g2", (2, 3), (4,), 1.0, **BACKWARD),
        Op("g1", (1, 4), (5,), 1.0, scratch_bytes=7, **BACKWARD),
    )
    return Program("chain", values, ops)


def linear() -> Program:
    """``linear`` under autocast, a call of three ops: the casts are saved inside, right before the product."""
    values = (
        Value("x", 8, fixed=True),
        Value("w", 4, fixed=True),
        Value("xh", 4, available=1),
        Value("wh", 2, available=1),
        Value("t", 3, held=2, available=INSIDE),
        Value("y", 6, available=2),
        Value("dy", 6),
        Value("dw", 4, held=END),
    )
    ops = (
        Op("cast", (0,), (2,), 1.0, call=3),
        Op("cast", (1,), (3, 4), 1.0, call=3),
        Op("mm", (2, 3), (5,), 4.0, call=3, scratch_bytes=1),
        Op("loss", (5,), (6,), 1.0, call=4),
        Op("unpack", (2,), (), **BACKWARD, kind="ask"),
        Op("mm_backward", (2, 3, 6), (7,), 4.0, **BACKWARD),
    )
    return Program("linear", values, ops)


def handed() -> Program:
    """A product of ``a`` and ``b``, made together: its backward asks for one and for the other."""
    values = (Value("x", 1, fixed=True), Value("a", 4), Value("b", 2), Value("y", 1))
    ops = (
        Op("f", (0,), (1, 2)),
        Op("product", (1, 2), (3,)),
        Op("unpack", (1,), (), **BACKWARD, kind="ask"),
        Op("unpack", (2,), (), **BACKWARD, kind="ask"),
        Op("product_backward", (1, 2, 3), (), **BACKWARD),
    )
    return Program("handed", values, ops)


RULES_OF_OFFLOAD = {
    "sent whole",
    "sources stay",
    "gone when nobody needs it",
    "away until fetched",
    "read once it is here",
    "moves between calls",
    "offloads in order",
    "a link to the tier",
    "tier kept",
}
"""The rules of ``verify`` that are about values in a slower tier."""

LINK = Link(20.0, 10.0, 0.5, takes_turns=False)
"""20 bytes take 1.5 seconds to the tier, and 2.5 back."""


def away() -> tuple[Program, Schedule]:
    """``chain`` with a link, where ``a`` is in the tier while ``g2`` runs."""
    program = replace(chain(), link=LINK)
    return program, replace(Schedule.plain(program), offloads=(Offload(1, 1, 2, 4, 4),))


CHAIN_AGAIN = (0, 1, 2, 3, 0, 4)
"""``chain`` with ``f0`` run again before ``g1`` needs ``a``."""


def chain_plan(**changes: object) -> Plan:
    """The plan that runs ``f0`` again; ``changes`` replace what it says."""
    program = chain()
    said = {
        "program": program,
        "schedule": Schedule.from_order(program, CHAIN_AGAIN),
        "budget_bytes": 90,
        "peak_bytes": 87,
        "plain_peak_bytes": 95,
        "floor_bytes": 87,
        "overhead": 0.125,
        "lower_bound": 0.125,
        "solver": "by hand",
        "floor_lower_bound_bytes": 87,
        "candidates": (("keep everything", 95, 0.0),),
    }
    return Plan(**(said | changes))  # type: ignore[arg-type]


def in_place() -> Program:
    """``relu_`` takes over the storage of ``a``; ``z`` is made from ``a`` before."""
    values = (
        Value("x", 4, fixed=True),
        Value("a", 8),
        Value("z", 1),
        Value("r", 8),
        Value("y", 2, held=END),
    )
    ops = (
        Op("f", (0,), (1,), 1.0),
        Op("h", (1,), (2,), 1.0),
        Op("relu_", (1,), (3,), 1.0, in_place=((3, 1),)),
        Op("loss", (2, 3), (4,), 1.0, **BACKWARD),
    )
    return Program("in place", values, ops)


def split() -> Program:
    """One op with two outputs, of which ``p`` is held by Python until ``use`` has run."""
    values = (
        Value("x", 4, fixed=True),
        Value("p", 3, held=2),
        Value("q", 5),
        Value("u", 1),
        Value("s", 2),
    )
    ops = (
        Op("split", (0,), (1, 2), 1.0),
        Op("look", (2,), (3,), 1.0, once=Once.FOREIGN),
        Op("use", (2,), (4,), 1.0),
    )
    return Program("split", values, ops)
