"""Every differentiable operator of torch, with everything computed again that may be: the figures of docs/exactness.md.

The sweep of tests/engines/torch/eager/sweeps, counted. Run: ``python benchmarks/operators.py``; a quarter of an hour.
``--quick`` looks at fewer samples per operator and dtype; ``--write`` puts the tables into the page.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.section import write_section
from tests.engines.torch.eager.sweeps.choice import REFUSED, STEADY, UNSTEADY, operators_at
from tests.engines.torch.eager.sweeps.sweep import DTYPES, PLACES, Outcome, name_of, sweep, wrong_at

Outcomes = dict[tuple[str, torch.dtype], list[Outcome]]


def run(at_most: int) -> Outcomes:
    """The outcomes by operator and dtype."""
    return {(name_of(op), dtype): sweep(op, [dtype], at_most) for op in STEADY for dtype in DTYPES}


def by_dtype(outcomes: Outcomes) -> Iterator[str]:
    """A row per dtype."""
    yield "| dtype | operators | steps | identical | computed again | random | nothing to compute again | kept |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for dtype in DTYPES:
        found = [(name, o) for (name, d), all_of_it in outcomes.items() if d == dtype for o in all_of_it]
        yield row(str(dtype).removeprefix("torch."), found)
    yield row("all", [(name, o) for (name, _), all_of_it in outcomes.items() for o in all_of_it])


def row(title: str, found: list[tuple[str, Outcome]]) -> str:
    """Counts of some outcomes."""
    compared = [o for _, o in found if not o.refused]
    counts = (
        len({name for name, o in found if not o.refused}),
        len(compared),
        sum(not o.wrong for o in compared),
        sum(o.again > 0 for o in compared),
        sum(o.again > 0 and o.random for o in compared),
        sum(o.asked == 0 for o in compared),
        sum(o.asked > 0 and o.again == 0 for o in compared),
    )
    return f"| {title} | " + " | ".join(map(str, counts)) + " |"


def by_place(at_most: int) -> Iterator[str]:
    """How many steps were compared where the operator stands somewhere else, and how many were not identical."""
    dtypes = (*DTYPES, torch.float16, torch.int64, torch.bool)
    yield f"| the operator stands | {' | '.join(str(d).removeprefix('torch.') for d in dtypes)} | wrong |"
    yield f"| --- |{' --- |' * (len(dtypes) + 1)}"
    for name, place in PLACES.items():
        found = [[w for op in operators_at(place) for w in wrong_at(place, op, dtype, at_most)] for dtype in dtypes]
        counts = [str(len(of)) for of in found]
        yield f"| {name} | {' | '.join(counts)} | {sum(bool(wrong) for of in found for wrong in of)} |"


def kept(outcomes: Outcomes) -> Iterator[str]:
    """What is kept, by reason."""
    reasons: dict[str, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for (name, _), all_of_it in outcomes.items():
        for o in all_of_it:
            for aten, reason in o.kept if o.again < o.asked else ():
                reasons[general(reason)][0].add(aten.removesuffix(".default"))
                reasons[general(reason)][1].add(name)
    yield "| reason | calls or ATen operators that do not run again | seen in |"
    yield "| --- | --- | --- |"
    for reason, (atens, names) in sorted(reasons.items()):
        yield f"| {reason} | {listed(atens)} | {listed(names)} |"


def general(reason: str) -> str:
    """The reason without the name of the value."""
    return re.sub(r"(reads|overwrites) .*?(?=, which|$)", r"\1 a value", reason)


def views(outcomes: Outcomes) -> list[str]:
    """Operators that make nothing of their own in any sample."""
    asked: dict[str, int] = defaultdict(int)
    for (name, _), all_of_it in outcomes.items():
        for o in all_of_it:
            asked[name] += o.asked
    return [name for name in compared(outcomes) if not asked[name]]


def compared(outcomes: Outcomes) -> set[str]:
    """Operators of which any step was compared."""
    return {name for (name, _), found in outcomes.items() if any(not o.refused for o in found)}


def listed(names: Iterable[str]) -> str:
    """Names in a table or a sentence."""
    return ", ".join(f"`{name}`" for name in sorted(names))


def wrapped(sentence: str) -> str:
    """In lines of the width of the page."""
    return textwrap.fill(sentence, 120, break_long_words=False, break_on_hyphens=False)


def report(outcomes: Outcomes) -> Iterator[str]:
    """The first section of the page."""
    yield from by_dtype(outcomes)
    yield ""
    without = {name for name, _ in outcomes} - compared(outcomes)
    yield wrapped(f"Without a differentiable sample: {listed(without)}.")
    yield ""
    yield wrapped(f"Nothing of their own to compute again in any sample: {listed(views(outcomes))}.")
    yield ""
    yield from kept(outcomes)
    yield ""
    yield "| left out | why |"
    yield "| --- | --- |"
    for name, why in UNSTEADY.items():
        yield f"| `{name}` | {why} |"
    for name, why in REFUSED.items():
        yield f"| `{name}`, some samples | refused by plain torch: {why} |"


def main() -> None:
    """Print the tables; write them if asked to."""
    torch.set_num_threads(1)
    quick = "--quick" in sys.argv
    for section, lines in (
        ("operators.py", report(run(2 if quick else 10))),
        ("operators.py by place", by_place(1 if quick else 4)),
    ):
        text = "\n".join(lines)
        print(text, flush=True)
        if "--write" in sys.argv:
            write_section("exactness.md", section, text)


if __name__ == "__main__":
    main()
