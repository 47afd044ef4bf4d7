"""Looking at many random scripts, and for the smallest that fails."""

from __future__ import annotations

import traceback
from contextlib import suppress

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from tests.engines.torch.eager.fuzz.examine import Outcome, examine
from tests.engines.torch.eager.fuzz.scripts import Script

# ---- looking at many ---------------------------------------------------------------------------------------------


class Failure(AssertionError):
    """A script that is not as in plain training."""


def look_at(strategy: st.SearchStrategy[Script], n: int, number: int) -> list[tuple[Script, Outcome]]:
    """Scripts of one seed and what became of them: ``n``, or those up to a failure and what it took to shrink that."""
    found: list[tuple[Script, Outcome]] = []

    @seed(number)
    @settings(
        max_examples=n, database=None, deadline=None, report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def look(script: Script) -> None:
        found.append((script, outcome_of(script)))
        if found[-1][1].wrong:
            raise Failure

    with suppress(Failure, Flaky):
        look()
    return found


def outcome_of(script: Script) -> Outcome:
    """What became of a script; an error of ours is an outcome, too."""
    try:
        return examine(script)
    except Exception:  # noqa: BLE001 - whatever went wrong is what we are looking for
        return Outcome(wrong=[traceback.format_exc()])


def smallest_failure(found: list[tuple[Script, Outcome]]) -> str:
    """The last failure, to which hypothesis has shrunk the first, to be pasted into a test; "" if there is none."""
    failures = [f"{script!r}\n{outcome.wrong}" for script, outcome in found if outcome.wrong]
    return failures[-1] if failures else ""
