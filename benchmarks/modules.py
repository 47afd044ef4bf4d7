"""Every module of torch with everything computed again that may be, beside torch's checkpoint: for docs/exactness.md.

The sweep of tests/engines/torch/eager/sweeps, counted. Run: ``python benchmarks/modules.py``; about ten minutes.
``--quick`` looks at two samples per module and mode; ``--write`` puts the tables into the page.
"""

from __future__ import annotations

import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.section import write_section
from tests.engines.torch.eager.sweeps.module_sweep import DTYPES, MODULES, beside, cases, sweep
from tests.engines.torch.eager.sweeps.sweep import Outcome, quiet
from tests.engines.torch.torch_checkpoint import FORMS

Outcomes = dict[str, list[Outcome]]
"""By module."""


def by_dtype(outcomes: dict[torch.dtype, Outcomes]) -> Iterator[str]:
    """A row per dtype."""
    yield "| dtype | modules | steps | identical | computed again | nothing to compute again | kept |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for dtype, found in outcomes.items():
        steps = [o for all_of_it in found.values() for o in all_of_it]
        counts = (
            sum(bool(all_of_it) for all_of_it in found.values()),
            len(steps),
            sum(not o.wrong for o in steps),
            sum(o.again > 0 for o in steps),
            sum(o.asked == 0 for o in steps),
            sum(o.asked > 0 and o.again == 0 for o in steps),
        )
        yield f"| {str(dtype).removeprefix('torch.')} | " + " | ".join(map(str, counts)) + " |"


def by_form(at_most: int | None) -> Iterator[str]:
    """A row per form of ``torch.utils.checkpoint``, and the modules that differ silently."""
    found: dict[str, Counter[tuple[str, str]]] = {form: Counter() for form in FORMS}
    with quiet():
        for info in MODULES:
            for case in cases(info, torch.float32, at_most):
                for form in FORMS:
                    found[form][info.name, kind_of(beside(case, form))] += 1
    yield "| `torch.utils.checkpoint`, float32 | steps | identical | error | silent | modules with silent ones |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for form, counts in found.items():
        total = Counter[str]()
        for (_, kind), n in counts.items():
            total[kind] += n
        wrong = ", ".join(f"`{name}` {n}" for (name, kind), n in counts.items() if kind == "wrong")
        steps = sum(n for kind, n in total.items() if kind != "not a step")
        yield f"| {form} | {steps} | {total['right']} | {total['error']} | {total['wrong']} | {wrong or '-'} |"


def kind_of(outcome: str | None) -> str:
    """The class of what ``beside`` says."""
    if outcome is None:
        return "not a step"
    if not outcome:
        return "right"
    return "error" if outcome.startswith("error") else "wrong"


def kept(outcomes: Outcomes) -> str:
    """The modules of which nothing that the backward asks for may be computed again."""
    names = [
        f"`{name}` ({n})" for name, found in outcomes.items() if (n := sum(o.asked > 0 and o.again == 0 for o in found))
    ]
    return textwrap.fill(f"Kept in float32: {', '.join(names) or 'nothing'}.", 120, break_long_words=False)


def report(at_most: int | None) -> Iterator[str]:
    """The section of the page."""
    others = 5 if at_most is None else at_most
    outcomes = {
        dtype: {info.name: sweep(info, dtype, at_most if dtype == torch.float32 else others) for info in MODULES}
        for dtype in DTYPES
    }
    yield from by_dtype(outcomes)
    yield ""
    yield kept(outcomes[torch.float32])
    yield ""
    yield from by_form(at_most)


def main() -> None:
    """Print the tables; write them if asked to."""
    torch.set_num_threads(1)
    text = "\n".join(report(2 if "--quick" in sys.argv else None))
    print(text)
    if "--write" in sys.argv:
        write_section("exactness.md", "modules.py", text)


if __name__ == "__main__":
    main()
