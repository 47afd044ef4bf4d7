"""Carries out the acts of a plan.

Here stands in which order acts come, and what each does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from autoremat.engines.torch.eager.ledger import Ledger
from autoremat.engines.torch.eager.script import Act, Script
from autoremat.engines.torch.eager.state import Rerunning


class Acting:
    """Knows which act of a script comes next.

    Args:
        script: None where there is no plan.
        is_over: the forward is over, and with it the passes within it.
    """

    def __init__(self, script: Script | None, *, is_over: bool = False) -> None:
        self._acts = () if script is None else script.acts
        self._cursor = self._begin = script.n_acts_within if script is not None and is_over else 0

    def is_next(self, pack: int) -> bool:
        """Tell whether asking for this pack sets off the next act."""
        return self._cursor < len(self._acts) and self._acts[self._cursor].pack == pack

    def take(self) -> Act:
        """Return the next act, and go on to the one after it."""
        self._cursor += 1
        return self._acts[self._cursor - 1]

    def finish_forward(self) -> None:
        """Note where the backward after the forward begins."""
        self._begin = self._cursor

    def begin_again(self) -> None:
        """Go back to where that backward begins."""
        self._cursor = self._begin


def carry_out(
    act: Act, ledger: Ledger, fetch: Callable[[int], Any], let_go: Callable[[int], None],
    waiting: Callable[[], Mapping[int, int]],
) -> None:  # fmt: skip
    """Rerun what an act reruns, in one block.

    Args:
        act: of the plan.
        ledger: what is in memory.
        fetch: brings a value back that should have been there.
        let_go: drops a value.
        waiting: returns, by value, how many handles have not been served.
    """
    held, entries = ledger.held, ledger.entries
    with Rerunning() as rerunning:
        for rerun in act.reruns:
            entry = entries.get(rerun.call)
            if entry is None:
                continue  # in a noted forward, what this call makes has been kept
            for value in entry.reads:
                if value not in held:
                    fetch(value)
            install: Collection[int] = rerun.install
            if not held.keys().isdisjoint(install):
                install = [v for v in install if v not in held]
            if install:
                ends: Collection[int] = ()
                if entry.in_place:
                    served = waiting()
                    ends = [v for v in rerun.drops if not served.get(v)]
                ledger.run(rerun.call, install, rerunning, ends)
            for value in rerun.drops:
                let_go(value)
