"""Spare: prepares for leaving the path.

A plan that keeps what a call makes neither prepares the call for a rerun nor looks at what autograd saves of it. Once
the path has been left, nothing of that could be dropped. So where a step may leave its path, it is followed *with
spare*: such calls are prepared, and their saved tensors noted. As long as the step stays on its path, memory is that of
the plan to the byte, and all notes are forgotten at the end of the forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING

from autoremat.engines.torch.eager.handle import Handle, Kept
from autoremat.engines.torch.eager.ledger import Ledger
from autoremat.engines.torch.eager.passes import Passes
from autoremat.engines.torch.eager.values import Numbers
from autoremat.engines.torch.operators.local import local_of

if TYPE_CHECKING:
    from autoremat.engines.torch.eager.backward import Backward

_MATTERS = 0.05
"""Least share of the budget that dropping must be able to free."""


class Spare:
    """What is known of a forward beyond its plan.

    Args:
        ledger: gets also the calls that the plan does not rerun.
        numbers: which memory holds which value.
        passes: where handles are counted.
        backward: whom handles ask.
    """

    def __init__(self, ledger: Ledger, numbers: Numbers, passes: Passes, backward: Backward) -> None:
        self._ledger, self._numbers, self._passes = ledger, numbers, passes
        self._backward = weakref.ref(backward)
        self._calls: list[int] = []
        self._kept: list[tuple[int, int, weakref.ref[Kept]]] = []

    # ---- on the path ---------------------------------------------------------------------------------------------

    def entered(self, call: int) -> None:
        """Note a call in the ledger that the plan does not rerun."""
        self._calls.append(call)

    def saved(self, pack: int, value: int, kept: Kept) -> None:
        """Note that autograd saved a value, and the plan keeps it."""
        self._kept.append((pack, value, weakref.ref(kept)))

    def forget(self) -> None:
        """Forget all notes: the forward ended on its path."""
        for call in self._calls:
            self._ledger.withdraw(call)
        self._calls.clear()
        self._kept.clear()

    # ---- off the path --------------------------------------------------------------------------------------------

    def is_worth(self, budget_bytes: int) -> bool:
        """Tell whether enough was kept so far to be worth dropping.

        At a tight budget the plan keeps next to nothing.
        """
        storages = (kept.tensor.untyped_storage() for _, _, ref in self._kept if (kept := ref()) is not None)
        return sum({s._cdata: s.nbytes() for s in storages}.values()) > _MATTERS * budget_bytes

    def left(self) -> None:
        """Leave the path, and wait until room is needed.

        A step with fewer calls may need none.
        """
        self._withdraw_unable(self._living())

    def turn(self) -> int:
        """Let handles stand for all values that can be recomputed.

        Returns:
            How many bytes the ledger holds more.
        """
        living = self._living()
        self._withdraw_unable(living)
        entries, maker, held = self._ledger.entries, self._ledger.maker, self._ledger.held
        read = {value for entry in entries.values() for value in entry.reads}
        nbytes = 0
        for value, found in living.items():
            if value not in held and (value in maker or value in read):
                tensor = local_of(found[0][1].tensor).detach()
                self._ledger.hold(value, tensor)
                nbytes += tensor.untyped_storage().nbytes()
            if value in maker:
                self._turn(value, found)
        self._calls.clear()
        self._kept.clear()
        return nbytes

    def _turn(self, value: int, found: Iterable[tuple[int, Kept]]) -> None:
        backward = self._backward()
        assert backward is not None
        for pack, kept in found:
            handle = Handle(backward, pack, kept.tensor)
            handle.value = value
            self._passes.made(handle)
            kept.turn(handle)

    def _living(self) -> dict[int, list[tuple[int, Kept]]]:
        """List what autograd still holds unchanged, by value."""
        found: dict[int, list[tuple[int, Kept]]] = {}
        changed = set()
        for pack, value, reference in self._kept:
            kept = reference()
            if kept is None:
                continue
            found.setdefault(value, []).append((pack, kept))
            if not kept.is_unchanged or self._numbers.known_tensor(kept.tensor) != value:
                changed.add(value)
        return {value: kept for value, kept in found.items() if value not in changed}

    def _withdraw_unable(self, living: Container[int]) -> None:
        """Withdraw calls that read what is neither there nor can be recomputed."""
        ledger = self._ledger
        for call in sorted(ledger.entries):
            if not all(v in living or v in ledger.held or v in ledger.maker for v in ledger.entries[call].reads):
                ledger.withdraw(call)
