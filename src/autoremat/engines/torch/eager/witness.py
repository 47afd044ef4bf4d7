"""The witness of a first step: hands events to the shadow.

The shadow records as long as fake tensors can do what the real ones do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from autoremat.engines.torch.eager.shadow import Shadow
from autoremat.program.once import Reason


class Witness:
    """Hands every event of a first step to its shadow.

    What fake tensors cannot do ends the recording, not the step.

    Args:
        shadow: that records; None where nobody does.
        unlike: called with the error that ended the recording.
    """

    def __init__(
        self, shadow: Shadow | None = None, unlike: Callable[[BaseException], None] = lambda error: None
    ) -> None:
        self.shadow, self._unlike = shadow, unlike

    def give_up(self, error: BaseException) -> None:
        """End the recording of this step; the step goes on."""
        self.shadow = None
        self._unlike(error)

    def number(self, tensor: Tensor) -> int | None:
        """Return the recorded number of a tensor's value; None without a recording."""
        if self.shadow is None:
            return None
        try:
            return self.shadow.number(tensor)
        except Exception as error:  # noqa: BLE001 - whatever a fake tensor cannot do
            self.give_up(error)
            return None

    def number_anew(self, tensor: Tensor) -> int | None:
        """Number a tensor that is not what it was."""
        if self.shadow is not None:
            self.shadow.twins.forget(tensor)
        return self.number(tensor)

    def revive(self, tensor: Tensor, number: int) -> None:
        """Put a tensor unknown to the recording on this value's memory."""
        if self.shadow is not None:
            self.shadow.revive(tensor, number)

    def number_of_pack(self, pack: int) -> int | None:
        """Return a pack's value number; None if not made in the step."""
        return None if self.shadow is None else self.shadow.packs.number_of.get(pack)

    def made(
        self, func: Any, args: Any, kwargs: Any, out: Any, packs: Sequence[int], call: int, *, foreign: bool = False
    ) -> None:  # fmt: skip
        """Repeat, on fake tensors, a call that was just made.

        A foreign one is one op.
        """
        if self.shadow is None:
            return
        try:
            self.shadow.make(func, args, kwargs, out, packs, call, foreign=foreign)
            self.shadow.packs.here.clear()
        except Exception as error:  # noqa: BLE001 - whatever a fake tensor cannot do
            self.give_up(error)

    def saved(self, pack: int, tensor: Tensor, *, inside: bool) -> None:
        """Note that autograd saves a tensor, inside a call or not.

        A custom function saves outside of all calls.
        """
        if self.shadow is None:
            return
        if inside:
            self.shadow.packs.here[pack] = tensor
            return
        try:
            self.shadow.graph.save_loose(pack, tensor)
        except Exception as error:  # noqa: BLE001 - whatever a fake tensor cannot do
            self.give_up(error)

    def once(self, call: int, reason: Reason) -> None:
        """Note that a call must not be rerun."""
        if self.shadow is not None:
            self.shadow.once[call] = reason

    def changed_unseen(self, values: Iterable[int]) -> None:
        """Note that code outside torch may change these values' memory."""
        if self.shadow is not None:
            self.shadow.recorder.log.changed_unseen.update(values)

    def names_of(self, call: int) -> list[tuple[str, str]]:
        """List module and name of the operators inside a call."""
        if self.shadow is None:
            return []
        ops = self.shadow.recorder.ops
        found = []
        for op in reversed(ops):
            if op.call != call:
                break
            found.append((op.module, op.name))
        return found
